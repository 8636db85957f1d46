"""What a run would cost before it starts: hours, memory per GPU, disk. Downloads nothing and runs no model.

python w2s.py plan --preset paper --gpu h100-80gb --gpus 8     for a machine that is not here
python w2s.py plan --preset tiny --measure                     runs one longest batch of each kind here, to compare
python w2s.py plan --preset auto                               the largest preset that fits here, with the flags it needs
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator

from common import InputError, group_size, print0
from data.prepare import TASKS, TEST_CAP, TRAIN_CAP, load_rows
from generate import batch_size
from measure import compare, machine
from model import ModelSpec
from sizes import CPU_CACHE_TOKENS, SIZES, Gpu, Shape, decoding_memory, fitting_tokens, shape_of
from steps import Debates, Run, ZeroShot

CHARACTERS = 4.3  # per token of English
INTRODUCTION, INSTRUCTION, LABEL = 30, 25, 7  # tokens: before the sample, of a turn's instruction, of a speaker's name
ASSUMED_UTILIZATION = {"training": 0.4, "reading": 0.4, "bandwidth": 0.3, "link": 0.8, "memory": 0.95}  # of the peaks
LAUNCHES = 0.3e-3  # seconds per layer that a decode step takes at least on a GPU, however few its rows: assumed too


def sizes_of(task: str) -> tuple[int, ...]:
    """A task's line in SIZES, or the same counted in a task file. Raises InputError where neither is there."""
    if task not in SIZES and not TASKS[task].file:
        raise InputError(f"plan: the lengths of task {task} are not known; give it a line in SIZES (sizes.py)")
    return SIZES[task] if task in SIZES else counted(task)


@functools.cache
def counted(task: str) -> tuple[int, ...]:
    """What SIZES holds of a task, from its rows: tokens by characters."""
    train, test = load_rows(task, "train", None)[:TRAIN_CAP], load_rows(task, "test", None)[:TEST_CAP]
    sizes = [len(train), len(test)]
    for field in ("text", "evidence"):
        tokens = [math.ceil(len(r.get(field, "")) / CHARACTERS) for r in train + test]
        sizes += [math.ceil(sum(tokens) / len(tokens)), max(tokens)]
    return tuple(sizes)


class Plan:
    """Costs of a task's stages under `config` on `gpus` of `gpu`. Of a stage, `work` says what it does (steps.py)."""

    def __init__(self, config, task: str, gpu: Gpu, gpus: int):
        self.c, self.task, self.gpu, self.gpus = config, task, gpu, gpus
        self.e = 2 if config.dtype == "bfloat16" else 4  # bytes per element
        rows, tests, mean, longest, evidence, longest_evidence = sizes_of(task)
        self.half, self.tests = min(rows, config.limit_train or rows) // 2, min(tests, config.limit_test or tests)
        self.mean = min(mean, config.max_sample_tokens), evidence  # tokens of (sample, evidence)
        self.longest = min(longest, config.max_sample_tokens), longest_evidence
        self.said = config.max_new_tokens + LABEL  # tokens of a turn
        frozen = bool(config.lora_rank)  # weights then have no gradient
        self.each = 6 - 2 * frozen + 2 * config.checkpointing  # FLOPs per trained token and parameter
        peaks = {"training": 1e3 * gpu.tflops, "reading": 1e3 * gpu.tflops, "bandwidth": gpu.gbps, "link": gpu.link}
        self.rate = {name: 1e9 * peak * ASSUMED_UTILIZATION[name] for name, peak in peaks.items()}  # FLOP/s, bytes/s

    def kind(self, work) -> str:
        """Stages of one kind differ in memory only by the lengths of what they read."""
        if isinstance(work, Debates):
            return f"debates {work.protocol}"
        role = "weak" if work.model == ModelSpec.parse(self.c.weak) else "strong"
        what = "zero-shot" if isinstance(work, ZeroShot) else "heads" if work.heads else "finetune"
        return f"{what} {role}"

    def group(self, run) -> int:
        """GPUs that share a finetuning; heads are trained on one."""
        asked = self.c.weak_gpus if self.kind(run).endswith("weak") else self.c.strong_gpus
        return 1 if run.heads else group_size(self.gpus, asked)

    def read(self, run, sample: tuple[int, int]) -> int:
        """Tokens that a finetuned model reads of a sample of (text, evidence) tokens."""
        beside = {"nothing": 0, "sides": 2 * LABEL, "evidence": sample[1]}
        return min(run.train.max_tokens, sample[0] + beside.get(run.reads, run.turns * self.said))

    def shares(self) -> int:
        """GPUs that hold one debater together."""
        return self.gpus if self.c.engine == "sharded" else 1

    def cache_tokens(self, work) -> int:
        """Keys and values that a batch of debates may fill, as the debater finds it beside the models in memory."""
        if self.c.cache_tokens or self.gpu.cpu:
            return self.c.cache_tokens or CPU_CACHE_TOKENS
        free = 1e9 * self.gpu.gb * ASSUMED_UTILIZATION["memory"] - sum(self.debating_models(work).values())
        return fitting_tokens(free, shape_of(work.model), self.e, self.c.max_new_tokens, self.shares())

    def debating_models(self, work) -> dict[str, float]:
        """Bytes per GPU of the debater, and of the weak model that market-making asks."""
        m, weak = shape_of(work.model), shape_of(ModelSpec.parse(self.c.weak))
        parts = {"weights": self.e * (m.body / self.shares() + m.V * m.D * (2 - m.tied))}
        asked = {"weak model": self.e * (weak.body + weak.V * weak.D)}
        return parts | (asked if work.protocol == "market_making" else {})

    def samples(self, work, turns: int, seeds: int, sample: tuple[int, int]) -> int:
        """How many samples are debated at once."""
        characters = int(CHARACTERS * sum(sample))
        return batch_size(self.cache_tokens(work), characters, seeds, turns, self.c.max_new_tokens)

    def prompts(self, turns: int, seeds: int, sample: tuple[int, int]) -> int:
        """Tokens read for a sample's debates: what opens all of them once, then what is asked and was said."""
        return INTRODUCTION + sum(sample) + seeds * turns * (INSTRUCTION + self.said)

    def longest_debate(self, work) -> tuple[int, int]:
        """The most turns, and how many debate seeds, generated together, have them."""
        return max(Counter(work.turns.values()).items())

    def decode_step(self, m: Shape, turns: int, rows: int, sample: tuple[int, int]) -> dict[str, float]:
        """Seconds of a decode step in the middle of a debate, by what may limit it."""
        columns = INTRODUCTION + sum(sample) + INSTRUCTION + (turns - 1) / 2 * self.said + self.c.max_new_tokens / 2
        moved = self.e * (m.body + m.V * m.D + rows * columns * m.kv)
        limits = {"bandwidth": moved / self.rate["bandwidth"], "reading": 2 * m.body * rows / self.rate["reading"]}
        return limits if self.gpu.cpu else limits | {"launches": m.blocks * LAUNCHES}

    def train_step(self, run, tokens: int) -> dict[str, float]:
        """Seconds of an optimizer step, by what may limit it (see LEGEND)."""
        m, G, rank = shape_of(run.model), self.group(run), self.c.lora_rank
        computed = self.each * m.body * self.c.batch_size * tokens / G
        sent = (8 * m.adapters(rank) if rank else (2 * self.e + 4) * m.body) * (G - 1) / G
        return {"training": computed / self.rate["training"], "link": sent / self.rate["link"]}

    def cost(self, work) -> Counter:
        """Tokens, FLOPs, steps, bytes on disk, and the run's seconds by the assumption that they rest on."""
        m, total, at_once = shape_of(work.model), Counter(), self.gpus  # so many GPUs read
        match work:
            case Debates():
                for turns, seeds in Counter(work.turns.values()).items():
                    samples, spoken = self.samples(work, turns, seeds, self.mean), 2 * self.half * seeds * turns
                    steps = 2 * math.ceil(self.half / samples) * turns * self.c.max_new_tokens
                    step = self.decode_step(m, turns, samples * seeds, self.mean)
                    total.update({max(step, key=step.get): steps * max(step.values()) / self.gpus})
                    total.update(steps=steps, stepping=steps * max(step.values()), said=spoken * self.c.max_new_tokens)
                    total["read"] += 2 * self.half * self.prompts(turns, seeds, self.mean)
                    total["bytes"] += spoken * (5 * self.c.max_new_tokens + 200)
            case ZeroShot():
                length = INTRODUCTION + INSTRUCTION + self.mean[0] + work.evidence * self.mean[1]
                total["read"] = (self.half + self.tests) * length
            case Run():
                length, G, at_once = self.read(work, self.mean), self.group(work), 1 if work.heads else self.gpus
                rows = {"train_b": (self.half, length), "test": (self.tests, self.mean[0])}
                total["read"] = sum(math.prod(rows[part]) for part in work.predicts) + work.heads * self.half * length
                total["bytes"] = 60 * sum(rows[part][0] for part in work.predicts)
                kept = (4 if G > 1 else self.e) * (m.body + m.V * m.D)
                total["bytes"] += work.keep * (4 * m.adapters(self.c.lora_rank) or kept)
                if not work.heads:
                    steps = math.ceil(self.half / self.c.batch_size) * self.c.epochs
                    step = self.train_step(work, length)
                    total.update({max(step, key=step.get): steps * max(step.values()) * G / self.gpus})
                    total.update(steps=steps, stepping=steps * max(step.values()))
                    total["trained"] = self.half * length * self.c.epochs
        total["flops"] = m.body * (2 * (total["read"] + total["said"]) + self.each * total["trained"])
        total["reading"] += 2 * m.body * total["read"] / at_once / self.rate["reading"]
        return total

    def memory(self, work) -> dict[str, float]:
        """Peak bytes per GPU by part; none for zero-shot reading, which needs less than debates."""
        c, m, e = self.c, shape_of(work.model), self.e
        if isinstance(work, ZeroShot):
            return {}
        if isinstance(work, Debates):
            turns, seeds = self.longest_debate(work)
            longest = seeds * (INTRODUCTION + sum(self.longest) + INSTRUCTION + turns * self.said)
            tokens = max(self.cache_tokens(work), longest)
            rows = max(k * self.samples(work, n, k, self.mean) for n, k in Counter(work.turns.values()).items())
            read = rows * (INSTRUCTION + self.said)
            used = decoding_memory(m, e, tokens, rows, read, self.shares(), self.gpu.cpu)
            return self.debating_models(work) | used
        G, longest = self.group(work), self.read(work, self.longest)
        if work.heads:
            return {"weights": e * (m.body + m.V * m.D), "activations": e * max(longest, 4096) * (2 * m.D + 3 * m.F)}
        tokens = max(longest, min(math.ceil(c.batch_size / G) * longest, c.max_tokens_per_forward))
        return finetuning_memory(m, G, tokens, longest, c.checkpointing, e, self.gpu.cpu, c.lora_rank)


def finetuning_memory(
    m: Shape, group: int, tokens: int, longest: int, checkpointing: bool, e: int, cpu: bool, rank: int
) -> dict:
    """Peak bytes per GPU, by part, of a step on `tokens` in one forward, of samples up to `longest`; `rank` of adapters or 0."""
    kept = e * (8 * m.D + 2 * m.d * (m.heads + m.kv_heads) + 4 * m.F)  # per token and block
    kept += 4 * m.heads * longest * (cpu and e == 2)  # scores, which no other attention stores
    activations = tokens * (e * m.D * (m.blocks - 1) + kept if checkpointing else m.blocks * kept)
    if rank:
        return {"frozen": e * (m.body + m.V * m.D), "adapters": 16 * m.adapters(rank), "activations": activations}
    # float32 weights, gradients, two moments; of an unsharded bfloat16 model also its copy and that one's gradient
    state = (20 if group == 1 and e == 2 else 16) * (m.body + m.V * m.D) / group
    gathered = {"gathered": e * m.V * m.D + (3 * e + 4) * m.body / m.blocks} if group > 1 else {}
    return {"state": state, "activations": activations} | gathered


# ---- what fits ----


def works(experiments: list, gpu: Gpu, gpus: int, changes: dict) -> Iterator[tuple[Plan, object]]:
    """What the stages do, each with the plan of its task under `changes` to the configuration."""
    for e in experiments:
        plan = Plan(dataclasses.replace(e.config, **changes), e.task, gpu, gpus)
        yield from ((plan, stage.work) for stage in e.stages() if stage.work)


def peaks(experiments: list, gpu: Gpu, gpus: int, changes: dict) -> dict[str, tuple[float, Plan, object]]:
    """Of every kind of work the one that needs most memory: GB, plan, work."""
    most: dict[str, tuple[float, Plan, object]] = {}
    for plan, work in works(experiments, gpu, gpus, changes):
        gb = sum(plan.memory(work).values()) / 1e9
        if gb > most.get(plan.kind(work), (0,))[0]:
            most[plan.kind(work)] = gb, plan, work
    return most


def fitting(experiments: list, gpu: Gpu, gpus: int) -> dict | None:
    """Changes to the configuration with which all fits, each the first that helps what needs most; None if none does."""
    changes: dict = {}
    usable = gpu.gb * ASSUMED_UTILIZATION["memory"]
    while True:
        gb, plan, work = max(peaks(experiments, gpu, gpus, changes).values(), key=lambda peak: peak[0])
        if gb <= usable:
            return changes
        c = plan.c
        if isinstance(work, Debates):
            fewer = range(plan.cache_tokens(work) // 1000 * 1000, 0, -1000)
            ways = [*({"cache_tokens": n} for n in fewer), {"engine": "sharded"}]
        else:
            flag, G, most = f"{plan.kind(work).split()[1]}_gpus", plan.group(work), c.max_tokens_per_forward
            sizes = [{flag: n} if n > G else {} for n in range(G, gpus + 1) if gpus % n == 0]
            forwards = [{}, *({"max_tokens_per_forward": n} for n in (16384, 8192, 4096) if n < most)]
            combinations = itertools.product(sizes, ({}, {"checkpointing": True}), forwards)
            ways = [size | checkpointing | forward for size, checkpointing, forward in combinations]
        smaller = (Plan(dataclasses.replace(c, **way), plan.task, gpu, gpus).memory(work) for way in ways)
        way = next((way for way, parts in zip(ways, smaller, strict=True) if sum(parts.values()) <= 1e9 * usable), None)
        if way is None:
            return None
        changes |= way


def flags(changes: dict) -> str:
    return " ".join(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in changes.items())


def choose_preset(experiments_of: Callable[[str], list]) -> None:
    """Print the largest preset that fits and the flags it needs; to stderr, why."""
    for preset in ("paper", "paper-lora", "small"):
        experiments = experiments_of(preset)
        name, gpu, gpus = machine(experiments[0].config)
        changes = None if gpu.cpu else fitting(experiments, gpu, gpus)
        fits = "fits" if changes is not None else "does not fit"
        print(f"preset {preset} {fits} {gpus} x {name}, {gpu.gb:.4g} GB", file=sys.stderr)
        if changes is not None:
            break
    else:
        preset, changes = "tiny", {}
    print(preset, flags(changes))


# ---- the command ----

LEGEND = """
hours: tokens read x 2 N / (GPUs that read x reading); steps x seconds per step / runs or batches at once. Every turn is as long
as it may be. A decode step takes the longest of (weights + keys and values) / bandwidth, rows x 2 N / reading, layers x
launches; an optimizer step the longer of batch x tokens x 6 N (4 N of a frozen model with adapters; 2 N more with
recomputation) / (group x training) and, sharded, two gathers and a float32 reduction / link, or what adapters send.
What two tasks have in common, such as floor and ceiling on the same samples, is made once and counted in both."""


def show(experiments: list) -> None:
    """Print a line per kind of stage, and peak memory. Raises InputError on what does not fit."""
    config = experiments[0].config
    name, gpu, gpus = machine(config)
    usable = gpu.gb * ASSUMED_UTILIZATION["memory"]
    print0(f"{gpus} x {name}: {gpu.tflops:.4g} TFLOP/s, {gpu.gb:.4g} GB, {gpu.gbps:.4g} GB/s, link {gpu.link:.4g} GB/s")
    weak, strong = (shape_of(ModelSpec.parse(spec)) for spec in (config.weak, config.strong))
    for role, m in (("weak", weak), ("strong", strong)):
        print0(f"{role}: N = {m.body / 1e9:.4g} G in {m.blocks} blocks, {m.V * m.D / 1e9:.3g} G in the embedding")
    table: dict[tuple[str, str], Counter] = {}
    texts: set[tuple] = set()  # that heads read: they become features once
    for plan, work in works(experiments, gpu, gpus, {}):
        cost, key = plan.cost(work), (plan.task, plan.kind(work))
        if isinstance(work, Run):
            key = plan.task, f"{plan.kind(work)} {work.reads}" + f" t{work.turns}" * (work.turns > 0)
            text = *key, getattr(work, "debate_seed", work.name)
            cost = Counter(bytes=cost["bytes"]) if work.heads and text in texts else cost
            texts.add(text)
        table.setdefault(key, Counter()).update(cost + Counter(stages=1))
    columns = "stages    M read M trained     PFLOP   k steps   ms/step        GB     hours  rest on"
    print0(f"\n{'task':20}{'kind':34}{columns}")
    for (task, kind), c in [*table.items(), (("all", ""), sum(table.values(), Counter()))]:
        seconds = {k: c[k] for k in (*ASSUMED_UTILIZATION, "launches") if c[k]}
        amounts = c["read"] / 1e6, c["trained"] / 1e6, c["flops"] / 1e15, c["steps"] / 1e3
        amounts += 1e3 * c["stepping"] / max(1, c["steps"]), c["bytes"] / 1e9, sum(seconds.values()) / 3600
        numbers = "".join(f"{x:10,.0f}" if x >= 1e4 else f"{x:10.4g}" for x in amounts)
        rest = ", ".join(f"{k} {v / sum(seconds.values()):.0%}" for k, v in seconds.items())
        print0(f"{task:20}{kind:30}{c['stages']:10}{numbers}  {rest}")
    assumed = ", ".join(f"{k} {v}" for k, v in ASSUMED_UTILIZATION.items())
    print0(f"{LEGEND}\nassumed, until measured: of the peaks {assumed}; launches {1e3 * LAUNCHES:.2g} ms per layer")
    print0(f"\npeak memory per GPU, of {gpu.gb:.4g} GB x {ASSUMED_UTILIZATION['memory']}, in the task that needs most:")
    most = peaks(experiments, gpu, gpus, {})
    for kind, (gb, plan, work) in most.items():
        parts = " + ".join(f"{k} {v / 1e9:.3g}" for k, v in plan.memory(work).items())
        print0(f"  {plan.task} {kind}: {parts} = {gb:.1f} GB")
    sizes = [2e-9 * (m.body + m.V * m.D * (2 - m.tied)) for m in (weak, strong)]  # in the bfloat16 of their files
    print0(f"host memory while {gpus} processes load the strong model: {gpus * sizes[1]:.3g} GB, {sizes[1]:.3g} each")
    print0(f"disk beside the results: models, {sum(sizes):.3g} GB; twice that where first-generation Qwen is converted")
    gb, plan, work = max(most.values(), key=lambda peak: peak[0])
    if config.measure:
        compare(most)
    elif gb > usable:
        ways = fitting(experiments, gpu, gpus)
        would = flags(ways) if ways else "a smaller model (--weak, --strong), or GPUs with more memory"
        needs = f"{plan.task} {plan.kind(work)} needs {gb:.1f} GB per GPU"
        raise InputError(f"{needs}, {name} has {gpu.gb:.4g} GB, {usable:.1f} to use; would fit: {would}")
