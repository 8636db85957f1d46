"""What the machine does, for plan.py: its peaks by data sheet or timed, and one longest batch of a kind of work, measured."""

import ctypes
import dataclasses
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

import debate
import train
from common import InputError, print0, world
from generate import ENGINES, DebateConfig
from model import device
from sizes import GPUS, Gpu, shape_of
from steps import Held, Run


def machine(config) -> tuple[str, Gpu, int]:
    """Name, peaks and number of the GPUs to plan for: the flags', or what is here, a product and a copy timed."""
    gpus, cpu = config.gpus or max(1, torch.cuda.device_count()), device().type == "cpu"
    if config.gpu and config.dtype != "bfloat16":
        raise InputError(f"--dtype {config.dtype} --gpu {config.gpu}: the table of GPUs holds bfloat16 rates only")
    if config.gpu:
        return config.gpu, GPUS[config.gpu], gpus
    n = 512 if cpu else 8192
    a, b = torch.ones(n, n, dtype=getattr(torch, config.dtype), device=device()), torch.ones(n, 4 * n, device=device())
    product, copy = (min(seconds_of(fn) for _ in range(3)) for fn in (lambda: a @ a, b.clone))
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    memory = min(sizes, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return f"this {device().type}", Gpu(2e-12 * n**3 / product, memory / 1e9, 2e-9 * b.nbytes / copy, 32, cpu), gpus


def seconds_of(fn: Callable, *args) -> float:
    start = time.perf_counter()
    fn(*args)
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(reset: bool = False) -> int:
    """Peak bytes since the last reset: of torch on a GPU, of the process on a CPU."""
    if device().type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count
        Path("/proc/self/clear_refs").write_text("5")
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def compare(peaks: dict) -> None:
    """Measure a longest batch of each kind in `peaks` of finetuning and debates, on all ranks; print it beside the estimate."""
    print0("\nmeasured here, an optimizer step or a batch of debates on the longest samples (estimated):")
    for kind, (gb, plan, work) in peaks.items():
        if kind.startswith("finetune") or kind == "debates debate":
            gc.collect()
            before = peak_memory(reset=True)
            took = debate_once(plan, work) if kind == "debates debate" else train_once(plan, work)
            used = (peak_memory() - before) / 1e9
            print0(f"  {plan.task} {kind}: {took:.3g} s ({estimated(plan, work):.3g}), {used:.3g} GB ({gb:.3g})")


def estimated(plan, work) -> float:
    """Seconds of the same batch by the plan's assumptions."""
    if isinstance(work, Run):
        return max(plan.train_step(work, plan.read(work, plan.longest)).values())
    m, (turns, seeds) = shape_of(work.model), plan.longest_debate(work)
    size = plan.samples(work, turns, seeds, plan.longest)
    step = max(plan.decode_step(m, turns, size * seeds, plan.longest).values())
    reading = 2 * m.body * size * plan.prompts(turns, seeds, plan.longest) / plan.rate["reading"]
    return reading + turns * plan.c.max_new_tokens * step


def debate_once(plan, work) -> float:
    settings = plan.c.settings(DebateConfig)
    debater, (turns, seeds) = ENGINES[settings.engine](work.model, settings, world()), plan.longest_debate(work)
    debater.is_end[:] = False  # every turn as long as it may be
    text, size = words(debater.tokenizer, sum(plan.longest)), plan.samples(work, turns, seeds, plan.longest)
    samples = [{"id": str(i), "text": text} for i in range(size)]
    return seconds_of(debate.run_protocol, debater, plan.task, "debate", samples, range(seeds), turns)


def train_once(plan, run) -> float:
    ranks = world().split(plan.group(run))
    classifier, length = Held().classifier(run.model, run.train, ranks), plan.read(run, plan.longest)
    config = dataclasses.replace(run.train, epochs=1, max_tokens=length)
    texts = [words(classifier.tokenizer, 2 * length)] * config.batch_size

    def seconds(steps: int) -> float:
        return seconds_of(train.finetune, classifier, steps * texts, torch.full((steps * len(texts), 2), 0.5), config)

    seconds(1)  # allocates and compiles
    return (seconds(3) - seconds(1)) / 2  # without what a run costs beside its steps


def words(tokenizer, tokens: int) -> str:
    """A text of about so many tokens."""
    each = len(tokenizer(" word" * 64, add_special_tokens=False)["input_ids"]) / 64
    return "word" + " word" * (round(tokens / each) - 1)
