"""The kernel benchmark: head, loss and their gradients, beside PyTorch and torch.compile; and heads alone.

    python -m bench.kernels --csv kernels.csv        every row that this machine can run; a CPU takes smaller shapes

T1 to T3: B samples of K = 2 classes and their hidden states [B, T, D]; the gradients are those of the B rows and the head.
T4: loss and gradient of E heads at once. H: a whole run of heads.finetune_heads, E heads together or one by one.

Columns: median, 20th and 80th percentile of the wall time with a synchronised GPU; medians of the GPU's time from a flushed
L2 cache (cold) and inside a CUDA graph, where launches cost nothing; launches; time to move inputs and gradients once at the
measured copy bandwidth (floor), and how many floors the median took. That all give the same is tests/test_kernels.py's part.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import heads
import train
from bench.measure import DEVICE, GPU, copy_bandwidth, launched, profiled, spread, wall_ms, write_rows
from common import flag, parse_dataclass, run_script
from kernels import conf_loss
from kernels import head as head_kernel

CONFIG = train.TrainConfig()  # of the losses
BATCHES = {"T1": 32, "T2": 256, "T3": 4096} if GPU else {"T1": 32}


@dataclasses.dataclass(frozen=True)
class Args:
    rows: tuple = flag(("T1", "T2", "T3", "T4", "H"), "which to run", choices=("T1", "T2", "T3", "T4", "H"))
    seconds: float = flag(0.5, "of each measurement of wall time, at least 5 calls", float, zero=True)
    csv: str = flag("", "file to write the rows to")


Case = tuple[str, dict[str, Callable], int]  # a shape, the step of each provider, the bytes that it must move


def cross_entropy(loss: str, z: Tensor, y: Tensor) -> Tensor:
    """After the warm-up of the confidence loss."""
    return conf_loss.cross_entropy(z, train.LOSSES[loss](z.detach(), y, 1.0, CONFIG))


def by_kernel(loss: str, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return conf_loss.conf_loss(z, y, loss, CONFIG.aux_coef, CONFIG.alpha, CONFIG.beta)


def gradients(forward: Callable, inputs: Callable) -> tuple[Tensor, ...]:
    """The loss, and by autograd its gradients at the inputs."""
    at = [x.detach().requires_grad_() for x in inputs()]
    loss = forward(*at)
    return loss.detach(), *torch.autograd.grad(loss.sum(), at)


def head_case(B: int, loss: str) -> Case:
    D, T, g = *((5120, 540) if GPU else (576, 32)), torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(B * T, D, generator=g, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    rows = (torch.arange(1, B + 1, device=DEVICE) * T - 1).int()  # last tokens
    y = torch.randn(B, 2, generator=g, device=DEVICE).softmax(-1)
    weight = torch.randn(2, D, generator=g, device=DEVICE) / D**0.5

    def forward(h: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(loss, F.linear(h.to(w.dtype), w), y)

    def ours() -> tuple:
        value, dz = by_kernel(loss, head_kernel.forward(hidden, rows, weight)[None], y[None])
        return value[0], *head_kernel.backward(hidden, rows, weight, dz[0])

    steps = providers(forward, lambda: (hidden[rows.long()], weight), ours)
    n_bytes = 3 * B * D * hidden.element_size() + 3 * weight.nbytes
    return f"B={B} T={T} D={D} {str(hidden.dtype)[6:]}", steps, n_bytes


def heads_case(E: int, B: int, loss: str) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    logits, labels = (3 * torch.randn(E, B, 2, generator=g, device=DEVICE) for _ in range(2))
    y = labels.softmax(-1)
    steps = providers(lambda z: cross_entropy(loss, z, y), lambda: (logits,), lambda: by_kernel(loss, logits, y))
    return f"E={E} B={B}", steps, 3 * logits.nbytes


def providers(forward: Callable, inputs: Callable, ours: Callable) -> dict[str, Callable]:
    """`forward` and its gradients at `inputs` by autograd; with a GPU, the same by torch.compile and by our kernels."""
    fast = torch.compile(forward, dynamic=False)
    steps = {"eager": partial(gradients, forward, inputs), "compile": partial(gradients, fast, inputs), "ours": ours}
    return steps if GPU else {"eager": steps["eager"]}


def finetune_case(E: int, loss: str, n: int = 512, D: int = 1536) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(n, D, generator=g, device=DEVICE)
    labels = list(torch.randn(E, n, 2, generator=g, device=DEVICE).softmax(-1))
    configs = [train.TrainConfig(loss=loss, epochs=1, seed=e // 4) for e in range(E)]

    steps = {
        "together": lambda: heads.finetune_heads(x, labels, configs),
        "one by one": lambda: [heads.finetune_heads(x, [y], [c]) for y, c in zip(labels, configs, strict=True)],
    }
    return f"E={E} N={n} D={D}, {n // CONFIG.batch_size} steps", steps, 0


def cases(row: str, loss: str) -> Iterator[Case]:
    """One at a time holds memory. Heads alone are run with one loss."""
    if row in BATCHES:
        yield head_case(BATCHES[row], loss)
    elif row == "T4":
        shapes = itertools.product((1, 64, 1024), (32, 4096)) if GPU else [(1, 32), (64, 32)]
        yield from (heads_case(E, B, loss) for E, B in shapes)
    elif row == "H" and loss == "logconf":
        yield from (finetune_case(E, loss) for E in (1, 8, 32))


def measured_rows(args: Args) -> Iterator[dict]:
    """One row per case and provider."""
    bandwidth = copy_bandwidth()
    for loss, name in itertools.product(conf_loss.MODES, args.rows):
        for shape, steps, n_bytes in cases(name, loss):
            torch.compiler.reset()
            floor = 1e3 * n_bytes / bandwidth
            for provider, step in steps.items():
                row = {"row": name, "shape": shape, "loss": loss, "provider": provider}
                row |= spread(wall_ms(step, args.seconds)) | dict.fromkeys(("cold_ms", "graph_ms", "launches"))
                if GPU:
                    row["cold_ms"] = triton.testing.do_bench(step, return_mode="median")
                    row["launches"] = launched(profiled(step))
                if GPU and name != "H":  # whose steps upload their order, which a graph cannot
                    row["graph_ms"] = triton.testing.do_bench_cudagraph(step, return_mode="median")
                yield row | {"floor_ms": floor or None, "floors": row["p50_ms"] / floor if floor else None}


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "bench.kernels", __doc__)
    write_rows(measured_rows(args), args.csv)


if __name__ == "__main__":
    run_script(main)
