"""The end of a classifier: the last token's hidden state of each sample and the bias-free head, in one launch each way.

    z_bk = sum_d h_bd W_kd          dW_kd = sum_b g_bk h_bd          dh_bd = sum_k g_bk W_kd

h_b is row rows[b] of `hidden`, g = dL/dz. Every sum over samples stays inside one program: no atomics, the same bits twice.
Products and sums are float32, also of bfloat16 inputs. Shapes: N rows, D width, B samples, K classes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common import InputError

MAX_CLASSES = 32
TILE = 4096  # elements of a program's largest tile
SPLIT_ROWS = 512  # more samples than this are split among programs, whose sums torch then adds


def head(hidden: Tensor, rows: Tensor, weight: Tensor, kernels: str) -> Tensor:
    """Class logits [B, K], float32, of rows [B], each named once, of hidden [N, D]; differentiable in it and weight [K, D]."""
    if kernels == "reference":
        return reference(hidden, rows, weight)
    if (K := len(weight)) > MAX_CLASSES:
        raise InputError(f"{K} classes: the head kernel takes at most {MAX_CLASSES}; choose kernels 'reference'")
    return Head.apply(hidden, rows, weight)


def reference(hidden: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """`head` in PyTorch; in float64 where `hidden` is."""
    h = hidden[rows.long()]
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    return F.linear(h, weight.to(h.dtype))


@triton.jit
def forward_kernel(
    h_ptr, h_stride, rows_ptr, weight_ptr,  # [N, D], [B], [K, D]
    logits_ptr,  # [B, K]
    n_cols: tl.constexpr, n_classes: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per sample: its row is read once."""
    b = tl.program_id(0)
    row = tl.load(rows_ptr + b).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[:, None]
    products = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    for start in range(0, n_cols, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + row * h_stride + d, mask=d < n_cols, other=0.0).to(tl.float32)
        inside = (k < n_classes) & (d < n_cols)[None, :]
        products += h[None, :] * tl.load(weight_ptr + k * n_cols + d[None, :], mask=inside, other=0.0).to(tl.float32)
    k = tl.arange(0, BLOCK_K)
    tl.store(logits_ptr + b * n_classes + k, tl.sum(products, 1), mask=k < n_classes)


@triton.jit
def backward_kernel(
    h_ptr, h_stride, rows_ptr, weight_ptr, g_ptr,  # as in the forward; [B, K]
    dh_ptr, sums_ptr,  # [B, D], [splits, K, D]: dW
    n_rows, n_cols: tl.constexpr, n_classes: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per block of D and ROWS samples: it walks the samples, writes dh and keeps the sums over samples."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    d_weight = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    first = tl.program_id(1) * ROWS
    for start in range(first, tl.minimum(first + ROWS, n_rows), BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        row = tl.load(rows_ptr + b, mask=b < n_rows, other=0).to(tl.int64)
        inside = (b[:, None] < n_rows) & (d[None, :] < n_cols)
        h = tl.load(h_ptr + row[:, None] * h_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        dh = tl.full([BLOCK_B, BLOCK_D], 0.0, tl.float32)
        for c in tl.static_range(n_classes):  # in two dimensions: triton 3.6 adds a short middle axis up several times
            g = tl.load(g_ptr + b * n_classes + c, mask=b < n_rows, other=0.0)[:, None]
            dh += g * tl.load(weight_ptr + c * n_cols + d, mask=d < n_cols, other=0.0).to(tl.float32)[None, :]
            d_weight += tl.where(k[:, None] == c, tl.sum(g * h, 0)[None, :], 0.0)
        tl.store(dh_ptr + b[:, None].to(tl.int64) * n_cols + d[None, :], dh.to(dh_ptr.dtype.element_ty), mask=inside)
    sums_ptr += tl.program_id(1) * n_classes * n_cols
    of_head = (k[:, None] < n_classes) & (d[None, :] < n_cols)
    tl.store(sums_ptr + k[:, None] * n_cols + d[None, :], d_weight, mask=of_head)


def forward_blocks(n_cols: int, n_classes: int) -> dict[str, int]:
    """BLOCK_* and warps of the forward kernel."""
    classes = triton.next_power_of_2(n_classes)
    return {"BLOCK_D": min(triton.next_power_of_2(n_cols), TILE // classes), "BLOCK_K": classes, "num_warps": 8}


def backward_blocks(n_classes: int) -> dict[str, int]:
    """BLOCK_* and warps of the backward kernel."""
    return {"BLOCK_D": 64, "BLOCK_B": TILE // 64, "BLOCK_K": triton.next_power_of_2(n_classes), "num_warps": 8}


def forward(hidden: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Logits [B, K]: one launch. Rows and weights are contiguous."""
    K, D = weight.shape
    logits = torch.empty(len(rows), K, dtype=torch.float32, device=hidden.device)
    forward_kernel[(len(rows),)](hidden, hidden.stride(0), rows, weight, logits, D, K, **forward_blocks(D, K))
    return logits


def backward(hidden: Tensor, rows: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """dh [B, D] of the rows alone in their dtype, dW [K, D] in float32: one launch up to SPLIT_ROWS samples."""
    (B, K), D = g.shape, hidden.shape[1]
    dh = torch.empty(B, D, dtype=hidden.dtype, device=hidden.device)
    splits = triton.cdiv(B, SPLIT_ROWS)
    sums = torch.empty(splits, K, D, dtype=torch.float32, device=hidden.device)
    blocks = backward_blocks(K)
    grid = (triton.cdiv(D, blocks["BLOCK_D"]), splits)
    backward_kernel[grid](hidden, hidden.stride(0), rows, weight, g, dh, sums, B, D, K, SPLIT_ROWS, **blocks)
    return dh, sums[0] if splits == 1 else sums.sum(0)


class Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, rows, weight):
        hidden, weight = hidden.contiguous(), weight.contiguous()
        ctx.save_for_backward(hidden, rows, weight)
        return forward(hidden, rows, weight)

    @staticmethod
    def backward(ctx, g):
        hidden, rows, weight = ctx.saved_tensors
        dh, d_weight = backward(hidden, rows, weight, g.contiguous())
        return torch.zeros_like(hidden).index_copy_(0, rows.long(), dh), None, d_weight.to(weight.dtype)
