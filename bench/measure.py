"""What the benchmarks share: clocks, the rates of this device, counts of a profile, and the table."""

import csv
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from common import print0
from model import device, resolve_dtype
from stages import provenance

DEVICE = device()
GPU = DEVICE.type == "cuda"


def synchronise() -> None:
    if GPU:
        torch.cuda.synchronize()


def wall_ms(work: Callable, seconds: float = 0.5) -> list[float]:
    """Milliseconds of at least 5 calls after 3 unmeasured ones, for about `seconds`."""
    for _ in range(3):
        work()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{p}_ms": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 20, 80)}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy."""
    source = torch.empty(1 << (30 if GPU else 26), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(wall_ms(lambda: target.copy_(source))) / 1e3)


def matmul_rate() -> float:
    """FLOP/s of a square matrix product in the dtype of the models: bfloat16 on a GPU."""
    n = 8192 if GPU else 512
    a = torch.randn(n, n, device=DEVICE).to(resolve_dtype("auto"))
    return 2 * n**3 / (statistics.median(wall_ms(lambda: a @ a)) / 1e3)


def profiled(work: Callable) -> Counter:
    """How often each (device, name) stands in a profile of `work`: CUDA calls and what they start; without a GPU, operators."""
    kind = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        work()
        synchronise()
    return Counter((e.device_type.name, e.name) for e in profile.events() if not e.is_user_annotation)


def launched(calls: Counter) -> int:
    """Kernels, copies and fills."""
    return sum(n for (where, _), n in calls.items() if where == "CUDA")


def waited(calls: Counter) -> int:
    """Times that the CPU waits for a stream or an event; cudaDeviceSynchronize is the benchmarks' own."""
    return sum(n for (_, name), n in calls.items() if name in ("cudaStreamSynchronize", "cudaEventSynchronize"))


def write_rows(rows: Iterable[dict], path: str, dtype: str = "auto") -> list[dict]:
    """Print each row as it comes, and write it to `path`, if it is named, with device, dtype, commit and versions."""
    here = provenance()
    facts = {"device": here["device"], "dtype": str(resolve_dtype(dtype))[6:], "threads": torch.get_num_threads()}
    facts |= {"commit": here["commit"]} | {k: here["versions"][k] for k in ("torch", "triton", "transformers")}
    print0(", ".join(f"{k} {v}" for k, v in facts.items()))
    done = []
    for row in rows:
        texts = {k: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        print0(" | ".join(f"{k} {v}" for k, v in texts.items() if v))
        if path:
            with open(path, "a" if done else "w", newline="") as file:
                writer = csv.DictWriter(file, [*texts, *facts], lineterminator="\n")
                if not done:
                    writer.writeheader()
                writer.writerow(texts | facts)
        done.append(row)
    return done
