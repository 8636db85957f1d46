"""The three losses of weak-to-strong finetuning for E heads at once: loss and gradient in one launch.

Each is the mean cross-entropy to a target t that carries no gradient; with p = softmax(z) and soft labels y:

    L_e = -1/B sum_bk t_ebk log p_ebk               dL_e/dz_ebk = (p_ebk sum_j t_ebj - t_ebk) / B

    xent     t = y
    product  t = p^beta y^alpha / sum_k p_k^beta y_k^alpha, in log space
    logconf  t = (1 - c) y + c h, for K = 2; h is class 0 where p_0 >= threshold, class 1 elsewhere, and the threshold is
             the quantile of p_0 over the batch at q = mean_b y_b1, so that h has the classes as often as y

p_0 is float64, in the reference and in the kernel: in float32 it ties at 1. The kernel finds the order statistic below the
quantile exactly: 32 count-and-halve steps on the bits of the float32 margins z_0 - z_1, which order as p_0 does, then, among
the samples of that one margin, a step per value of p_0 up to it. Both harden the same samples, unless the last bit of exp or
of the sum of the labels decides. Shapes: E heads, B samples, K classes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common import InputError

MODES = {"xent": 0, "product": 1, "logconf": 2}  # what the kernel computes
MAX_ROWS = 4096  # samples of a head of logconf, whose quantile is found in registers
TINY = torch.finfo(torch.float32).min / 4  # stands for log 0: alpha times it is still finite


def conf_loss(
    logits: Tensor, labels: Tensor, mode: str, coef: float = 0.0, alpha: float = 1.0, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Loss [E] and its gradient at the logits [E, B, K], float32, by the Triton kernel; labels are [E, B, K].

    `mode` is one of MODES, coef the c of logconf. That raises ValueError on K != 2, InputError on more than MAX_ROWS samples.
    """
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels {list(labels.shape)} of logits {list(logits.shape)}"
        )  # the kernel would read beside them
    E, B, K = logits.shape
    if mode == "logconf":
        check_two_classes(K)
        if B > MAX_ROWS:
            raise InputError(f"{B} samples: the logconf kernel takes at most {MAX_ROWS}; choose kernels 'reference'")
    logits, labels = logits.detach().float().contiguous(), labels.float().contiguous()
    loss, dz = logits.new_empty(E), torch.empty_like(logits)
    loss_kernel[(E,)](logits, labels, loss, dz, B, K, coef, alpha, beta, TINY, MODES[mode], **blocks(B, K))
    return loss, dz


# ---- the reference, in the dtype of the logits ----


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-mean_b sum_k t_bk log softmax(z_b)_k: [..., B, K] -> [...]."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1).mean(-1)


def product_target(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """p^beta y^alpha over its sum, without gradient. Where p and y exclude each other, log y alone decides."""
    log_p = F.log_softmax(logits.detach(), dim=-1)
    log_y = labels.log().clamp_min(torch.finfo(logits.dtype).min / 4)
    return F.softmax(beta * log_p + alpha * log_y, dim=-1)


def logconf_target(logits: Tensor, labels: Tensor, coef: float) -> Tensor:
    """(1 - c) y + c h, with h the prediction hardened at the quantile: [..., B, 2]. Raises ValueError on another K."""
    check_two_classes(logits.shape[-1])
    h = F.one_hot((~hardened_to_0(logits, labels)).long(), 2).to(labels)
    return (1 - coef) * labels + coef * h


def check_two_classes(n_classes: int) -> None:
    if n_classes != 2:
        raise ValueError(f"logconf needs two classes, got K={n_classes}")


def hardened_to_0(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples of the batch are hardened to class 0: bool [..., B]."""
    p0 = F.softmax(logits.detach().double(), dim=-1)[..., 0]
    return p0 >= quantile(p0, labels[..., 1].double().mean(-1, keepdim=True).clamp(0, 1))


def quantile(p: Tensor, q: Tensor) -> Tensor:
    """torch.quantile, linear, with a q of its own for every head: p [..., B], q [..., 1] -> [..., 1]. No host sync."""
    rank = (q * (p.shape[-1] - 1)).expand(*p.shape[:-1], 1)
    ordered = p.sort(dim=-1).values
    below, above = (ordered.gather(-1, r.long()) for r in (rank.floor(), rank.ceil()))
    return torch.lerp(below, above, rank - rank.floor())


def reference(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [...] to a target [..., B, K] and its gradient at the logits, by autograd."""
    z = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy(z, target)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


# ---- the kernel ----


@triton.jit
def float64_p0(z0, z1):
    """softmax(z)_0 of two float32 logits, in float64."""
    margin = z0.to(tl.float64) - z1.to(tl.float64)
    small = tl.exp(-tl.abs(margin))
    return tl.where(margin >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def select_quantile(p, margin, inside, q, n_rows):
    """torch.quantile(p, q), linear: `p` float64 [BLOCK_B], ordered as the float32 `margin` except for its ties."""
    rank = q * (n_rows - 1)
    lower = tl.floor(rank).to(tl.int32)
    bits = margin.to(tl.int32, bitcast=True)
    key = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # orders as the floats do
    low, high = tl.full([], -0x80000000, tl.int32), tl.full([], 0x7FFFFFFF, tl.int32)
    for _ in range(32):  # the smallest key with more than `lower` samples up to it
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum((inside & (key <= middle)).to(tl.int32), 0) > lower
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    below, at = tl.full([], -1.0, tl.float64), tl.sum((inside & (key < high)).to(tl.int32), 0)
    while (at <= lower) & (below < 2.0):  # through the samples of that margin, by value; NaN ends it too
        below = tl.min(tl.where(inside & (key == high) & (p > below), p, 2.0), 0)
        at = tl.sum((inside & (p <= below)).to(tl.int32), 0)
    above = tl.where(at > lower + 1, below, tl.min(tl.where(inside & (p > below), p, 2.0), 0))
    w = rank - lower
    return tl.fma(tl.where(w < 0.5, w, w - 1.0), above - below, tl.where(w < 0.5, below, above))  # as torch.lerp


@triton.jit
def loss_kernel(
    z_ptr, y_ptr, loss_ptr, dz_ptr,  # [E, B, K] but for the loss [E]
    n_rows, n_classes: tl.constexpr, coef, alpha, beta, tiny, MODE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per head. ROWS, at least n_rows, is how many samples lie in registers for the quantile."""
    e = tl.program_id(0).to(tl.int64)
    z_ptr += e * n_rows * n_classes
    y_ptr += e * n_rows * n_classes
    dz_ptr += e * n_rows * n_classes
    if MODE == 2:  # the quantile of p_0 at q = mean y_1 over the head's samples
        s = tl.arange(0, ROWS)
        inside = s < n_rows
        z0 = tl.load(z_ptr + 2 * s, mask=inside, other=0.0)
        z1 = tl.load(z_ptr + 2 * s + 1, mask=inside, other=0.0)
        q = tl.sum(tl.load(y_ptr + 2 * s + 1, mask=inside, other=0.0).to(tl.float64), 0) / n_rows
        q = tl.minimum(tl.maximum(q, 0.0), 1.0)
        threshold = select_quantile(float64_p0(z0, z1), z0 - z1, inside, q, n_rows)
    k = tl.arange(0, BLOCK_K)[None, :]
    loss = tl.full([BLOCK_B], 0.0, tl.float32)
    for start in range(0, n_rows, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        row, is_class = b < n_rows, k < n_classes
        b = tl.minimum(b, n_rows - 1)  # past the end the last sample again: no NaN, and nothing is stored or counted
        at = b[:, None] * n_classes + k
        z = tl.load(z_ptr + at, mask=is_class, other=float("-inf"))
        y = tl.load(y_ptr + at, mask=is_class, other=0.0)
        shifted = z - tl.max(z, 1)[:, None]
        exps = tl.exp(shifted)
        total = tl.sum(exps, 1)
        log_p = shifted - tl.log(total)[:, None]
        if MODE == 0:
            t = y
        elif MODE == 1:
            u = tl.where(is_class, beta * log_p + alpha * tl.maximum(tl.log(y), tiny), float("-inf"))
            t = tl.exp(u - tl.max(u, 1)[:, None])
            t = t / tl.sum(t, 1)[:, None]
        else:
            to_0 = (float64_p0(tl.load(z_ptr + 2 * b), tl.load(z_ptr + 2 * b + 1)) >= threshold).to(tl.int32)
            t = (1 - coef) * y + coef * (to_0[:, None] != k).to(tl.float32)
        gradient = (exps / total[:, None] * tl.sum(t, 1)[:, None] - t) / n_rows
        tl.store(dz_ptr + at, gradient, mask=row[:, None] & is_class)
        loss -= tl.where(row, tl.sum(tl.where(is_class, t * log_p, 0.0), 1), 0.0)
    tl.store(loss_ptr + e, tl.sum(loss, 0) / n_rows)


def blocks(n_rows: int, n_classes: int) -> dict[str, int]:
    """Sizes and options of the loss kernel: a thread holds at most 8 samples for the quantile, then 4 logits at once."""
    rows, classes = triton.next_power_of_2(n_rows), triton.next_power_of_2(n_classes)
    warps = min(max(rows // 256, 1), 16)
    sizes = {"ROWS": rows, "BLOCK_B": min(rows, warps * 128 // classes), "BLOCK_K": classes}
    return sizes | {"num_warps": warps, "enable_fp_fusion": False}  # no fusion: rounds as the reference does
