"""The tail of a classifier: rows of the hidden states, final RMSNorm, bias-free head, in one launch each way.

    r_b = (mean_d h_bd^2 + eps)^-1/2          y_bd = r_b w_d h_bd          z_bk = sum_d y_bd W_kd

h_b is row rows[b] of `hidden`; without norm weights, y = h. With g = dL/dz and a_bd = sum_k g_bk W_kd:

    dW_kd = sum_b g_bk y_bd        dw_d = sum_b a_bd r_b h_bd        dh_bd = r_b w_d a_bd - h_bd r_b^2 / D sum_k g_bk z_bk

The norm's usual reduction over D in the backward pass is known beforehand: sum_d a_bd w_d h_bd = sum_k g_bk z_bk / r_b. So
the backward has no reduction over D, and every sum over samples stays inside one program: no atomics, the same bits twice.
Products and sums are float32, also of bfloat16 inputs. Shapes: N rows, D width, B samples, K classes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common import InputError
from kernels import resolve

MAX_CLASSES = 32
TILE = 4096  # elements of a program's largest tile
SPLIT_ROWS = 512  # more samples than this are split among programs, whose sums torch then adds


def tail(
    hidden: Tensor, rows: Tensor | None, norm_w: Tensor | None, eps: float, head_w: Tensor, kernels: str
) -> Tensor:
    """Class logits [B, K], float32, differentiable in `hidden`, `norm_w` and `head_w`.

    hidden [N, D]; rows [B], each named once, or None for all; norm_w [D], or None for states that are already normed;
    head_w [K, D]. Raises InputError where `kernels` is not one of auto, triton, reference, or cannot run.
    """
    if resolve(kernels) == "reference":
        return reference(hidden, rows, norm_w, eps, head_w)
    if len(head_w) > MAX_CLASSES:
        raise InputError(
            f"{len(head_w)} classes: the tail kernel takes at most {MAX_CLASSES}; choose kernels 'reference'"
        )
    return Tail.apply(hidden, rows, norm_w, eps, head_w)


def reference(hidden: Tensor, rows: Tensor | None, norm_w: Tensor | None, eps: float, head_w: Tensor) -> Tensor:
    """`tail` in PyTorch; in float64 where `hidden` is."""
    h = hidden if rows is None else hidden[rows.long()]
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    if norm_w is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * norm_w
    return F.linear(h, head_w.to(h.dtype))


@triton.jit
def forward_kernel(
    h_ptr, h_stride, rows_ptr, norm_ptr, eps, head_ptr,  # [N, D], [B] or None, [D] or None, [K, D]
    logits_ptr, rstd_ptr,  # [B, K], [B]
    n_cols: tl.constexpr, n_classes: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a sample: the row is read once, the norm's factor multiplies the sums at the end."""
    b = tl.program_id(0)
    row = b.to(tl.int64) if rows_ptr is None else tl.load(rows_ptr + b).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[:, None]
    squares = tl.full([BLOCK_D], 0.0, tl.float32)
    products = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    for start in range(0, n_cols, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + row * h_stride + d, mask=d < n_cols, other=0.0).to(tl.float32)
        y = h
        if norm_ptr is not None:
            squares += h * h
            y = h * tl.load(norm_ptr + d, mask=d < n_cols, other=0.0).to(tl.float32)
        inside = (k < n_classes) & (d < n_cols)[None, :]
        products += y[None, :] * tl.load(head_ptr + k * n_cols + d[None, :], mask=inside, other=0.0).to(tl.float32)
    logits = tl.sum(products, 1)
    if norm_ptr is not None:
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / n_cols + eps)
        tl.store(rstd_ptr + b, rstd)
        logits *= rstd
    k = tl.arange(0, BLOCK_K)
    tl.store(logits_ptr + b * n_classes + k, logits, mask=k < n_classes)


@triton.jit
def backward_kernel(
    h_ptr, h_stride, rows_ptr, norm_ptr, head_ptr,  # as in the forward
    logits_ptr, rstd_ptr, g_ptr,  # [B, K], [B], [B, K]
    dh_ptr, sums_ptr,  # [B, D], [splits, K + 1, D]: dW, and in the last row dw
    n_rows, n_cols: tl.constexpr, n_classes: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program a block of D and ROWS samples: it walks the samples, writes dh and keeps the sums over samples."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    head = tl.load(
        head_ptr + k[:, None] * n_cols + d[None, :], mask=(k[:, None] < n_classes) & (d[None, :] < n_cols), other=0.0
    ).to(tl.float32)
    d_head = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + d, mask=d < n_cols, other=0.0).to(tl.float32)
        d_norm = tl.full([BLOCK_D], 0.0, tl.float32)
    first = tl.program_id(1) * ROWS
    for start in range(first, tl.minimum(first + ROWS, n_rows), BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        row = b.to(tl.int64)
        if rows_ptr is not None:
            row = tl.load(rows_ptr + b, mask=b < n_rows, other=0).to(tl.int64)
        inside = (b[:, None] < n_rows) & (d[None, :] < n_cols)
        h = tl.load(h_ptr + row[:, None] * h_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        at = b[:, None] * n_classes + k[None, :]
        is_class = (b[:, None] < n_rows) & (k[None, :] < n_classes)
        g = tl.load(g_ptr + at, mask=is_class, other=0.0)
        a = tl.sum(g[:, :, None] * head[None, :, :], 1)
        if norm_ptr is not None:
            r = tl.load(rstd_ptr + b, mask=b < n_rows, other=0.0)[:, None]
            gz = tl.sum(g * tl.load(logits_ptr + at, mask=is_class, other=0.0), 1)[:, None]
            x = r * h
            d_norm += tl.sum(a * x, 0)
            y = x * norm[None, :]
            dh = r * (a * norm[None, :] - x * (gz / n_cols))
        else:
            y = h
            dh = a
        d_head += tl.sum(g[:, :, None] * y[:, None, :], 0)
        tl.store(dh_ptr + b[:, None].to(tl.int64) * n_cols + d[None, :], dh.to(dh_ptr.dtype.element_ty), mask=inside)
    sums_ptr += tl.program_id(1) * (n_classes + 1) * n_cols
    tl.store(sums_ptr + k[:, None] * n_cols + d[None, :], d_head, mask=(k[:, None] < n_classes) & (d[None, :] < n_cols))
    if norm_ptr is not None:
        tl.store(sums_ptr + n_classes * n_cols + d, d_norm, mask=d < n_cols)


def forward_blocks(n_cols: int, n_classes: int) -> dict[str, int]:
    """BLOCK_* and warps of the forward kernel."""
    classes = triton.next_power_of_2(n_classes)
    return {"BLOCK_D": min(triton.next_power_of_2(n_cols), TILE // classes), "BLOCK_K": classes, "num_warps": 8}


def backward_blocks(n_classes: int) -> dict[str, int]:
    """BLOCK_* and warps of the backward kernel."""
    classes = triton.next_power_of_2(n_classes)
    return {"BLOCK_D": 64, "BLOCK_B": TILE // 64 // classes, "BLOCK_K": classes, "num_warps": 8}


def forward(hidden, rows, norm_w, eps, head_w) -> tuple[Tensor, Tensor | None]:
    """Logits [B, K] and, with norm weights, the norm's factors r [B]: one launch. Rows and weights are contiguous."""
    B, (K, D) = len(hidden) if rows is None else len(rows), head_w.shape
    logits = torch.empty(B, K, dtype=torch.float32, device=hidden.device)
    rstd = None if norm_w is None else torch.empty(B, dtype=torch.float32, device=hidden.device)
    forward_kernel[(B,)](
        hidden, hidden.stride(0), rows, norm_w, eps, head_w, logits, rstd,
        n_cols=D, n_classes=K, **forward_blocks(D, K),
    )  # fmt: skip
    return logits, rstd


def backward(hidden, rows, norm_w, head_w, logits, rstd, g) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh [B, D] of the rows alone in their dtype, dW [K, D] and dw [D] in float32: one launch up to SPLIT_ROWS samples."""
    (B, K), D = g.shape, hidden.shape[1]
    dh = torch.empty(B, D, dtype=hidden.dtype, device=hidden.device)
    splits = triton.cdiv(B, SPLIT_ROWS)
    sums = torch.empty(splits, K + 1, D, dtype=torch.float32, device=hidden.device)
    blocks = backward_blocks(K)
    backward_kernel[(triton.cdiv(D, blocks["BLOCK_D"]), splits)](
        hidden, hidden.stride(0), rows, norm_w, head_w, logits, rstd, g, dh, sums,
        n_rows=B, n_cols=D, n_classes=K, ROWS=SPLIT_ROWS, **blocks,
    )  # fmt: skip
    total = sums[0] if splits == 1 else sums[:, : K + (norm_w is not None)].sum(0)
    return dh, total[:K], None if norm_w is None else total[K]


class Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, rows, norm_w, eps, head_w):
        hidden, head_w = hidden.contiguous(), head_w.contiguous()
        logits, rstd = forward(hidden, rows, norm_w, eps, head_w)
        ctx.save_for_backward(hidden, rows, norm_w, head_w, logits, rstd)
        return logits

    @staticmethod
    def backward(ctx, g):
        hidden, rows, norm_w, head_w, logits, rstd = ctx.saved_tensors
        dh, d_head, d_norm = backward(hidden, rows, norm_w, head_w, logits, rstd, g.contiguous())
        if rows is not None:
            dh = torch.zeros_like(hidden).index_copy_(0, rows.long(), dh)
        return dh, None, None if d_norm is None else d_norm.to(norm_w.dtype), None, d_head.to(head_w.dtype)
