"""The kernel benchmark: head, loss and their gradients, beside PyTorch, torch.compile and OpenAI's way; and heads alone.

    python -m bench.kernels --csv kernels.csv        every row that this machine can run; a CPU takes smaller shapes

T1 to T3: B samples of K = 2 classes and their hidden states [B, T, D]; the gradients are those of the B rows and the head.
T4: loss and gradient of E heads at once. H: a whole run of heads.finetune_heads, E heads together or one by one.

Columns: median, 20th and 80th percentile of the wall time with a synchronised GPU; GPU time from a flushed L2 cache (cold);
peak memory above the inputs; kernel launches; worst relative error of loss and weight gradients, and of dh, against
float64 (H: of the weights, against one by one); time to move the bytes once at the measured copy bandwidth (floor), and
how many floors the median took.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
    seconds: float = flag(0.5, "of each measurement of wall time, at least 5 calls", float)
    csv: str = flag("", "file to write the rows to")


class Case(NamedTuple):
    """One shape: the step of each provider, what it should give, and the bytes it must move (inputs, gradients)."""

    shape: str
    steps: dict[str, Callable[[], tuple]]
    exact: Callable[[], tuple]
    n_bytes: int = 0


def cross_entropy(loss: str, z: Tensor, y: Tensor) -> Tensor:
    """As after the warm-up of the confidence loss."""
    return conf_loss.cross_entropy(z, train.LOSSES[loss](z.detach(), y, 1.0, CONFIG))


def by_kernel(loss: str, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return conf_loss.conf_loss(z, y, loss, CONFIG.aux_coef, CONFIG.alpha, CONFIG.beta)


def gradients(forward: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The loss, and by autograd its gradients at the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = forward(*inputs)
    return loss.detach(), *torch.autograd.grad(loss.sum(), inputs)


def case(
    shape: str, forward: Callable, inputs: Callable[[], tuple], ours: Callable, n_bytes: int, **more: Callable
) -> Case:
    """`forward(*inputs())` and its gradients by autograd, compiled, and `ours`; with what is to be measured besides."""
    fast = torch.compile(forward, dynamic=False)

    def eager() -> tuple:
        return gradients(forward, *inputs())

    def compiled() -> tuple:
        return gradients(fast, *inputs())

    def exact() -> tuple:
        return gradients(forward, *(x.double() for x in inputs()))

    steps = {"compile": compiled, "compile + graph": compiled, "ours": ours, "ours + graph": ours} if GPU else {}
    return Case(shape, {"eager": eager} | more | steps, exact, n_bytes)


def head_case(B: int, loss: str) -> Case:
    D, T, g = *((5120, 540) if GPU else (576, 32)), torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    last = torch.randint(T // 2, T, (B,), generator=g, device=DEVICE)
    flat, rows = hidden.flatten(0, 1), (torch.arange(B, device=DEVICE) * T + last).int()
    y = torch.randn(B, 2, generator=g, device=DEVICE).softmax(-1)
    weight = torch.randn(2, D, generator=g, device=DEVICE) / D**0.5

    def inputs() -> tuple:
        return flat[rows.long()], weight

    def forward(h: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(loss, F.linear(h.to(w.dtype), w), y.to(w.dtype))

    def picked(hidden: Tensor, w: Tensor) -> Tensor:
        return forward(torch.stack([hidden[i, last[i]] for i in range(B)]), w)

    def openai() -> tuple:
        """Last tokens picked sample by sample with lengths that lie on the device, gradient of all of `hidden`."""
        value, dh, dw = gradients(picked, hidden, weight)
        return value, dh.flatten(0, 1)[rows.long()], dw

    def ours() -> tuple:
        value, dz = by_kernel(loss, head_kernel.forward(flat, rows, weight)[None], y[None])
        return value[0], *head_kernel.backward(flat, rows, weight, dz[0])

    n_bytes, more = 3 * B * D * hidden.element_size() + 3 * weight.nbytes, {"openai": openai} if B <= 256 else {}
    return case(f"B={B} T={T} D={D} {str(hidden.dtype)[6:]}", forward, inputs, ours, n_bytes, **more)


def heads_case(E: int, B: int, loss: str) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    logits, labels = (3 * torch.randn(E, B, 2, generator=g, device=DEVICE) for _ in range(2))
    labels = labels.softmax(-1)

    def forward(z: Tensor) -> Tensor:
        return cross_entropy(loss, z, labels.to(z.dtype))

    def loop() -> tuple:
        each = [gradients(lambda z, y=y: cross_entropy(loss, z, y), z) for z, y in zip(logits, labels, strict=True)]
        return tuple(map(torch.stack, zip(*each, strict=True)))

    def ours() -> tuple:
        return by_kernel(loss, logits, labels)

    more = {"eager loop": loop} if E <= 64 else {}
    return case(f"E={E} B={B}", forward, lambda: (logits,), ours, 3 * logits.nbytes, **more)


def finetune_case(E: int, loss: str, n: int = 512, D: int = 1536) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(n, D, generator=g, device=DEVICE)
    labels = list(torch.randn(E, n, 2, generator=g, device=DEVICE).softmax(-1))
    configs = [train.TrainConfig(loss=loss, epochs=1, seed=e // 4) for e in range(E)]

    def together() -> tuple:
        return (heads.finetune_heads(x, labels, configs),)

    def one_by_one() -> tuple:
        return (torch.cat([heads.finetune_heads(x, [y], [c]) for y, c in zip(labels, configs, strict=True)]),)

    shape = f"E={E} N={n} D={D}, {n // CONFIG.batch_size} steps"
    return Case(shape, {"together": together, "one by one": one_by_one}, one_by_one)


def cases(row: str, loss: str) -> Iterator[Case]:
    """One at a time holds memory. Heads alone are run with one loss."""
    if row in BATCHES:
        yield head_case(BATCHES[row], loss)
    elif row == "T4":
        for E, B in [(E, B) for E in (1, 64, 1024) for B in (32, 4096)] if GPU else [(1, 32), (64, 32)]:
            yield heads_case(E, B, loss)
    elif row == "H" and loss == "logconf":
        yield from (finetune_case(E, loss) for E in (1, 8, 32))


def captured(step: Callable[[], tuple]) -> Callable[[], tuple]:
    """The same step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wall_ms(step, 0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return lambda: graph.replay() or outputs


def peak_mb(step: Callable) -> float:
    """Memory above what is held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measured_rows(args: Args) -> Iterator[dict]:
    """One row per case and provider."""
    bandwidth = copy_bandwidth()
    for loss, name in [(loss, name) for loss in conf_loss.MODES for name in args.rows]:
        for shape, steps, exact, n_bytes in cases(name, loss):
            torch.compiler.reset()
            want, floor = exact(), 1e3 * n_bytes / bandwidth
            for provider, step in steps.items():
                step = captured(step) if provider.endswith("graph") else step
                times = spread(wall_ms(step, args.seconds))
                off = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(step(), want, strict=True)]
                yield {
                    "row": name, "shape": shape, "loss": loss, "provider": provider, **times,
                    "cold_ms": triton.testing.do_bench(step, return_mode="median") if GPU else None,
                    "above_mb": peak_mb(step) if GPU else None, "launches": launched(profiled(step)) if GPU else None,
                    "error": max(off[:1] + off[2:]), "error_dh": (*off, None)[1],
                    "floor_ms": floor or None, "floors": times["p50_ms"] / floor if floor else None,
                }  # fmt: skip


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "bench.kernels", __doc__)
    write_rows(measured_rows(args), args.csv)


if __name__ == "__main__":
    run_script(main)
