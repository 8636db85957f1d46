"""The kernel benchmark: head, loss and their gradients, beside PyTorch, torch.compile and OpenAI's way.

    python -m bench.kernels --csv kernels.csv        every row that this machine can run

T1 to T3: B samples of K = 2 classes and their hidden states [B, T, D]. T4: loss and gradient of E heads at once. Every provider but openai returns the gradient of the B rows alone; openai that
of all of `hidden`, as its loop does.

Columns: median, 20th and 80th percentile of the wall time with a synchronised GPU; GPU time from a flushed L2 cache (cold);
peak memory above the inputs; kernel launches; worst relative error of loss and weight gradients, and of dh, against
float64; time to move the bytes once at the measured copy bandwidth (floor), and how many floors the median took.
"""

import csv
import dataclasses
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

import train
from common import flag, parse_dataclass, print0, run_script, write_text
from kernels import conf_loss
from kernels import head as head_kernel
from model import device
from stages import provenance

DEVICE = device()
GPU = DEVICE.type == "cuda"
CONFIG = train.TrainConfig()  # of the losses
SHARE = 0.5  # of the run: the confidence loss after its warm-up
COLUMNS = (
    "row", "shape", "loss", "provider", "p50_ms", "p20_ms", "p80_ms", "cold_ms", "tokens_per_s", "peak_mb", "above_mb",
    "launches", "error", "error_dh", "floor_ms", "floors", "note",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    rows: tuple = flag(("T1", "T2", "T3", "T4"), "which to run", choices=("T1", "T2", "T3", "T4"))
    seconds: float = flag(0.5, "of each measurement of wall time, at least 5 calls", float)
    csv: str = flag("", "file to write the rows to")


# ---- head and loss ----


@dataclasses.dataclass
class Case:
    """Inputs of one row; `hidden` is [B, T, D], `flat` the same as [B * T, D]; T4 has `logits` alone."""

    row: str
    shape: str
    loss: str
    labels: Tensor  # [E, B, K]
    hidden: Tensor | None = None
    rows: Tensor | None = None
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
        made += [(row, head_case, (row, B, T, D, loss)) for row, B in batches.items()]
        sizes = [(E, B) for E in (1, 64, 1024) for B in (32, 4096)] if GPU else [(1, 32), (64, 32)]
        made += [("T4", heads_case, (E, B, loss)) for E, B in sizes]
    return [(lambda make=make, a=a: make(*a)) for row, make, a in made if row in names]


def head_case(row: str, B: int, T: int, D: int, loss: str) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    lengths = torch.randint(T // 2, T + 1, (B,), generator=g, device=DEVICE)
    return Case(
        row, f"B={B} T={T} D={D} {str(hidden.dtype)[6:]}", loss,
        torch.randn(1, B, 2, generator=g, device=DEVICE).softmax(-1), hidden,
        (torch.arange(B, device=DEVICE) * T + lengths - 1).int(),
        torch.randn(2, D, generator=g, device=DEVICE) / D**0.5,
        n_bytes=3 * B * D * hidden.element_size() + 3 * 2 * D * 4,
    )  # fmt: skip


def heads_case(E: int, B: int, loss: str) -> Case:
    g = torch.Generator(DEVICE).manual_seed(0)
    logits, labels = (3 * torch.randn(E, B, 2, generator=g, device=DEVICE) for _ in range(2))
    return Case("T4", f"E={E} B={B}", loss, labels.softmax(-1), logits=logits, n_bytes=3 * 4 * logits.numel())


def loss_of(case: Case, z: Tensor, y: Tensor) -> Tensor:
    return conf_loss.cross_entropy(z, train.LOSSES[case.loss](z.detach(), y, SHARE, CONFIG))


def heads_loss(case: Case, z: Tensor) -> Tensor:
    return loss_of(case, z, case.labels)


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors if t is not None]


def eager(case: Case, forward: Callable | None = None) -> tuple[Tensor, ...]:
    """Loss and gradients with PyTorch's own operations: (loss, dh, dW) or, of heads, (loss, dz)."""
    if case.logits is not None:
        (z,) = leaves(case.logits)
        loss = (forward or heads_loss)(case, z)
        return loss, *torch.autograd.grad(loss.sum(), z)
    inputs = leaves(case.flat[case.rows.long()], case.head_w)
    loss = (forward or head_loss)(case, *inputs)
    return loss, *torch.autograd.grad(loss, inputs)


def head_loss(case: Case, h: Tensor, head_w: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(h.to(torch.promote_types(h.dtype, torch.float32)), head_w)
    return loss_of(case, logits, case.labels[0].to(head_w.dtype))


def loop(case: Case) -> tuple[Tensor, ...]:
    """T4 as one head after the other."""
    done = []
    for z, y in zip(case.logits, case.labels, strict=True):
        (z,) = leaves(z)
        loss = loss_of(case, z, y)
        done.append((loss, *torch.autograd.grad(loss, z)))
    return tuple(map(torch.stack, zip(*done, strict=True)))


def openai(case: Case) -> tuple[Tensor, ...]:
    """Last tokens picked sample by sample with lengths that lie on the device, gradient of all of `hidden`."""
    B, T, _ = case.hidden.shape
    lengths = case.rows - torch.arange(B, device=DEVICE) * T
    hidden, head_w = leaves(case.hidden, case.head_w)
    last = torch.stack([hidden[i, lengths[i]] for i in range(B)])
    loss = loss_of(case, torch.nn.functional.linear(last.float(), head_w), case.labels[0])
    return loss, *torch.autograd.grad(loss, (hidden, head_w))


def compiled(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    torch.compiler.reset()
    forward = torch.compile(heads_loss if case.logits is not None else head_loss, dynamic=False)
    return lambda: eager(case, forward)


def ours(case: Case) -> tuple[Tensor, ...]:
    """Three launches: head, loss with its gradient, head's gradient; of heads one."""

    def loss(z: Tensor) -> tuple[Tensor, Tensor]:
        return conf_loss.conf_loss(z, case.labels, case.loss, CONFIG.aux_coef, CONFIG.alpha, CONFIG.beta)

    if case.logits is not None:
        return loss(case.logits)
    value, g = loss(head_kernel.forward(case.flat, case.rows, case.head_w)[None])
    return value[0], *head_kernel.backward(case.flat, case.rows, case.head_w, g[0])


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
    if not heads and B <= 256:
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
        **{n: None if getattr(case, n) is None else getattr(case, n).double() for n in ("head_w", "logits", "labels")},
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


def measured_rows(args: Args):
    """One row per case and provider."""
    bandwidth = copy_bandwidth()
    print0(f"copy: {bandwidth / 1e9:.0f} GB/s read and written")
    for make in cases(args.rows):
        case = make()
        floor = 1e3 * case.n_bytes / bandwidth
        for name, build in providers(case).items():
            step = build()
            row = dict.fromkeys(COLUMNS) | {"row": case.row, "shape": case.shape, "loss": case.loss, "provider": name}
            row |= spread(wall_ms(step, args.seconds))
            row["error"], row["error_dh"] = errors(case, step())
            if GPU:
                synchronise()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                row["above_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                row["cold_ms"], row["launches"] = cold_ms(step), launches(step)
            yield row | {"floor_ms": floor, "floors": row["p50_ms"] / floor}


# ---- the table ----


def absent():
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
            "needs a GPU, and so do T2, T3 and the full sizes of T1 and T4",
        )


def shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_rows(rows: Iterable[dict], path: str) -> None:
    """Print each row as it comes and write it to `path`, if it is named, with device, commit and versions."""
    here = provenance()
    here = {"device": here["device"], "commit": here["commit"]} | {
        k: here["versions"][k] for k in ("torch", "triton", "transformers")
    }
    print0(", ".join(f"{k} {v}" for k, v in here.items()))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *here], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: shown(v) for k, v in (row | here).items()})
        if path:
            write_text(Path(path), text.getvalue())
        if row["note"]:
            print0(f"{row['row']} | {row['provider']} | {row['note']}")
            continue
        measured = [f"{c} {shown(row[c])}" for c in COLUMNS[4:] if row[c] is not None]
        print0(" | ".join([*(str(row[c]) for c in COLUMNS[:4]), *measured]))
    if path:
        print0(f"wrote {path}")


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "bench.kernels", __doc__)
    notes = (dict.fromkeys(COLUMNS) | {"row": r, "provider": p, "note": n} for p, r, n in absent())
    write_rows((row for rows in (measured_rows(args), notes) for row in rows), args.csv)


if __name__ == "__main__":
    run_script(main)
