"""One finetuning run: samples with soft labels in, class probabilities out.

    python train.py --model smollm2-135m:6 --train train.jsonl --test test.jsonl --out run     (any CPU)
    python train.py --model Qwen/Qwen2.5-0.5B --train weak.jsonl --test test.jsonl --loss logconf --out run

Rows of --train hold id, text and either label (a class) or probs (a soft label, [K]); rows of --test hold id, text and,
to be scored, label. Written to --out: predictions.jsonl (id, probs) and steps.jsonl (step, loss, lr, tokens).

Every batch is one padding-free forward (model.py). Shapes: B batch, N samples, K classes.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import (
    ALONE,
    InputError,
    Progress,
    check_out,
    dump_row,
    flag,
    parse_dataclass,
    picked,
    print0,
    read_samples,
    refuse_shared_gpus,
    run_script,
    stable_hash,
    world,
    write_jsonl,
)
from kernels import CHOICES, conf_loss, resolve
from model import Classifier, ModelSpec, resolve_dtype, save_model, to_device

# ---- losses: the cross-entropy to a target [..., B, K], which each makes of logits and soft labels [..., B, K] ----


def xent(logits: Tensor, labels: Tensor, step_frac: float, config: "TrainConfig") -> Tensor:
    """The soft labels themselves."""
    return labels


def product(logits: Tensor, labels: Tensor, step_frac: float, config: "TrainConfig") -> Tensor:
    """p^beta y^alpha, renormalised over K (OpenAI weak-to-strong code)."""
    return conf_loss.product_target(logits, labels, config.alpha, config.beta)


def logconf(logits: Tensor, labels: Tensor, step_frac: float, config: "TrainConfig") -> Tensor:
    """(1 - c) y + c h, K = 2: the auxiliary confidence loss (Burns et al. 2312.09390, section 4.3.2; OpenAI weak-to-strong code).

    h is the prediction, hardened so that the classes are as frequent in the whole batch as in its labels. Raises
    ValueError for K other than 2.
    """
    return conf_loss.logconf_target(logits, labels, aux_weight(step_frac, config))


LOSSES = {"xent": xent, "product": product, "logconf": logconf}  # step_frac: share of the run's steps that is done


def aux_weight(step_frac: float, config: "TrainConfig") -> float:
    """c of the confidence loss: aux_coef after the warm-up, less before."""
    if step_frac > config.warmup_frac or (config.aux_warmup == "linear" and config.warmup_frac == 0):
        return config.aux_coef
    return config.aux_coef * (step_frac if config.aux_warmup == "openai" else step_frac / config.warmup_frac)


def loss_and_gradient(logits: Tensor, labels: Tensor, step_frac: float, config: "TrainConfig", kernels: str):
    """The loss [...] and its gradient at the logits [..., B, K]: by one kernel launch where there is a kernel, or autograd."""
    if kernels == "triton" and config.loss in conf_loss.MODES:
        c, heads = aux_weight(step_frac, config), (x.reshape(-1, *x.shape[-2:]) for x in (logits, labels))
        loss, gradient = conf_loss.conf_loss(*heads, config.loss, c, config.alpha, config.beta)
        return loss.view(logits.shape[:-2]), gradient.view_as(logits)
    return conf_loss.reference(logits, LOSSES[config.loss](logits.detach(), labels, step_frac, config))


def check_kernel(config: "TrainConfig", kernels: str, dev: torch.device) -> None:
    """Raises InputError where the kernel computes another loss than LOSSES does, as after an edit of the latter."""
    z, y = (torch.randn(32, 2, generator=torch.Generator().manual_seed(i)).to(dev) for i in (0, 1))
    got, want = (loss_and_gradient(z, y.softmax(-1), 1.0, config, k)[0].item() for k in (kernels, "reference"))
    if abs(got - want) > 1e-4 * (1 + abs(want)):
        raise InputError(f"loss {config.loss!r}: the kernel gives {got}, train.py {want}; choose --kernels reference")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    loss: str = flag("xent", "what the soft labels are trained with", choices=tuple(LOSSES))
    lr: float = flag(1e-5, "peak learning rate; cosine to zero, no warm-up", float)
    epochs: int = flag(2, "passes over the training samples", int)
    batch_size: int = flag(32, "samples per optimizer step", int)
    seed: int = flag(0, "order of the samples, and where adapters start", int, zero=True)
    max_tokens: int = flag(
        2048, "longest input; a longer one loses its middle, part of the transcript, and is counted", int
    )
    dtype: str = flag("auto", "of the forward and backward pass; master weights are float32", choices=("auto", "float32", "bfloat16"))  # fmt: skip
    kernels: str = flag("auto", "head and loss: Triton (auto: on a GPU), or plain PyTorch", choices=CHOICES, speed=True)
    max_tokens_per_forward: int = flag(32768, "most tokens in one forward; changes rounding alone", int, speed=True)
    checkpointing: bool = flag(False, "recompute activations block by block to save memory", bool, speed=True)
    compile: bool = flag(False, "torch.compile every block; pays on a GPU", bool, speed=True)
    alpha: float = flag(1.0, "product loss: exponent of the labels", float, zero=True, most=1000)
    beta: float = flag(1.0, "product loss: exponent of the model's own probabilities", float, zero=True, most=1000)
    aux_coef: float = flag(
        0.5, "logconf loss: weight of the model's own hardened predictions", float, zero=True, most=1
    )
    warmup_frac: float = flag(
        0.1, "logconf loss: share of the steps over which that weight ramps up", float, zero=True, most=1
    )
    aux_warmup: str = flag("openai", "logconf loss: multiply by the step fraction and jump, or rise linearly", choices=("openai", "linear"))  # fmt: skip
    lora_rank: int = flag(
        0, "train adapters of this rank on the frozen model's linear layers (0: whole model)", int, zero=True
    )
    lora_alpha: int = flag(32, "adapters count alpha / rank times", int)  # so the best rate hardly depends on the rank


# ---- how a batch is split ----


def micro_batches(indices: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The indices in turn, cut where a micro-batch would exceed `max_tokens`; at least one sample each."""
    out: list[list[int]] = []
    for i in indices:
        if not out or sum(lengths[j] for j in out[-1]) + lengths[i] > max_tokens:
            out.append([])
        out[-1].append(i)
    return out


def split_over_ranks(lengths: list[int], max_tokens: int, n_ranks: int) -> list[list[list[int]]]:
    """Micro-batches of every rank, equally many each: the longest sample goes to the rank with the fewest tokens, and so on."""
    ranks: list[list[int]] = [[] for _ in range(n_ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(ranks, key=lambda r: sum(lengths[j] for j in r)).append(i)
    split = [micro_batches(sorted(r), lengths, max_tokens) for r in ranks]
    return [s + [[]] * (max(map(len, split)) - len(s)) for s in split]


# ---- the loop ----

Tracker = Callable[[dict], None]  # is called with each row of the log: a curve on another screen


def lr_at(step: int, n_steps: int, peak: float) -> float:
    """Cosine from the peak at step 0 to zero at step n_steps."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def batches(n: int, config: TrainConfig) -> Iterator[list[int]]:
    """Indices of each batch of the run: every epoch in its own order, a function of (seed, epoch)."""
    for epoch in range(config.epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(stable_hash("order", config.seed, epoch)))
        yield from (b.tolist() for b in order.split(config.batch_size))


def finetune(
    classifier: Classifier, texts: list[str], labels: Tensor, config: TrainConfig, steps_file: Path | None = None,
    tracker: Tracker | None = None,
) -> dict:  # fmt: skip
    """Train `classifier` from its pretrained weights on soft labels [N, K]; returns tokens, steps, cut inputs and the log.

    Two equal runs give the same bits in float32; in bfloat16 on a GPU, FlashAttention's backward adds in no fixed order.
    Rows of the log {step, loss, lr, tokens, seconds} go to `steps_file` and `tracker` as training goes on. Raises
    ValueError on labels that are no probabilities, FloatingPointError on a loss that is not finite.
    """
    check_labels(labels, len(texts))
    classifier.reset(config)
    samples, n_cut = classifier.encode(texts, config.max_tokens)
    if n_cut:
        classifier.ranks.print(
            f"note: {n_cut} of {len(texts)} inputs exceed {config.max_tokens} tokens and lose their middle"
        )
    labels, dev = labels.float(), classifier.model.device
    if classifier.kernels != "reference":
        check_kernel(config, classifier.kernels, dev)
    schedule, max_tokens, n_tokens = list(batches(len(samples), config)), config.max_tokens_per_forward, 0
    log = StepLog(f"finetune {classifier.spec.name}", len(schedule), steps_file, tracker, classifier.ranks)
    for step, batch in enumerate(tqdm(schedule, desc=log.name, leave=False, disable=classifier.ranks.rank > 0 or None)):
        tokens, y = [samples[i] for i in batch], to_device(labels[batch], dev)
        loss, max_tokens = backward_that_fits(classifier, tokens, y, step / len(schedule), config, max_tokens)
        lr = lr_at(step, len(schedule), config.lr)
        classifier.optimizer.step(lr)
        n_tokens += sum(map(len, tokens))
        log.add(loss, step=step, lr=lr, tokens=n_tokens)
    counts = {"train_tokens": n_tokens, "steps": len(schedule), "cut_inputs": n_cut}
    lowered = {"max_tokens_per_forward": max_tokens} if max_tokens != config.max_tokens_per_forward else {}
    return counts | lowered | {"log": log.rows}


class StepLog:
    """A row per step in steps.jsonl as training goes on, and a line per 5% on the terminal where a run takes 20 s or more.

    Reading a loss synchronises with the GPU: there it is done every 20 steps, or after 5 s.
    """

    def __init__(self, name: str, n_steps: int, file: Path | None = None, tracker: Tracker | None = None, ranks=ALONE):
        self.name, self.n_steps, self.start, self.progress = name, n_steps, time.time(), Progress(name, "step", ranks)
        self.file, self.tracker = (file, tracker) if ranks.rank == 0 else (None, None)
        self.rows: list[dict] = []
        self.pending_losses: list[Tensor] = []
        self.read_at = 0.0  # seconds
        if self.file:
            write_jsonl(self.file, [])

    def add(self, loss: Tensor, **row: float) -> None:
        """Raises FloatingPointError where a loss that is read is not finite."""
        seconds, done = time.time() - self.start, (row["step"] + 1) / self.n_steps
        self.rows.append(row | {"seconds": seconds})
        self.pending_losses.append(loss)
        if loss.is_cuda and row["step"] % 20 and done < 1 and seconds < self.read_at + 5:
            return
        self.read_at, fresh = seconds, self.rows[-len(self.pending_losses) :]
        for r, value in zip(fresh, torch.stack(self.pending_losses).tolist(), strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"loss is {value} at step {r['step']} of {self.n_steps}")
            r["loss"] = value
        self.pending_losses.clear()
        if self.file:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write("".join(map(dump_row, fresh)))
        for r in fresh if self.tracker else ():
            self.tracker(r)
        rate = f"{row['tokens'] / seconds:.0f} tokens/s"
        self.progress.at(row["step"] + 1, self.n_steps, seconds, f"loss {value:.4f}", f"lr {row['lr']:.2e}", rate)


def backward_batch(classifier, tokens: list[list[int]], y: Tensor, step_frac: float, config, max_tokens: int) -> Tensor:
    """Forward, loss, backward, accumulate: the loss of the whole batch, on every rank; its gradients are the optimizer's.

    Neither `max_tokens` nor the number of ranks changes it, but for rounding. With several micro-batches the logits are
    computed first without gradient, the loss is differentiated at them, and each micro-batch is run again and pushed back
    from its rows of that gradient. A rank with nothing left runs a sample whose gradient is zero, so that collectives match.
    """
    ranks = classifier.ranks
    mine = split_over_ranks([len(t) for t in tokens], max_tokens, ranks.size)[ranks.rank]
    rows = [to_device(torch.tensor(m, dtype=torch.long), y.device) for m in mine]

    def forward(m: list[int]) -> Tensor:
        return classifier.logits([tokens[i] for i in m or [0]])

    with torch.set_grad_enabled(len(mine) == 1):  # then this graph is the one that is pushed back through
        logits = [forward(m) for m in mine]
    z = torch.zeros_like(y)
    for r, out in zip(rows, logits, strict=True):
        z.index_copy_(0, r, out.detach()[: len(r)])
    if ranks.size > 1:
        torch.distributed.all_reduce(z, group=ranks.group)
    loss, gradient = loss_and_gradient(z, y, step_frac, config, classifier.kernels)
    for n, (m, r) in enumerate(zip(mine, rows, strict=True)):
        out = logits[0] if len(mine) == 1 else forward(m)
        out[: len(r)].backward(ranks.size * gradient[r])  # FSDP takes the mean over ranks
        classifier.optimizer.accumulate_grads(first=n == 0)
    if ranks.size > 1:
        grads = [p.grad for p in classifier.whole]
        total = torch.cat([g.flatten() for g in grads]).div_(ranks.size)
        torch.distributed.all_reduce(total, group=ranks.group)
        for g, summed in zip(grads, total.split([g.numel() for g in grads]), strict=True):
            g.copy_(summed.view_as(g))
    return loss


def backward_that_fits(classifier, tokens, y, step_frac, config, max_tokens) -> tuple[Tensor, int]:
    """`backward_batch`, again with half the tokens in a forward while memory runs out: the loss, and how many tokens fit."""
    while True:
        try:
            return backward_batch(classifier, tokens, y, step_frac, config, max_tokens), max_tokens
        except torch.OutOfMemoryError:
            max_tokens = min(max_tokens, sum(map(len, tokens))) // 2
            if classifier.ranks.size > 1 or max_tokens < max(map(len, tokens)):
                raise
        classifier.optimizer.drop_gradients()
        torch.cuda.empty_cache()
        print0(f"out of memory: again with --max-tokens-per-forward {max_tokens}, which gives the same result")


def check_labels(labels: Tensor, n: int) -> None:
    """Raises ValueError where the labels are not N >= 1 probability vectors."""
    if not 0 < n == len(labels) or labels.ndim != 2:
        raise ValueError(f"{n} samples with labels of shape {list(labels.shape)}; expected [N, K] with N >= 1")
    wrong = ~((labels >= 0).all(-1) & ((labels.sum(-1) - 1).abs() <= 1e-3))  # NaN is neither
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"label of sample {i} is not a probability vector: {labels[i].tolist()}")


@torch.no_grad()
def forward_all(classifier: Classifier, texts: list[str], config: TrainConfig, fn: Callable) -> Tensor:
    """`fn`, classifier.features or .logits, of every text, on the CPU; neighbours in length share a forward."""
    samples, _ = classifier.encode(texts, config.max_tokens)
    lengths = [len(s) for s in samples]
    order = sorted(range(len(samples)), key=lambda i: lengths[i])
    slices = micro_batches(order, lengths, min(config.max_tokens_per_forward, 4096))
    ranks, me = classifier.ranks.size, classifier.ranks.rank
    out: dict[int, Tensor] = {}
    for n in tqdm(range(0, len(slices), ranks), desc="forward", leave=False, disable=me > 0 or None):
        y = fn([samples[i] for i in slices[min(n + me, len(slices) - 1)]])  # past the end the last one, to go along
        out |= {n + me: y.cpu()} if n + me < len(slices) else {}
    parts = classifier.ranks.gather(out)
    return torch.cat([parts[n % ranks][n] for n in range(len(slices))])[torch.tensor(order).argsort()]


def predict(classifier: Classifier, texts: list[str], config: TrainConfig) -> Tensor:
    """Class probabilities [N, K], float32 on the CPU. Raises FloatingPointError on logits that are not finite."""
    return check_finite(forward_all(classifier, texts, config, classifier.logits).softmax(-1))


def check_finite(probs: Tensor) -> Tensor:
    if wrong := (~probs.isfinite().all(-1)).nonzero().flatten().tolist():
        which = f"{len(wrong)} of {len(probs)} samples are not finite, the first is sample {wrong[0]}"
        raise FloatingPointError(f"logits of {which}; try a lower --lr")
    return probs


def soft_labels(rows: list[dict], n_classes: int) -> Tensor:
    """[N, K] from rows that hold probs or a class label. Raises InputError on anything else."""
    table = []
    for r in rows:
        label, probs = r.get("label"), r.get("probs")
        if probs is None and isinstance(label, int) and 0 <= label < n_classes:
            probs = [float(k == label) for k in range(n_classes)]
        if probs is None:
            raise InputError(f"sample {r.get('id')!r}: label {label!r} is not a class from 0 to {n_classes - 1}")
        numbers = isinstance(probs, list) and all(isinstance(x, int | float) and x >= 0 for x in probs)
        if not numbers or len(probs) != n_classes or abs(sum(probs) - 1) > 1e-3:
            raise InputError(f"sample {r.get('id')!r}: probs {probs!r} are not {n_classes} probabilities")
        table.append(probs)
    return torch.tensor(table, dtype=torch.float32).view(-1, n_classes)


# ---- command line ----


@dataclasses.dataclass(frozen=True)
class Args(TrainConfig):
    model: str = flag("smollm2-135m:6", "hub id, folder or built-in model; `:N` keeps the first N blocks")
    train: str = flag("", "JSON lines with id, text and label or probs")
    test: str = flag("", "JSON lines with id, text and, to be scored, label")
    out: str = flag("", "folder to write; must not exist")
    keep_model: bool = flag(False, "save the trained model as an ordinary Hugging Face folder too", bool)


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "train.py", __doc__)
    out = Path(args.out)
    for name in ("train", "test"):
        if not Path(getattr(args, name)).is_file():
            raise InputError(f"--{name} {getattr(args, name)!r}: no such file")
    if check_out(args.out).exists() and {p.name for p in out.iterdir()} != {"steps.jsonl"}:
        raise InputError(f"--out {args.out!r}: name a folder that does not exist yet")
    resolve(args.kernels)
    refuse_shared_gpus("start one process per GPU")
    config = picked(TrainConfig, args)
    train, test = (read_samples(Path(path), "text") for path in (args.train, args.test))
    n_classes = max([2, *(len(r["probs"]) for r in train if isinstance(r.get("probs"), list))])
    labels = soft_labels(train, n_classes)
    soft_labels([{"id": r["id"], "label": r["label"]} for r in test if "label" in r], n_classes)
    if n_classes != 2 and args.loss == "logconf":
        raise InputError(f"--train {args.train}: {n_classes} classes; --loss logconf takes 2 classes")
    if (labels == labels[0]).all() and labels[0].max() == 1 and len(labels) > 1:
        raise InputError(f"--train {args.train}: all {len(labels)} rows have the same label, there is nothing to learn")
    spec, dtype = ModelSpec.parse(args.model), resolve_dtype(args.dtype)
    classifier = Classifier(spec, n_classes, dtype, args.kernels, world(), args.lora_rank, args.lora_alpha)
    print0(f"{args.model} in {classifier.dtype}, kernels: {classifier.kernels}")
    cost = finetune(classifier, [r["text"] for r in train], labels, config, out / "steps.jsonl")
    probs = predict(classifier, [r["text"] for r in test], config)
    if args.keep_model:
        save_model(classifier, out / "model", config, Path(args.train).name)
    if world().rank == 0:
        write_jsonl(out / "predictions.jsonl", prediction_rows(test, probs))
    scored = [int(p.argmax()) == r["label"] for r, p in zip(test, probs, strict=True) if "label" in r]
    accuracy = f", accuracy {sum(scored) / len(scored):.4f} on {len(scored)}" if scored else ""
    print0(f"{cost['steps']} steps, {cost['train_tokens']} tokens{accuracy}; wrote {out}/predictions.jsonl")


def prediction_rows(rows: list[dict], probs: Tensor) -> list[dict]:
    return [{"id": r["id"], "probs": [round(x, 7) for x in p.tolist()]} for r, p in zip(rows, probs, strict=True)]


if __name__ == "__main__":
    run_script(main)
