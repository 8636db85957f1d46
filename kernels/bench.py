"""The kernel benchmark, and whole finetuning steps against the loop of OpenAI's weak-to-strong code.

    python -m kernels.bench --csv bench.csv                                    every row that this machine can run
    python -m kernels.bench --rows S --samples train.jsonl --model smollm2-135m   steps on the texts of a file

T1 to T4: tail, loss and their gradients, B samples of K = 2 classes; T1 to T3 read padded hidden states [B, T, D], T4 packed
ones, with the final norm. T5: loss and gradient of E heads at once. S: whole steps of train.py's packed loop and of the
other loop (minibatches padded to their longest sample, logits stacked, one loss, one backward), same model and batches, in turns.
Every provider but openai hands back the gradient of the B rows alone; openai that of all of `hidden`, as its loop does.

Columns: median, 20th and 80th percentile of the wall time with a synchronised GPU; GPU time from a flushed L2 cache (cold);
peak memory above the inputs (S: of the process, and above what it holds between steps); kernel launches; worst relative error
of loss and weight gradients, and of dh, against float64 (S: largest difference of a step's loss); time to move the bytes
once at the measured copy bandwidth (floor), and how many floors the median took.
"""

import contextlib
import csv
import ctypes
import dataclasses
import importlib.util
import io
import itertools
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

import train
from common import (
    InputError,
    ModelSpec,
    device,
    flag,
    load_model,
    parse_dataclass,
    print0,
    provenance,
    read_samples,
    resolve_dtype,
    run_script,
    write_text,
)
from kernels import conf_loss, tail

DEVICE = device()
GPU = DEVICE.type == "cuda"
EPS = 1e-6
CONFIG = train.TrainConfig()  # of the losses
SHARE = 0.5  # of the run: the confidence loss after its warm-up
COLUMNS = (
    "row", "shape", "loss", "provider", "p50_ms", "p20_ms", "p80_ms", "cold_ms", "tokens_per_s", "peak_mb", "above_mb",
    "launches", "error", "error_dh", "floor_ms", "floors", "note",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    rows: tuple = flag(("T1", "T2", "T3", "T4", "T5", "S"), "which to run", choices=("T1", "T2", "T3", "T4", "T5", "S"))
    csv: str = flag("", "file to write the rows to")
    model: str = flag("smollm2-135m", "of the S rows: hub id, folder or built-in model; `:N` keeps the first N blocks")
    samples: str = flag("", "JSON lines with text for the S rows; default: 16 to 28, and 100 to 500, common words")
    steps: int = flag(4, "S rows: steps a round; the first is not counted", int)
    rounds: int = flag(2, "S rows: rounds, in each of which every provider has its turn on the same batches", int)


# ---- T: tail and loss ----


@dataclasses.dataclass
class Case:
    """Inputs of one T row; `hidden` is [B, T, D] or [N, D], `flat` the same as [N, D]; T5 has `logits` alone."""

    row: str
    shape: str
    loss: str
    labels: Tensor  # [E, B, K]
    hidden: Tensor | None = None
    rows: Tensor | None = None
    norm_w: Tensor | None = None
    head_w: Tensor | None = None
    logits: Tensor | None = None
    n_bytes: int = 0  # moved once: inputs read, gradients written

    @property
    def flat(self) -> Tensor:
        return self.hidden.flatten(0, -2)


def cases(names: tuple) -> list[Callable[[], Case]]:
    """Constructors, so that one case at a time holds memory. A CPU gets small shapes."""
    D, T = (5120, 540) if GPU else (576, 32)
    batches = {"T1": 32, "T2": 256, "T3": 4096} if GPU else {"T1": 32}
    made = []
    for loss in conf_loss.MODES:
        made += [(row, tail_case, (row, B, T, D, loss, False)) for row, B in batches.items()]
        made.append(("T4", tail_case, ("T4", 32, T, D, loss, True)))
        sizes = [(E, B) for E in (1, 64, 1024) for B in (32, 4096)] if GPU else [(1, 32), (64, 32)]
        made += [("T5", heads_case, (E, B, loss)) for E, B in sizes]
    return [(lambda make=make, a=a: make(*a)) for row, make, a in made if row in names]


def tail_case(row: str, B: int, T: int, D: int, loss: str, packed: bool) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if GPU else torch.float32
    hidden = torch.randn(*((B * T,) if packed else (B, T)), D, generator=g, device=DEVICE, dtype=dtype)
    lengths = torch.randint(T // 2, T + 1, (B,), generator=g, device=DEVICE)
    return Case(
        row, f"B={B} {'N' if packed else 'T'}={B * T if packed else T} D={D} {str(dtype)[6:]}{' norm' if packed else ''}", loss,
        torch.randn(1, B, 2, generator=g, device=DEVICE).softmax(-1), hidden,
        (torch.arange(B, device=DEVICE) * T + lengths - 1).int(),
        torch.rand(D, generator=g, device=DEVICE) if packed else None,
        torch.randn(2, D, generator=g, device=DEVICE) / D**0.5,
        n_bytes=3 * B * D * hidden.element_size() + (3 * 2 + 3 * packed) * D * 4,
    )  # fmt: skip


def heads_case(E: int, B: int, loss: str) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    logits, labels = (3 * torch.randn(E, B, 2, generator=g, device=DEVICE) for _ in range(2))
    return Case("T5", f"E={E} B={B}", loss, labels.softmax(-1), logits=logits, n_bytes=3 * 4 * logits.numel())


def batch_loss(case: Case, z: Tensor, y: Tensor) -> Tensor:
    return train.LOSSES[case.loss](z, y, SHARE, CONFIG)


def heads_loss(case: Case, z: Tensor) -> Tensor:
    target = {
        "xent": lambda: case.labels,
        "product": lambda: conf_loss.product_target(z, case.labels, CONFIG.alpha, CONFIG.beta),
        "logconf": lambda: conf_loss.logconf_target(z, case.labels, CONFIG.aux_coef),
    }[case.loss]()
    return conf_loss.cross_entropy(z, target)


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors if t is not None]


def eager(case: Case, forward: Callable | None = None) -> tuple[Tensor, ...]:
    """Loss and gradients with PyTorch's own operations: (loss, dh, dW[, dw]) or, of heads, (loss, dz)."""
    if case.logits is not None:
        (z,) = leaves(case.logits)
        loss = (forward or heads_loss)(case, z)
        return loss, *torch.autograd.grad(loss.sum(), z)
    inputs = leaves(case.flat[case.rows.long()], case.head_w, case.norm_w)
    loss = (forward or tail_loss)(case, *inputs)
    return loss, *torch.autograd.grad(loss, inputs)


def tail_loss(case: Case, h: Tensor, head_w: Tensor, norm_w: Tensor | None = None) -> Tensor:
    return batch_loss(case, tail.reference(h, None, norm_w, EPS, head_w), case.labels[0].to(head_w.dtype))


def loop(case: Case) -> tuple[Tensor, ...]:
    """T5 as one head after the other."""
    done = []
    for z, y in zip(case.logits, case.labels, strict=True):
        (z,) = leaves(z)
        loss = batch_loss(case, z, y)
        done.append((loss, *torch.autograd.grad(loss, z)))
    return tuple(map(torch.stack, zip(*done, strict=True)))


def openai(case: Case) -> tuple[Tensor, ...]:
    """Last tokens picked sample by sample with lengths that lie on the device, gradient of all of `hidden`."""
    B, T, _ = case.hidden.shape
    lengths = case.rows - torch.arange(B, device=DEVICE) * T
    hidden, head_w = leaves(case.hidden, case.head_w)
    last = torch.stack([hidden[i, lengths[i]] for i in range(B)])
    loss = batch_loss(case, torch.nn.functional.linear(last.float(), head_w), case.labels[0])
    return loss, *torch.autograd.grad(loss, (hidden, head_w))


def compiled(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    torch.compiler.reset()
    forward = torch.compile(heads_loss if case.logits is not None else tail_loss, dynamic=False)
    return lambda: eager(case, forward)


def ours(case: Case) -> tuple[Tensor, ...]:
    """Three launches: tail, loss with its gradient, tail's gradient; of heads one."""
    c, loss = CONFIG.aux_coef, conf_loss.conf_loss
    if case.logits is not None:
        return loss(case.logits, case.labels, case.loss, c, CONFIG.alpha, CONFIG.beta, "triton")[:2]
    z, rstd = tail.forward(case.flat, case.rows, case.norm_w, EPS, case.head_w)
    value, g, _ = loss(z[None], case.labels, case.loss, c, CONFIG.alpha, CONFIG.beta, "triton")
    dh, d_head, d_norm = tail.backward(case.flat, case.rows, case.norm_w, case.head_w, z, rstd, g[0])
    return value[0], dh, d_head, *([] if d_norm is None else [d_norm])


def captured(step: Callable[[], tuple]) -> Callable[[], tuple]:
    """The same step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return lambda: graph.replay() or outputs


def providers(case: Case) -> dict[str, Callable[[], Callable[[], tuple]]]:
    """Name -> constructor of the step. Those after `openai` need a GPU."""
    made = {"eager": lambda: lambda: eager(case)}
    heads, B = case.logits is not None, case.labels.shape[1]
    if heads and len(case.labels) <= 64:
        made["eager loop"] = lambda: lambda: loop(case)
    if not heads and case.row != "T4" and B <= 256:
        made["openai"] = lambda: lambda: openai(case)
    if GPU:
        made |= {
            "compile": lambda: compiled(case),
            "compile + graph": lambda: captured(compiled(case)),
            "ours": lambda: lambda: ours(case),
            "ours + graph": lambda: captured(lambda: ours(case)),
        }
    return made


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def errors(case: Case, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Worst relative error of loss and weight gradients, and that of dh (of heads: dz), against float64."""
    wide = dataclasses.replace(
        case,
        hidden=None if case.hidden is None else case.flat[case.rows.long()].double(),
        rows=None if case.rows is None else torch.arange(len(case.rows), device=DEVICE),
        **{n: None if getattr(case, n) is None else getattr(case, n).double() for n in ("norm_w", "head_w", "logits", "labels")},
    )  # fmt: skip
    want = eager(wide)
    loss, dh, *weights = outputs
    if dh.shape != want[1].shape:
        dh = dh.flatten(0, -2)[case.rows.long()]
    pairs = zip((loss, *weights), (want[0], *want[2:]), strict=True)
    return max(relative_error(a, b) for a, b in pairs), relative_error(dh, want[1])


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def wall_ms(step: Callable, seconds: float) -> list[float]:
    """Milliseconds of at least 5 calls after 3 unmeasured ones, for about `seconds`."""
    for _ in range(3):
        step()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def cold_ms(step: Callable) -> float:
    """Median GPU time with the L2 cache overwritten before every call."""
    flush, times = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE), []
    for _ in range(30):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def launches(step: Callable) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronise()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{p}_ms": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 20, 80)}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy, measured here."""
    source = torch.empty((1 << 30) if GPU else (1 << 26), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(wall_ms(lambda: target.copy_(source), 0.5)) / 1e3)


def tail_rows(args: Args, seconds: float = 0.5):
    """One row a T case and provider."""
    bandwidth = copy_bandwidth()
    print0(f"copy: {bandwidth / 1e9:.0f} GB/s read and written")
    for make in cases(args.rows):
        case = make()
        floor = 1e3 * case.n_bytes / bandwidth
        for name, build in providers(case).items():
            step = build()
            row = dict.fromkeys(COLUMNS) | {"row": case.row, "shape": case.shape, "loss": case.loss, "provider": name}
            row |= spread(wall_ms(step, seconds))
            row["error"], row["error_dh"] = errors(case, step())
            if GPU:
                synchronise()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                row["above_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                row["cold_ms"], row["launches"] = cold_ms(step), launches(step)
            yield row | {"floor_ms": floor, "floors": row["p50_ms"] / floor}


# ---- S: whole steps ----


def common_words(low: int, high: int, n: int) -> list[str]:
    words, r = (
        "the a of to in is it that for was on are as with his they at be this from have or by one".split(),
        random.Random(0),
    )
    return [" ".join(r.choices(words, k=r.randint(low, high))) for _ in range(n)]


class OpenAILoop:
    """The other loop: plain model, minibatches padded to their longest sample, all logits of a batch stacked, one backward."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, minibatch: int):
        self.model = load_model(spec, AutoModelForSequenceClassification, dtype, num_labels=2).to(DEVICE).eval()
        self.pretrained = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.minibatch = minibatch

    def finetune(self, samples: list[list[int]], labels: Tensor, config: train.TrainConfig) -> list[dict]:
        """As train.finetune from a zero head; one row a step."""
        self.model.load_state_dict(self.pretrained)
        torch.nn.init.zeros_(self.model.score.weight)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        schedule, log, n_tokens = list(train.batches(len(samples), config)), [], 0
        for step, batch in enumerate(schedule):
            optimizer.param_groups[0]["lr"] = train.lr_at(step, len(schedule), config.lr)
            logits = []
            for i in range(0, len(batch), self.minibatch):
                chosen = [torch.tensor(samples[j]) for j in batch[i : i + self.minibatch]]
                ids = pad_sequence(chosen, batch_first=True).to(DEVICE)
                hidden = self.model.base_model(input_ids=ids, use_cache=False)[
                    0
                ]  # causal: padding behind changes nothing
                logits += [self.model.score(hidden[j, len(s) - 1]) for j, s in enumerate(chosen)]
            y = labels[batch].to(DEVICE)
            loss = train.LOSSES[config.loss](torch.stack(logits).float(), y, step / len(schedule), config)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            n_tokens += sum(len(samples[j]) for j in batch)
            log.append({"loss": loss.item(), "tokens": n_tokens, "seconds": time.time()})
        return log


class OurLoop:
    def __init__(self, spec: ModelSpec, dtype: torch.dtype, kernels: str):
        self.classifier = train.Classifier(spec, 2, dtype, kernels)

    def finetune(self, texts: list[str], labels: Tensor, config: train.TrainConfig) -> list[dict]:
        """train.finetune, with a clock that waits for the GPU at the end of every step, as the other loop does."""
        optimizer, ends = self.classifier.optimizer, []

        def timed_step(lr: float) -> None:
            type(optimizer).step(optimizer, lr)
            synchronise()
            ends.append(time.time())

        optimizer.step = timed_step
        log = train.finetune(self.classifier, texts, labels, config)["log"]
        del optimizer.step
        return [row | {"seconds": end} for row, end in zip(log, ends, strict=True)]


def build(provider: str, spec: ModelSpec) -> OpenAILoop | OurLoop:
    dtype = resolve_dtype("auto")
    if provider.startswith("openai"):
        return OpenAILoop(spec, dtype, int(provider.split()[1]))
    return OurLoop(spec, dtype, "triton" if provider == "ours" and GPU else "reference")


def peak_mb(provider: str, spec: ModelSpec, rounds: list[tuple]) -> tuple[float, float]:
    """In a process of its own: peak memory of a round after a first one, and that above what is held between them."""
    loop = build(provider, spec)
    loop.finetune(*rounds[0])
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loop.finetune(*rounds[-1])
        peak = torch.cuda.max_memory_allocated()
        return peak / 2**20, (peak - before) / 2**20

    def resident(what: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**10

    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # give freed pages back, so that the level between steps is what is held
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    loop.finetune(*rounds[-1])
    peak = resident("VmHWM")
    return peak, peak - before


def step_rows(args: Args):
    """One row a text source and provider; every round gives each provider the same batches."""
    spec = ModelSpec.parse(args.model)
    config = train.TrainConfig(loss="logconf", epochs=1)
    n = config.batch_size * args.steps
    if args.samples:
        texts = [r["text"] for r in read_samples(Path(args.samples), "text")]
        if len(texts) < n * args.rounds:
            raise InputError(
                f"--samples {args.samples!r}: {len(texts)} rows, {n * args.rounds} are needed; lower --steps or --rounds"
            )
        sources = {Path(args.samples).stem: texts}
    else:
        sources = {
            f"{low}-{high} words": common_words(low, high, n * args.rounds) for low, high in ((16, 28), (100, 500))
        }
    names = ["ours", *(["ours, kernels off"] if GPU else []), "openai 1", f"openai {config.batch_size}"]
    loops = {name: build(name, spec) for name in names}
    encode = loops["ours"].classifier.encode
    labels = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.cat([labels, 1 - labels], 1)
    for source, texts in sources.items():
        chunks = [texts[i : i + n] for i in range(0, n * args.rounds, n)]
        inputs = {
            name: [(encode(c, config.max_tokens)[0] if "openai" in name else c, labels, config) for c in chunks]
            for name in names
        }
        logs: dict[str, list] = {name: [] for name in names}
        for i in range(args.rounds):
            for name in names if i % 2 == 0 else names[::-1]:
                logs[name].append(loops[name].finetune(*inputs[name][i]))
        tokens = sum(len(s) for s in encode(texts, config.max_tokens)[0]) / len(texts)
        for name in names:
            steps = [
                (b["seconds"] - a["seconds"], b["tokens"] - a["tokens"])
                for log in logs[name]
                for a, b in itertools.pairwise(log)
            ]
            off = max(
                abs(a["loss"] - b["loss"])
                for x, y in zip(logs[name], logs["ours"], strict=True)
                for a, b in zip(x, y, strict=True)
            )
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peak, above = pool.submit(peak_mb, name, spec, inputs[name]).result()
            yield dict.fromkeys(COLUMNS) | {
                "row": "S", "shape": f"{args.model} {source}, {tokens:.0f} tokens a sample", "loss": config.loss, "provider": name,
                **spread([1e3 * seconds for seconds, _ in steps]),
                "tokens_per_s": sum(t for _, t in steps) / sum(s for s, _ in steps),
                "peak_mb": peak, "above_mb": above, "error": off,
            }  # fmt: skip


# ---- the table ----


def absent(args: Args):
    """What is not measured here, as rows with a note."""
    for name, module in (("Liger", "liger_kernel"), ("CCE", "cut_cross_entropy")):
        state = "installed" if importlib.util.find_spec(module) else "not installed"
        yield (
            f"{name} ({state})",
            "T",
            "not applicable: rows of a large vocabulary and hard labels, no soft labels of 2 classes, no quantile",
        )
    if not GPU:
        yield (
            "compile, ours, each + graph",
            "T",
            "needs a GPU, and so do T2, T3 and the full sizes of T1, T4, T5; S runs the reference kernels",
        )


def shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "kernels.bench", __doc__)
    for name in ("steps", "rounds"):
        if getattr(args, name) < (2 if name == "steps" else 1):
            raise InputError(f"--{name} {getattr(args, name)}: at least {2 if name == 'steps' else 1}")
    here = provenance()
    here = {"device": here["device"], "commit": here["commit"]} | {
        k: here["versions"][k] for k in ("torch", "triton", "transformers")
    }
    print0(", ".join(f"{k} {v}" for k, v in here.items()))
    wanted = ("row", "shape", "loss", "provider")
    rows = []
    runs = [tail_rows(args)] if any(r.startswith("T") for r in args.rows) else []
    runs += [step_rows(args)] if "S" in args.rows else []
    for row in (r for run in runs for r in run):
        rows.append(row)
        print0(
            " | ".join(
                [*(str(row[c]) for c in wanted), *(f"{c} {shown(row[c])}" for c in COLUMNS[4:] if row[c] is not None)]
            )
        )
    for provider, row, note in absent(args):
        rows.append(dict.fromkeys(COLUMNS) | {"row": row, "provider": provider, "note": note})
        print0(f"{row} | {provider} | {note}")
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, [*COLUMNS, *here], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: shown(v) for k, v in (row | here).items()} for row in rows)
        write_text(Path(args.csv), text.getvalue())
        print0(f"wrote {args.csv}")


if __name__ == "__main__":
    run_script(main)
