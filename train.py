"""One finetuning run: samples with soft labels in, class probabilities out.

    python train.py --model smollm2-135m:6 --train train.jsonl --test test.jsonl --out run     (any CPU)
    python train.py --model Qwen/Qwen2.5-0.5B --train weak.jsonl --test test.jsonl --loss logconf --out run

Rows of --train hold id, text and either label (a class) or probs (a soft label, [K]); rows of --test hold id, text and,
to be scored, label. Written to --out: predictions.jsonl (id, probs) and steps.jsonl (step, loss, lr, tokens).

Every batch is one padding-free forward: its samples are laid end to end, attention stays inside each sample, and only
the last token of each sample reaches the head. Shapes: B batch, T tokens of the batch, D width, K classes.
"""

import dataclasses
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers  # its parts are imported when they are used: a plan needs none of them
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common import (
    InputError,
    ModelSpec,
    check_out,
    device,
    flag,
    gather,
    load_model,
    load_tokenizer,
    parse_dataclass,
    print0,
    process_group,
    rank,
    read_samples,
    resolve_dtype,
    run_script,
    stable_hash,
    world_size,
    write_jsonl,
    write_text,
)
from kernels import CHOICES, resolve
from kernels.conf_loss import MODES, conf_loss, cross_entropy, logconf_target, product_target
from kernels.tail import tail

# name -> loss of (logits [B, K], soft labels [B, K], share of the run done, TrainConfig)
LOSSES: dict[str, Callable[..., Tensor]] = {
    "xent": lambda z, y, step_frac, c: xent_loss(z, y),
    "product": lambda z, y, step_frac, c: product_loss(z, y, c.alpha, c.beta),
    "logconf": lambda z, y, step_frac, c: logconf_loss(z, y, step_frac, c.aux_coef, c.warmup_frac, c.ramp),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    loss: str = flag("xent", "what the soft labels are trained with", choices=tuple(LOSSES))
    lr: float = flag(1e-5, "peak learning rate; cosine to zero, no warm-up", float)
    epochs: int = flag(2, "passes over the training samples", int)
    batch_size: int = flag(32, "samples an optimizer step", int)
    seed: int = flag(0, "order of the samples", int)
    max_tokens: int = flag(2048, "longest input; a longer one loses the end of its transcript, and is counted", int)
    dtype: str = flag("auto", "of the forward and backward pass; master weights are float32", choices=("auto", "float32", "bfloat16"))  # fmt: skip
    kernels: str = flag(
        "auto", "head, loss and its gradient: Triton (auto: on a GPU), or plain PyTorch", choices=CHOICES
    )
    micro_tokens: int = flag(32768, "most tokens in one forward; does not change the result", int)
    checkpointing: bool = flag(False, "recompute activations block by block to save memory", bool)
    compile: bool = flag(False, "torch.compile every block; pays on a GPU", bool)
    head_init: str = flag("zero", "start of the head: zeros, or LM-head rows of the two answer words", choices=("zero", "verbalizer"))  # fmt: skip
    alpha: float = flag(1.0, "product loss: exponent of the labels", float)
    beta: float = flag(1.0, "product loss: exponent of the model's own probabilities", float)
    aux_coef: float = flag(0.5, "logconf loss: weight of the model's own hardened predictions", float)
    warmup_frac: float = flag(0.1, "logconf loss: share of the steps over which that weight ramps up", float)
    ramp: str = flag("openai", "logconf loss: multiply by the step fraction and jump, or rise linearly", choices=("openai", "linear"))  # fmt: skip


# ---- losses: logits [B, K] and soft labels [B, K] in, scalar out; with E heads at once [E, B, K] in, [E] out ----


def xent_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of soft labels: mean_b -sum_k y_bk log softmax(z_b)_k."""
    return cross_entropy(logits, labels)


def product_loss(logits: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Cross-entropy to the target p^beta y^alpha, renormalised over K and detached (OpenAI weak-to-strong code)."""
    return cross_entropy(logits, product_target(logits, labels, alpha, beta))


def logconf_loss(
    logits: Tensor,
    labels: Tensor,
    step_frac: float,
    aux_coef: float = 0.5,
    warmup_frac: float = 0.1,
    ramp: str = "openai",
) -> Tensor:
    """Auxiliary confidence loss for K = 2 (Burns et al. 2312.09390, section 4.3.2; OpenAI weak-to-strong code).

    Target (1 - c) y + c h, with h the prediction hardened at the threshold that keeps the classes as frequent as in the
    labels: the quantile of p[:, 0] over the whole batch at q = mean y[:, 1]. `step_frac` is the share of the run done.
    Raises ValueError for K other than 2.
    """
    if logits.shape[-1] != 2:
        raise ValueError(f"logconf_loss needs two classes, got K={logits.shape[-1]}")
    return cross_entropy(logits, logconf_target(logits, labels, aux_weight(step_frac, aux_coef, warmup_frac, ramp)))


def aux_weight(step_frac: float, aux_coef: float, warmup_frac: float, ramp: str) -> float:
    """c of the confidence loss at this share of the run: aux_coef after the warm-up, less before."""
    if step_frac > warmup_frac or (ramp == "linear" and warmup_frac == 0):
        return aux_coef
    return aux_coef * (step_frac if ramp == "openai" else step_frac / warmup_frac)


def loss_and_gradient(logits: Tensor, labels: Tensor, step_frac: float, config: TrainConfig, kernels: str):
    """The loss [...] and its gradient at the logits [..., B, K]: of one kernel launch, or of LOSSES by autograd.

    A loss of LOSSES that has no kernel is computed without one.
    """
    if kernels == "triton" and config.loss in MODES:
        c = aux_weight(step_frac, config.aux_coef, config.warmup_frac, config.ramp)
        heads = (x.reshape(-1, *x.shape[-2:]) for x in (logits, labels))
        loss, gradient, _ = conf_loss(*heads, config.loss, c, config.alpha, config.beta, kernels)
        return loss.view(logits.shape[:-2]), gradient.view_as(logits)
    z = logits.detach().requires_grad_()
    loss = LOSSES[config.loss](z, labels, step_frac, config)
    return loss.detach(), *torch.autograd.grad(loss.sum(), z)


def check_kernel(config: TrainConfig, kernels: str, dev: torch.device) -> None:
    """Raises InputError where the kernel computes another loss than LOSSES does, as after an edit of the latter."""
    z, y = (torch.randn(32, 2, generator=torch.Generator().manual_seed(i)).to(dev) for i in (0, 1))
    found, wanted = (loss_and_gradient(z, y.softmax(-1), 1.0, config, k)[0].item() for k in (kernels, "reference"))
    if abs(found - wanted) > 1e-4 * (1 + abs(wanted)):
        raise InputError(
            f"loss {config.loss!r}: the kernel gives {found}, train.py {wanted}; choose --kernels reference"
        )


# ---- the packed forward ----


@dataclasses.dataclass(frozen=True)
class Pack:
    """Where the samples of a packed batch lie: B sample lengths, their running sum, and each token's padded slot."""

    lengths: list[int]
    cu_seqlens: Tensor  # [B + 1] int32
    slots: Tensor  # [T] index into [B * longest]

    @property
    def longest(self) -> int:
        return max(self.lengths)


def pack(samples: list[list[int]], dev: torch.device) -> tuple[Tensor, Tensor, Pack]:
    """Token ids [1, T], positions [1, T] that restart with every sample, and the Pack."""
    lengths = [len(s) for s in samples]
    positions = torch.cat([torch.arange(n) for n in lengths])
    row = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    ids = torch.tensor([t for s in samples for t in s])
    where = Pack(lengths, to_device(cu, dev), to_device(row * max(lengths) + positions, dev))
    return to_device(ids[None], dev), to_device(positions[None], dev), where


def packed_attention(module, query, key, value, attention_mask, scaling=None, pack: Pack = None, **_):
    """Causal attention inside each sample of a packed batch: key, value [1, H_kv, T, d] -> [1, T, H, d].

    query [1, H, T, d], or [1, H, B, d] for the last token of each sample: then -> [1, B, H, d].
    """
    B, L = len(pack.lengths), pack.longest
    whole = query.shape[2] == key.shape[2]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        cu = pack.cu_seqlens if whole else torch.arange(B + 1, dtype=torch.int32, device=q.device)
        out = varlen_attn(
            q, k, v, cu, pack.cu_seqlens, L if whole else 1, L,
            scale=scaling, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[None], None

    def padded(x: Tensor) -> Tensor:  # [1, H, T, d] -> [B, H, L, d]
        H, d = x.shape[1], x.shape[3]
        return x.new_zeros(B * L, H, d).index_copy(0, pack.slots, x[0].transpose(0, 1)).view(B, L, H, d).transpose(1, 2)

    q = padded(query) if whole else query.permute(2, 1, 0, 3)  # [B, H, L or 1, d]
    mask = None if whole else (torch.arange(L, device=q.device) < pack.cu_seqlens.diff()[:, None])[:, None, None]
    with sdpa_kernel(SDPBackend.MATH):  # on short samples several times faster than the CPU's flash backward
        out = F.scaled_dot_product_attention(
            q, padded(key), padded(value), mask, is_causal=whole, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    if not whole:
        return out.permute(2, 0, 1, 3), None
    return out.transpose(1, 2).reshape(B * L, *out.shape[1::2])[pack.slots][None], None


def last_block(layer, hidden, position_embeddings, pack: Pack, **_):
    """The last block of a Llama or Qwen, [1, T, D] -> [1, B, D]: nothing but the last token of each sample leaves it.

    Keys and values are those of all tokens; queries, output projection and MLP are computed for B rows only.
    """
    attention, last = layer.self_attn, pack.cu_seqlens[1:].long() - 1

    def heads(x: Tensor, norm: str, rows=slice(None)) -> Tensor:  # [1, T, H * d] -> [1, H, T, d], normed and rotated
        x = getattr(attention, norm, torch.nn.Identity())(x.unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
        cos, sin = (e[:, None, rows] for e in position_embeddings)
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    normed = layer.input_layernorm(hidden)
    q = heads(attention.q_proj(normed[:, last]), "q_norm", last)
    k = heads(attention.k_proj(normed), "k_norm")
    v = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    out, _ = transformers.AttentionInterface()["packed"](attention, q, k, v, None, attention.scaling, pack)
    hidden = hidden[:, last] + attention.o_proj(out.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class Classifier:
    """A Hugging Face decoder with a bias-free head on the last token; `reset` brings back the pretrained weights."""

    def __init__(
        self, spec: ModelSpec, n_classes: int, dtype: torch.dtype, kernels: str = "auto", sharded: bool = False
    ):
        self.kernels, self.sharded = resolve(kernels), sharded and world_size() > 1
        self.tokenizer = load_tokenizer(spec)
        eager = torch.compiler.disable(packed_attention)  # lengths differ: every batch would compile a graph of its own
        transformers.AttentionInterface.register("packed", eager)
        auto_class = transformers.AutoModelForSequenceClassification
        self.model = load_model(spec, auto_class, torch.float32, num_labels=n_classes, attn_implementation="packed")
        if not hasattr(self.model, "score"):
            raise InputError(f"model {spec.name!r}: a {self.model.config.model_type} is no decoder-only language model")
        for name in vars(self.model.config):
            if name.endswith(("dropout", "pdrop")):
                setattr(self.model.config, name, 0.0)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.model.config.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        n_blocks = self.model.config.num_hidden_layers
        self.blocks = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_blocks)
        self.prunes = self.model.config.model_type in ("llama", "qwen2", "qwen3")
        if self.prunes:
            self.blocks[-1].forward = functools.partial(last_block, self.blocks[-1])
        self.spec, self.dtype = spec, dtype
        if self.sharded:
            self.shard()
        self.pretrained = [local(p).to("cpu", copy=True) for p in self.model.base_model.parameters()]
        if not self.sharded:
            self.model.to(dtype=dtype)
            self.model.score.float()
        self.model.to(device())

    def shard(self) -> None:
        """Spread float32 weights, gradients and moments over the ranks of the group (FSDP2); a block is whole while it computes."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = DeviceMesh.from_group(process_group() or torch.distributed.group.WORLD, device().type)
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        for module in (*self.blocks, self.model.base_model):  # the head stays whole on every rank
            fully_shard(module, mesh=mesh, mp_policy=policy)

    def reset(self, config: TrainConfig) -> None:
        if config.checkpointing != self.model.is_activation_checkpointing:
            toggle = "enable" if config.checkpointing else "disable"
            getattr(self.model, f"activation_checkpointing_{toggle}")()
        self.model.train(config.checkpointing)  # transformers checkpoints in training mode only; dropout is zero anyway
        for block in self.blocks:
            if config.compile and not block._compiled_call_impl:
                block.compile()
        if self.sharded:
            self.model.base_model.reshard()  # a prediction leaves the root's weights gathered, and they would stay the old ones
        self.optimizer.reset([*self.pretrained, initial_head(self, config.head_init)])

    @functools.cached_property
    def optimizer(self) -> "MasterAdam":
        return MasterAdam([*self.model.base_model.parameters(), self.model.score.weight])

    def hidden(self, samples: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Hidden states after the final norm, of one packed forward, and which rows of them are last tokens (None: all)."""
        ids, positions, where = pack(samples, self.model.device)
        hidden = self.model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, pack=where
        ).last_hidden_state[0]
        rows = None if self.prunes else where.cu_seqlens[1:] - 1
        return hidden, rows

    def features(self, samples: list[list[int]]) -> Tensor:
        """What the head reads, float32 [B, D]."""
        hidden, rows = self.hidden(samples)
        return (hidden if rows is None else hidden[rows.long()]).float()

    def logits(self, samples: list[list[int]]) -> Tensor:
        """Float32 class logits [B, K]."""
        hidden, rows = self.hidden(samples)
        return tail(hidden, rows, None, 0.0, self.model.score.weight, self.kernels)

    def encode(self, texts: list[str], max_tokens: int) -> tuple[list[list[int]], int]:
        """Token ids of each text, and how many texts were cut to `max_tokens`."""
        ids = self.tokenizer(texts, add_special_tokens=True)["input_ids"]
        if not all(ids):
            raise ValueError(f"text {ids.index([])} has no token for the head to read: {texts[ids.index([])]!r}")
        return [i[:max_tokens] for i in ids], sum(len(i) > max_tokens for i in ids)


def initial_head(classifier: Classifier, how: str) -> Tensor:
    """Head weights [K, D] at the start of a run: zeros, or the LM head's rows for the words " no" and " yes"."""
    weight = classifier.model.score.weight
    if how == "zero":
        return torch.zeros_like(weight)
    lm_head = (
        load_model(classifier.spec, transformers.AutoModelForCausalLM, torch.float32).get_output_embeddings().weight
    )
    words = [classifier.tokenizer(w, add_special_tokens=False)["input_ids"][-1] for w in (" no", " yes")]
    return lm_head[words].to(weight)


def micro_batches(indices: list[int], lengths: list[int], micro_tokens: int) -> list[list[int]]:
    """The indices in turn, cut where a micro-batch would exceed `micro_tokens`; at least one sample each."""
    out: list[list[int]] = []
    for i in indices:
        if not out or sum(lengths[j] for j in out[-1]) + lengths[i] > micro_tokens:
            out.append([])
        out[-1].append(i)
    return out


def shares(lengths: list[int], micro_tokens: int, n_ranks: int) -> list[list[list[int]]]:
    """Micro-batches of every rank, equally many each: the longest sample goes to the rank with the fewest tokens, and so on."""
    ranks: list[list[int]] = [[] for _ in range(n_ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(ranks, key=lambda r: sum(lengths[j] for j in r)).append(i)
    split = [micro_batches(sorted(r), lengths, micro_tokens) for r in ranks]
    return [s + [[]] * (max(map(len, split)) - len(s)) for s in split]


# ---- the loop ----


class MasterAdam:
    """Adam on float32 master weights; bfloat16 parameters are their rounded copies, gradients sum in float32.

    Of a sharded parameter it sees this rank's shard. Its buffers serve run after run: `reset` begins a new one.
    """

    def __init__(self, params: list[Tensor]):
        self.params, self.masters = params, [local(p).float() for p in params]
        for p, m in zip(params, self.masters, strict=True):
            p.grad = torch.zeros_like(p)  # kept and zeroed in place: a step allocates nothing
            m.grad = local(p.grad) if p.dtype == torch.float32 else torch.empty_like(m)
        self.rounded = [(p, m) for p, m in zip(params, self.masters, strict=True) if p.dtype != torch.float32]
        self.adam = torch.optim.Adam(self.masters, fused=True)

    @torch.no_grad()
    def reset(self, starts: list[Tensor]) -> None:
        """Masters from `starts`, moments and gradients zero."""
        for m, start in zip(self.masters, starts, strict=True):
            m.copy_(start)
        for p, m in self.rounded:
            p.copy_(m)
        self.zero_gradients()
        for state in self.adam.state.values():
            for moment in state.values():
                moment.zero_()

    def take_gradients(self, first: bool) -> None:
        """Move the parameters' gradients to the masters, in place of (first) or on top of what is there."""
        for p, m in self.rounded:
            m.grad.copy_(p.grad) if first else m.grad.add_(p.grad)
            p.grad.zero_()  # the next micro-batch starts from zero

    def zero_gradients(self) -> None:
        for p in self.params:
            local(p.grad).zero_()

    def step(self, lr: float) -> None:
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        with torch.no_grad():
            for p, m in self.rounded:
                p.copy_(m)
        self.zero_gradients()


def local(x: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or the tensor; it shares the memory and carries no gradient."""
    x = x.detach()
    return x.to_local() if hasattr(x, "to_local") else x


def lr_at(step: int, n_steps: int, peak: float) -> float:
    """Cosine from the peak at step 0 to zero at step n_steps."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def batches(n: int, config: TrainConfig) -> Iterator[list[int]]:
    """Indices of each batch of the run: every epoch in its own order, a function of (seed, epoch)."""
    for epoch in range(config.epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(stable_hash("order", config.seed, epoch)))
        yield from (b.tolist() for b in order.split(config.batch_size))


def finetune(classifier: Classifier, texts: list[str], labels: Tensor, config: TrainConfig) -> dict:
    """Train `classifier` from its pretrained weights on soft labels [N, K]; returns tokens, steps and cut inputs.

    The loss is that of the whole batch whatever `micro_tokens` and the number of ranks are: with several micro-batches the
    logits are computed first without gradient, the loss is differentiated at them, and each micro-batch is run again and
    pushed back from its rows of that gradient. Raises FloatingPointError on a loss that is not finite.
    """
    check_labels(labels, len(texts))
    classifier.reset(config)
    samples, n_cut = classifier.encode(texts, config.max_tokens)
    labels, dev = labels.float(), classifier.model.device
    if classifier.kernels != "reference":
        check_kernel(config, classifier.kernels, dev)
    schedule, micro_tokens = list(batches(len(samples), config)), config.micro_tokens
    n_tokens, log, unread, start = 0, [], [], time.time()
    bar = tqdm(schedule, desc=f"finetune {classifier.spec.name}", leave=False, disable=rank() > 0 or None)
    for step, batch in enumerate(bar):
        y, tokens = to_device(labels[batch], dev), [samples[i] for i in batch]
        while True:
            try:
                loss = push_back(classifier, tokens, y, step / len(schedule), config, micro_tokens)
                break
            except torch.OutOfMemoryError:
                micro_tokens = min(micro_tokens, sum(map(len, tokens))) // 2
                if classifier.sharded or micro_tokens < max(map(len, tokens)):
                    raise
            classifier.optimizer.zero_gradients()
            torch.cuda.empty_cache()
            print0(
                f"out of memory at step {step}: again with --micro-tokens {micro_tokens}, which gives the same result"
            )
        unread.append(loss)
        lr = lr_at(step, len(schedule), config.lr)
        classifier.optimizer.step(lr)
        n_tokens += sum(map(len, tokens))
        log.append({"step": step, "lr": lr, "tokens": n_tokens, "seconds": time.time() - start})
        if dev.type == "cpu" or step % 20 == 0 or step + 1 == len(schedule):  # to look at a loss is to wait for the GPU
            for row, value in zip(log[-len(unread) :], torch.stack(unread).tolist(), strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(f"loss is {value} at step {row['step']} of {len(schedule)}")
                row["loss"] = value
            unread.clear()
    counts = {"train_tokens": n_tokens, "steps": len(schedule), "cut_inputs": n_cut}
    return counts | ({"micro_tokens": micro_tokens} if micro_tokens != config.micro_tokens else {}) | {"log": log}


def push_back(classifier: Classifier, tokens: list, y: Tensor, step_frac: float, config, micro_tokens: int) -> Tensor:
    """The loss of the whole batch, on every rank, and its gradients, left with the optimizer.

    Every rank runs its share of the samples; a rank with nothing left goes along with a sample that has no gradient.
    """
    ranks = world_size() if classifier.sharded else 1
    mine = shares([len(t) for t in tokens], micro_tokens, ranks)[rank() % ranks]
    rows = [to_device(torch.tensor(m, dtype=torch.long), y.device) for m in mine]

    def forward(m: list[int]) -> Tensor:
        return classifier.logits([tokens[i] for i in m or [0]])

    with torch.set_grad_enabled(len(mine) == 1):
        logits = [forward(m) for m in mine]
    z = torch.zeros_like(y)
    for r, out in zip(rows, logits, strict=True):
        z.index_copy_(0, r, out.detach()[: len(r)])
    if ranks > 1:
        torch.distributed.all_reduce(z, group=process_group())
    loss, gradient = loss_and_gradient(z, y, step_frac, config, classifier.kernels)
    for n, (m, r) in enumerate(zip(mine, rows, strict=True)):
        out = logits[0] if len(mine) == 1 else forward(m)
        of_rows = torch.zeros_like(out)
        of_rows[: len(r)] = ranks * gradient[r]  # FSDP takes the mean over ranks
        out.backward(of_rows)
        classifier.optimizer.take_gradients(first=n == 0)
    if ranks > 1:
        torch.distributed.all_reduce(classifier.model.score.weight.grad.div_(ranks), group=process_group())
    return loss


def to_device(x: Tensor, dev: torch.device) -> Tensor:
    """A copy that the CPU does not wait for."""
    return x if dev.type == "cpu" else x.pin_memory().to(dev, non_blocking=True)


def check_labels(labels: Tensor, n: int) -> None:
    """Raises ValueError where the labels are not N >= 1 probability vectors."""
    if n < 1 or labels.ndim != 2 or len(labels) != n:
        raise ValueError(f"{n} samples with labels of shape {list(labels.shape)}; expected [N, K] with N >= 1")
    wrong = (labels < 0).any(-1) | ((labels.sum(-1) - 1).abs() > 1e-3) | ~labels.isfinite().all(-1)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"label of sample {i} is not a probability vector: {labels[i].tolist()}")


@torch.no_grad()
def forward_all(classifier: Classifier, texts: list[str], config: TrainConfig, what: Callable) -> Tensor:
    """`what`, classifier.features or .logits, of every text, on the CPU; neighbours in length share a forward."""
    samples, _ = classifier.encode(texts, config.max_tokens)
    lengths = [len(s) for s in samples]
    order = sorted(range(len(samples)), key=lambda i: lengths[i])
    slices = micro_batches(order, lengths, min(config.micro_tokens, 4096))
    ranks, me = (world_size(), rank()) if classifier.sharded else (1, 0)
    out: dict[int, Tensor] = {}
    for n in tqdm(range(0, len(slices), ranks), desc="forward", leave=False, disable=rank() > 0 or None):
        y = what([samples[i] for i in slices[min(n + me, len(slices) - 1)]])  # past the end the last one, to go along
        out |= {n + me: y.cpu()} if n + me < len(slices) else {}
    parts = gather(out) if ranks > 1 else [out]
    return torch.cat([parts[n % ranks][n] for n in range(len(slices))])[torch.tensor(order).argsort()]


def predict(classifier: Classifier, texts: list[str], config: TrainConfig) -> Tensor:
    """Class probabilities [N, K], float32 on the CPU. Raises FloatingPointError on logits that are not finite."""
    probs = forward_all(classifier, texts, config, classifier.logits).softmax(-1)
    check_finite(probs)
    return probs


def check_finite(probs: Tensor) -> None:
    if wrong := (~probs.isfinite().all(-1)).nonzero().flatten().tolist():
        raise FloatingPointError(
            f"logits of {len(wrong)} of {len(probs)} samples are not finite, the first is sample {wrong[0]}; try a lower --lr"
        )


def finetune_heads(x: Tensor, labels: list[Tensor], configs: list[TrainConfig], kernels: str = "auto") -> Tensor:
    """Heads alone, E at once, on frozen features x [N, D] with E soft labels [N, K]: weights [E, K, D].

    Head e becomes what `configs[e]` would make of it alone: same order, loss and schedule. All must agree in number of
    steps and batch size.
    """
    labels, n_classes, kernels = torch.stack(labels), labels[0].shape[-1], resolve(kernels)
    seeds = list(dict.fromkeys(c.seed for c in configs))  # heads of one seed read the same batches
    count = Counter(c.seed for c in configs)
    n_slots = max(count.values())
    seed_of = [seeds.index(c.seed) for c in configs]
    slots = [n_slots * s + (count.subtract([c.seed]) or count[c.seed]) for s, c in zip(seed_of, configs, strict=True)]
    weight = torch.zeros(len(seeds) * n_slots, n_classes, x.shape[-1], device=x.device, requires_grad=True)
    adam = torch.optim.Adam([weight], fused=True)
    alike = {loss: [e for e, c in enumerate(configs) if c.loss == loss] for loss in LOSSES}
    orders = [batches(len(x), next(c for c in configs if c.seed == seed)) for seed in seeds]
    orders = list(zip(*orders, strict=True))
    for step, order in enumerate(tqdm(orders, desc=f"{len(configs)} heads", leave=False, disable=None)):
        index = to_device(torch.tensor(order), x.device)  # [seeds, B]
        z = x[index] @ weight.view(len(seeds), -1, x.shape[-1]).mT  # [seeds, B, slots * K]
        z = z.unflatten(-1, (n_slots, -1)).transpose(1, 2).flatten(0, 1)[slots]  # [E, B, K]
        y = labels.take_along_dim(index[seed_of][..., None], 1)
        gradient = torch.empty_like(z)
        for e in filter(None, alike.values()):
            gradient[e] = loss_and_gradient(z[e].detach(), y[e], step / len(orders), configs[e[0]], kernels)[1]
        weight.grad = None
        z.backward(
            gradient
        )  # not autograd.grad: fused Adam reads a gradient as if it lay in memory as its parameter does
        adam.param_groups[0]["lr"] = lr_at(step, len(orders), configs[0].lr)
        adam.step()
    return weight.detach()[slots]


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
    for name in ("lr", "epochs", "batch_size", "max_tokens", "micro_tokens"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0, and finite")
    for name, most in {"alpha": 1000, "beta": 1000, "aux_coef": 1, "warmup_frac": 1}.items():
        if not 0 <= getattr(args, name) <= most:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from 0 to {most}")
    if check_out(args.out).exists():
        raise InputError(f"--out {args.out!r}: name a folder that does not exist yet")
    resolve(args.kernels)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)})
    train, test = (read_samples(Path(path), "text") for path in (args.train, args.test))
    n_classes = max([2, *(len(r["probs"]) for r in train if isinstance(r.get("probs"), list))])
    labels = soft_labels(train, n_classes)
    soft_labels([{"id": r["id"], "label": r["label"]} for r in test if "label" in r], n_classes)
    if n_classes != 2 and (args.loss == "logconf" or args.head_init == "verbalizer"):
        raise InputError(f"--train {args.train}: {n_classes} classes; --loss logconf and --head-init verbalizer take 2")
    if (labels == labels[0]).all() and labels[0].max() == 1 and len(labels) > 1:
        raise InputError(f"--train {args.train}: all {len(labels)} rows have the same label, there is nothing to learn")
    classifier = Classifier(
        ModelSpec.parse(args.model), n_classes, resolve_dtype(args.dtype), args.kernels, sharded=True
    )
    print0(f"{args.model} in {classifier.dtype}, kernels: {classifier.kernels}")
    cost = finetune(classifier, [r["text"] for r in train], labels, config)
    probs = predict(classifier, [r["text"] for r in test], config)
    if args.keep_model:
        save_model(classifier, out / "model", config, Path(args.train).name)
    if rank() == 0:
        write_jsonl(out / "steps.jsonl", cost.pop("log"))
        write_jsonl(out / "predictions.jsonl", prediction_rows(test, probs))
    scored = [int(p.argmax()) == r["label"] for r, p in zip(test, probs, strict=True) if "label" in r]
    accuracy = f", accuracy {sum(scored) / len(scored):.4f} on {len(scored)}" if scored else ""
    print0(f"{cost['steps']} steps, {cost['train_tokens']} tokens{accuracy}; wrote {out}/predictions.jsonl")


def prediction_rows(rows: list[dict], probs: Tensor) -> list[dict]:
    return [{"id": r["id"], "probs": [round(x, 7) for x in p.tolist()]} for r, p in zip(rows, probs, strict=True)]


def save_model(classifier: Classifier, folder: Path, config: TrainConfig, trained_on: str) -> None:
    """An ordinary Hugging Face folder with a model card, loadable by AutoModelForSequenceClassification; by rank 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(classifier.model, options=whole) if classifier.sharded else None
    if rank() == 0:
        classifier.model.save_pretrained(folder, state_dict=weights)
        classifier.tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", model_card(classifier.spec, config, trained_on))


def model_card(spec: ModelSpec, config: TrainConfig, trained_on: str) -> str:
    blocks = f", its first {spec.layers} blocks" if spec.layers else ""
    settings = "\n".join(f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items())
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---
# Finetuned on {trained_on}

{Path(spec.name).name}{blocks}, finetuned as a whole with a bias-free two-way head on the last token. Class 1 is the probability that the
text shown is right, or preferred. Loaded with `dtype=torch.float32` it gives the probabilities recorded in the folder above, to
the rounding of {config.dtype}. Made by an experiment in weak-to-strong generalization: its labels may be those
of a weak model, and nothing but the experiment's own test split has been looked at.

| setting | value |
|---|---|
{settings}
"""


if __name__ == "__main__":
    run_script(main)
