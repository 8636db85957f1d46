"""What a run would cost, before it starts: hours, memory a GPU, disk. Computes nothing, downloads nothing.

Every figure is printed with what it is made of. Sizes come from the preset and the sources' row counts, tokens from mean
lengths, FLOPs as 2 N a token read and 6 N trained (8 N with recomputation; N: parameters of the blocks), rates from data
sheets or, without --gpu, from this machine timed on the spot, times `SHARES`. Estimates, not measurements. Memory follows
what train.py and debate.py allocate and is checked against measured peaks in tests/test_plan.py.
"""

import dataclasses
import math
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import InputError, print0, read_json
from data.prepare import TASKS
from generate import DebateConfig
from model import ModelSpec, device

ROWS = {  # (train after the cap of 20,000, test) on the hub; facts and places from their tables; or its source's
    "sciq": (11_679, 1_000), "boolq": (9_427, 3_270), "cosmos_qa": (20_000, 2_985), "anthropic_hh": (20_000, 8_552),
    "facts": (2_227, 1_076), "places": (791, 396), "sciq_evidence": (10_481, 884),
}  # fmt: skip
TOKENS = {  # of a sample: mean, and at most (or --max-sample-tokens); or its source's
    "sciq": (22, 100), "boolq": (146, 1024), "cosmos_qa": (102, 250), "anthropic_hh": (153, 1024), "facts": (15, 30),
    "places": (15, 30), "boolq_evidence": (14, 40), "cosmos_qa_evidence": (30, 80),
}  # fmt: skip
EVIDENCE = {  # tokens of the passage that debaters read, likewise
    "sciq_evidence": (100, 900), "boolq_evidence": (132, 984), "cosmos_qa_evidence": (72, 170),
    "facts_evidence": (12, 30), "places_evidence": (12, 30),
}  # fmt: skip
CHARACTERS = 4.3  # a token of English
INTRODUCTION, INSTRUCTION, LABEL = 30, 25, 7  # tokens: before the sample, of a turn's instruction, of a speaker's name
SHARES = {"training": 0.4, "reading": 0.4, "bandwidth": 0.3, "link": 0.8, "memory": 0.95}  # of the peaks: assumptions


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Peaks of one device: dense bfloat16 TFLOP/s, memory GB, its GB/s, GB/s to the others one way."""

    tflops: float
    gb: float
    gbps: float
    link: float
    flash: bool = True  # attention that stores no scores


GPUS = {  # NVIDIA's data sheets of the SXM and PCIe boards; without sparsity; link: NVLink, or PCIe 4.0 x16
    "h100-80gb": Gpu(989, 80, 3350, 450),
    "h200-141gb": Gpu(989, 141, 4800, 450),
    "a100-80gb": Gpu(312, 80, 2039, 300),
    "l40s-48gb": Gpu(362, 48, 864, 32),
    "rtx4090-24gb": Gpu(165, 24, 1008, 32),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of the Llama and Qwen families: width, blocks, MLP width, heads, heads of keys, head width, vocabulary."""

    D: int
    blocks: int
    F: int
    heads: int
    kv_heads: int
    d: int
    V: int
    tied: bool = False

    @property
    def Q(self) -> int:
        return self.heads * self.d

    @property
    def K(self) -> int:
        return self.kv_heads * self.d

    @property
    def block(self) -> int:
        """Parameters of a block, without norms and biases."""
        return 2 * self.D * (self.Q + self.K) + 3 * self.D * self.F

    @property
    def body(self) -> int:
        return self.blocks * self.block

    @property
    def embeddings(self) -> int:
        return self.V * self.D


SHAPES = {  # of the presets' models, so that a plan needs no download
    "Qwen/Qwen-7B": Shape(4096, 32, 11008, 32, 32, 128, 151936),
    "Qwen/Qwen-14B": Shape(5120, 40, 13696, 40, 40, 128, 152064),
    "Qwen/Qwen2.5-0.5B": Shape(896, 24, 4864, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B": Shape(1536, 28, 8960, 12, 2, 128, 151936, True),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 64, 49152, True),
    "random-small": Shape(32, 2, 64, 4, 2, 8, 257, True),
    "random-large": Shape(64, 2, 128, 4, 2, 16, 257, True),
}


def shape_of(spec: ModelSpec) -> Shape:
    """From the table, or a local folder's config.json."""
    shape = SHAPES.get(spec.name)
    if shape is None:
        c = read_json(Path(spec.name) / "config.json")
        if c is None:
            raise InputError(f"model {spec.name!r}: plan knows {', '.join(SHAPES)}, and local folders")
        try:
            D, heads = c["hidden_size"], c["num_attention_heads"]
            kv_heads, d = c.get("num_key_value_heads") or heads, c.get("head_dim") or D // heads
            shape = Shape(D, c["num_hidden_layers"], c["intermediate_size"], heads, kv_heads, d, c["vocab_size"],
                          bool(c.get("tie_word_embeddings")))  # fmt: skip
        except KeyError as e:
            raise InputError(
                f"model {spec.name!r}: plan reads configurations like Llama's; config.json lacks {e}"
            ) from None
    return dataclasses.replace(shape, blocks=spec.layers or shape.blocks)


def device_here() -> Gpu:
    """The peaks of this machine: a matrix product and a copy timed on the spot, memory as it says."""
    import torch

    dev = device()
    cuda, n = dev.type == "cuda", 8192 if dev.type == "cuda" else 512
    a = torch.ones(n, n, dtype=torch.bfloat16 if cuda else torch.float32, device=dev)
    b = torch.ones(2**28 if cuda else 2**22, device=dev)

    def seconds(work) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            work().view(-1)[0].item()
            best = min(best, time.perf_counter() - start)
        return best

    memory = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate, copied = 2 * n**3 / seconds(lambda: a @ a), 2 * b.nbytes / seconds(b.clone)
    return Gpu(rate / 1e12, memory / 1e9, copied / 1e9, 32, flash=cuda)


# ---- memory, bytes a GPU ----


def finetuning_memory(m: Shape, gpus: int, tokens: int, longest: int, checkpointing: bool, e: int, flash: bool) -> dict:
    """Peak of a step of train.py by part: `tokens` in one forward on a GPU, samples of `longest`, e bytes an element.

    A block keeps, a token: two norms (float32 input, normalised, output), queries, keys, values and their result, four
    MLP rows, and without flash attention float32 scores.
    """
    N = m.body + m.embeddings
    a_parameter = (
        16 if gpus > 1 or e == 4 else 20
    )  # float32 weight, gradient, two moments; a bfloat16 copy and gradient
    attention = e * (m.Q + 2 * m.K) + 4 * m.heads if flash else 4 * (3 * m.Q + m.heads * longest)
    kept = (8 + 4 * e) * m.D + attention + e * m.Q + 4 * e * m.F
    passing = e * m.F  # a gradient, before what it belongs to is freed
    block_by_block = (m.blocks - 1) * e * m.D + kept
    a_token = (block_by_block if checkpointing else m.blocks * kept) + passing
    parts = {"state": a_parameter * N / gpus}
    if gpus > 1:  # the embedding stays whole; of blocks the next one too, and a gradient on its way in float32
        parts["gathered"] = e * m.embeddings + (3 * e + 4) * m.block
    return parts | {"activations": max(tokens * a_token, e * m.embeddings)}


def predicting_memory(m: Shape, gpus: int, tokens: int, e: int, flash: bool, training: bool) -> dict:
    """Peak of a prediction: the optimizer's state stays; one block's activations pass."""
    parts = finetuning_memory(m, gpus, 0, 0, False, e, flash)
    state = parts if training else {"weights": e * (m.body + m.embeddings)}
    return state | {"activations": tokens * e * (2 * m.D + 3 * m.F)}


def cache_columns(opening: int, asked: int, said: int, new: int, turns: int) -> tuple[int, int]:
    """Columns of the KV buffer that generate.py's GrowingKVLayer ends with, and those in use at the end."""
    used = opening + (turns - 1) * said + asked + new - 1  # the last token is not read
    return -(-used // 64) * 64, used


def debating_memory(
    m: Shape, samples: int, seeds: int, columns: tuple[int, int], opening: int, fed: int, e: int, shares: int = 1
) -> dict:
    """Peak of a chunk of debates: `opening` tokens a sample are read at once, then `fed` a row before each turn.

    When half of the rows have ended, the others go on in a copy.
    Blocks and cache are cut into `shares` where the engine is sharded.
    """
    rows, (room, used), kv = samples * seeds, columns, 2 * m.blocks * m.K * e / shares
    reading = max(samples * opening, rows * fed) * e * (2 * m.D + 3 * m.F)
    repeated = 2 * rows * used * m.Q * e if m.K < m.Q else 0  # keys of grouped queries, in one block
    return {
        "weights": e * (m.body / shares + m.embeddings * (1 if m.tied else 2)),
        "KV cache": rows * room * kv,
        "rows left": rows // 2 * room * kv,
        "passing": max(reading, repeated + 3 * 4 * rows * m.V),
    }


class Need(NamedTuple):
    """Peak memory of one kind of work in bytes by part, and what would lower it: pairs (flags, parts)."""

    what: str
    kind: str
    parts: dict
    remedies: list

    @property
    def gb(self) -> float:
        return sum(self.parts.values()) / 1e9


# ---- one group of like stages ----


def length_read(name: str, text: int, said: int, most: int = 2048) -> int:
    """Tokens of a sample as a finetuned model reads it, with the turns that its stage's name tells."""
    turns = re.search(r"-t(\d+)-", name)
    named = 2 * LABEL * ("no_argument" in name)
    return min(most, text + named + (int(turns[1]) * (said + LABEL) if turns else 0))


class Plan:
    """Costs of an experiment's stages on `gpus` of `gpu`."""

    def __init__(self, config, task: str, gpu: Gpu, gpus: int):
        self.c, self.task, self.gpu, self.gpus = config, task, gpu, gpus
        self.e = 2 if config.dtype == "bfloat16" else 4
        self.weak, self.strong = (shape_of(ModelSpec.parse(s)) for s in (config.weak, config.strong))
        rows, tests = ROWS.get(task) or ROWS[TASKS[task].source]
        self.rows, self.tests = min(rows, config.limit_train or rows), min(tests, config.limit_test or tests)
        self.half = self.rows // 2
        mean, most = TOKENS.get(task) or TOKENS[TASKS[task].source]
        self.text, self.longest = min(mean, config.max_sample_tokens), min(most, config.max_sample_tokens)
        self.evidence, self.longest_evidence = EVIDENCE.get(task, (0, 0))
        self.said = config.max_new_tokens + LABEL  # a turn's tokens, at most

    def batch_size(self, tokens: int, seeds: int, turns: int, cache_tokens: int = 0) -> int:
        """Samples of so many tokens in one batch of debates."""
        limit = cache_tokens or self.c.cache_tokens
        return DebateConfig(self.c.max_new_tokens, cache_tokens=limit).batch_size(
            int(CHARACTERS * tokens), seeds, turns
        )

    def group(self, name: str) -> int:
        """GPUs that share a finetuning."""
        return min(self.c.weak_gpus if name.startswith("weak") else self.c.strong_gpus, self.gpus) or self.gpus

    def flops(self, kind: str, gpus: int = 0) -> float:
        """FLOP/s of so many GPUs, or all."""
        return (gpus or self.gpus) * self.gpu.tflops * 1e12 * SHARES[kind]

    def debates(self, turns: dict) -> tuple[dict, list[str], list[tuple]]:
        """Cost, derivation and memory of a protocol's transcripts; `turns` of each debate seed."""
        c, m, g = self.c, self.strong, self.gpu
        groups = sorted(Counter(turns.values()).items())  # (turns, debate seeds), generated together
        spoken = sum(n * k for n, k in groups)
        new = self.rows * spoken * c.max_new_tokens
        read = self.rows * (
            len(groups) * (INTRODUCTION + self.text + self.evidence) + spoken * (INSTRUCTION + self.said)
        )
        weights, kv = self.e * (m.body + m.embeddings), 2 * m.blocks * m.K * self.e
        steps_seconds, lines, memory = 0.0, [], []
        for n, seeds in groups:
            chunk = self.batch_size(self.text + self.evidence, seeds, n)
            chunks = math.ceil(self.half / chunk)
            steps = 2 * chunks * n * c.max_new_tokens
            rows = chunk * seeds
            columns = (
                INTRODUCTION + self.text + self.evidence + INSTRUCTION + (n - 1) / 2 * self.said + c.max_new_tokens / 2
            )
            a_step = weights + rows * columns * kv
            moved, computed = a_step / (g.gbps * 1e9 * SHARES["bandwidth"]), 2 * m.body * rows / self.flops("reading")
            seconds = max(moved, computed * self.gpus)
            steps_seconds += steps * seconds / self.gpus
            lines.append(
                f"decode {n} turns: 2 x {chunks} chunks x {n} x {c.max_new_tokens} = {steps:,} steps x "
                f"max(({weights / 1e9:.3g} GB + {rows} rows x {columns:.0f} columns x {kv:,} B) / ({g.gbps:.4g} GB/s x "
                f"{SHARES['bandwidth']}), {rows} x 2 x {m.body / 1e9:.3g} G / ({g.tflops:.3g} T x {SHARES['reading']})) = "
                f"{seconds * 1e3:.3g} ms / {self.gpus} GPUs = {steps * seconds / self.gpus / 3600:.3g} h"
            )
            opening = INTRODUCTION + self.longest + self.longest_evidence
            room = cache_columns(opening, INSTRUCTION, self.said, c.max_new_tokens, n)
            memory.append((n, seeds, room, opening))
        flops = 2 * m.body * read
        lines.insert(
            0,
            f"read {self.rows} x ({len(groups)} x {INTRODUCTION + self.text + self.evidence} + {spoken} turns x {INSTRUCTION + self.said}) = "
            f"{read / 1e6:.4g} M tokens x 2 x {m.body / 1e9:.3g} G = {flops / 1e15:.4g} PFLOP / ({self.gpus} x {g.tflops:.3g} T x "
            f"{SHARES['reading']}) = {flops / self.flops('reading') / 3600:.3g} h",
        )
        hours = (flops / self.flops("reading") + steps_seconds) / 3600
        cost = {"samples": self.rows, "tokens": read + new, "flops": flops + 2 * m.body * new, "hours": hours}
        return cost | {"bytes": 5 * new + 200 * spoken * self.rows}, lines, memory

    def zero_shot(self, run: str) -> tuple[dict, list[str]]:
        """Cost and derivation of reading the other half and the test split once, without training, by one process."""
        m = self.weak if run == "zero-shot-weak" else self.strong
        length = INTRODUCTION + self.text + INSTRUCTION + (self.evidence if run == "zero-shot-evidence" else 0)
        tokens = (self.half + self.tests) * length
        flops = 2 * m.body * tokens
        hours = flops / self.flops("reading", 1) / 3600
        line = f"{self.half} + {self.tests} rows x {length} tokens x 2 x {m.body / 1e9:.3g} G = {flops / 1e15:.3g} PFLOP on one GPU"
        return {"samples": self.half + self.tests, "tokens": tokens, "flops": flops, "hours": hours}, [line]

    def finetune(self, name: str, kept: bool, heads: bool) -> tuple[dict, list[str]]:
        """Cost and derivation of one run: train on a half, predict the other half and the test split."""
        c, g, m = self.c, self.gpu, self.weak if name.startswith("weak") else self.strong
        G = self.group(name) if not heads else self.gpus
        side = self.gpus // G  # runs side by side
        length = length_read(name, self.text, c.max_new_tokens)
        epochs = 0 if heads else c.epochs  # heads alone: every text is read once
        trained, steps = self.half * length * epochs, math.ceil(self.half / c.batch_size) * epochs
        predicted = self.half * length * (2 if heads else 1) + self.tests * self.text
        each = 8 if c.checkpointing else 6
        flops, reading = each * m.body * trained, 2 * m.body * predicted
        moved = (2 * self.e + 4) * m.body * (G - 1) / G if not heads else 0
        computing, sending = flops / self.flops("training", G), steps * moved / (g.link * 1e9 * SHARES["link"])
        hours = (max(computing, sending) + reading / self.flops("reading", G)) / side / 3600
        line = (
            f"a run: {self.half} rows x {epochs} epochs x {length} tokens x {each} x {m.body / 1e9:.4g} G = {flops / 1e15:.4g} PFLOP / "
            f"({G} x {g.tflops:.3g} T x {SHARES['training']}) = {computing / 3600:.3g} h, or {steps} steps x {moved / 1e9:.3g} GB / "
            f"({g.link:.3g} GB/s x {SHARES['link']}) = {sending / 3600:.3g} h, the longer; {predicted / 1e6:.3g} M predicted x 2 x "
            f"{m.body / 1e9:.3g} G / ({G} x {g.tflops:.3g} T x {SHARES['reading']}) = "
            f"{reading / self.flops('reading', G) / 3600:.3g} h; {side} runs side by side"
        )
        model = (4 if G > 1 else self.e) * (m.body + m.embeddings) if kept else 0
        cost = {"samples": self.half, "tokens": trained + predicted, "flops": flops + reading, "hours": hours}
        return cost | {"bytes": 60 * (self.half + self.tests) + model}, [line]

    def finetune_needs(self, name: str, heads: bool) -> list[Need]:
        """Of a run and of its predictions."""
        role, G = name.split("-")[0], self.group(name)
        m = self.weak if role == "weak" else self.strong
        longest = length_read(name, self.longest, self.c.max_new_tokens)

        def at_once(gpus: int, most: int) -> int:
            return max(longest, min(math.ceil(self.c.batch_size / gpus) * longest, most))

        def parts(gpus=G, most=self.c.max_tokens_per_forward, checkpointing=self.c.checkpointing) -> dict:
            return finetuning_memory(m, gpus, at_once(gpus, most), longest, checkpointing, self.e, self.gpu.flash)

        tokens = at_once(G, self.c.max_tokens_per_forward)
        read = min(4096, self.c.max_tokens_per_forward)
        state = predicting_memory(m, 1 if heads else G, read, self.e, self.gpu.flash, training=not heads)
        predicting = Need(f"{self.task} {name}: predictions, {read} tokens a forward", f"{role} predictions", state, [])
        remedies = [("--checkpointing", parts(checkpointing=True))]
        remedies += [
            (f"--max-tokens-per-forward {n}", parts(most=n)) for n in (16384, 8192, 4096, 2048) if longest <= n < tokens
        ]
        flag = f"--{role}-gpus"
        for n in (2, 4, 8, 16, 32, 64):
            if n > G:
                more = f" --gpus {n}" if n > self.gpus else ""
                remedies += [(f"{flag} {n}{more}", parts(gpus=n))]
                remedies += [(f"{flag} {n}{more} --checkpointing", parts(n, checkpointing=True))]
        how = ", recomputing" if self.c.checkpointing else ""
        what = f"{self.task} {name}: finetuning, {tokens} tokens a forward{how}"
        return [predicting] if heads else [Need(what, f"{role} finetuning", parts(), remedies), predicting]

    def debate_needs(self, protocol: str, memory: list[tuple]) -> list[Need]:
        """Of a protocol's debates, by their length."""
        needs = []
        for turns, seeds, columns, opening in memory:

            def parts(
                limit: int, engine=self.c.engine, turns=turns, seeds=seeds, columns=columns, opening=opening
            ) -> dict:
                chunk, shares = (
                    self.batch_size(self.longest + self.longest_evidence, seeds, turns, limit),
                    self.gpus if engine == "sharded" else 1,
                )
                fed = INSTRUCTION + self.said
                need = debating_memory(self.strong, chunk, seeds, columns, opening, fed, self.e, shares)
                asked = {"weak model": self.e * (self.weak.body + self.weak.embeddings)}
                return need | (asked if protocol == "market_making" else {})

            limit = self.c.cache_tokens
            chunk = self.batch_size(self.longest + self.longest_evidence, seeds, turns)
            what = (
                f"{self.task} {protocol}: {turns} turns, {chunk} samples x {seeds} seeds, room for {columns[0]} columns"
            )
            remedies = [(f"--cache-tokens {n * 1000}", parts(n * 1000)) for n in range(limit // 1000, 0, -1)]
            remedies += [("--engine sharded", parts(limit, "sharded"))]
            needs.append(Need(what, f"{protocol} {turns}", parts(limit), remedies))
        return needs


# ---- the command ----


def check(needs: list[Need], gpu: Gpu, name: str) -> None:
    """Raises InputError on what needs most if that does not fit, with those of its remedies that do."""
    usable = gpu.gb * SHARES["memory"]
    worst = max(needs, key=lambda need: need.gb)
    if worst.gb > usable:
        ways: dict[str, str] = {}  # of every kind the first, which asks for the least
        for way, parts in worst.remedies:
            if (gb := sum(parts.values()) / 1e9) <= usable:
                ways.setdefault(re.sub(r"\d+", "", way), f"{way} ({gb:.1f} GB)")
        raise InputError(
            f"{worst.what} needs {worst.gb:.1f} GB a GPU, {name} has {gpu.gb:.4g} GB, {usable:.1f} to use; would fit: "
            f"{', or '.join(ways.values()) or 'a smaller model (--weak, --strong), or GPUs with more memory'}"
        )


def estimates(plans: list[tuple]) -> tuple[dict, dict, list[Need]]:
    """From pairs (experiment, plan) by (task, group of like stages): costs, derivations; and needs, where they are greatest."""
    costs: dict[tuple[str, str], Counter] = {}
    derived: dict[tuple[str, str], list[str]] = {}
    needs: dict[str, Need] = {}
    seen = set()
    for e, p in plans:
        for stage in e.stages():
            heads = stage.folder.is_relative_to(e.runs) and e.runs != e.folder
            kind, run = stage.folder.relative_to(e.runs if heads else e.folder).parts[0], stage.folder.name
            group, lines, found = kind, [], []
            if kind == "transcripts":
                group = f"debates {run}"
                cost, lines, memory = p.debates(stage.minimum)
                found = p.debate_needs(run, memory)
            elif run.startswith("zero-shot"):
                group = "zero-shot"
                cost, lines = p.zero_shot(run)
            elif kind == "predictions":
                reader = re.findall(r"^weak-[a-z_]+|^strong|-t\d+", run)
                group = " ".join(["heads" if heads else "finetune", *reader]).replace(" -", " ")
                cost, lines = p.finetune(run, bool(stage.minimum.get("kept models")), heads)
                texts = (e.task, re.sub(r"-f\d+-s\d+$|(?<=^strong)-.*", "", run))
                if heads and texts in seen:  # read once for all heads
                    cost |= {"flops": 0, "hours": 0, "tokens": 0}
                seen.add(texts)
                found = [] if (e.task, group) in costs else p.finetune_needs(run, heads)
            elif kind == "data":
                cost = {"samples": p.rows, "bytes": 6 * p.text * p.rows}
            else:  # weak labels
                cost = {"samples": p.half, "bytes": 50 * p.half}
            costs.setdefault((e.task, group), Counter()).update(cost | {"stages": 1})
            derived.setdefault((e.task, group), lines)
            for need in found:
                needs[need.kind] = max(needs.get(need.kind, need), need, key=lambda n: n.gb)
    return costs, derived, list(needs.values())


def show(experiments: list) -> None:
    """Print a line per group of similar stages, how each is derived, and peak memory. Raises InputError on what does not fit."""
    config = experiments[0].config
    gpu, name = (GPUS[config.gpu], config.gpu) if config.gpu else (device_here(), f"this {device().type}")
    gpus = config.gpus or here()
    if config.gpu and config.dtype != "bfloat16":
        raise InputError(f"--dtype {config.dtype} --gpu {config.gpu}: the table of GPUs holds bfloat16 rates only")
    plans = [(e, Plan(e.config, e.task, gpu, gpus)) for e in experiments]
    p = plans[0][1]
    costs, derived, needs = estimates(plans)
    peaks = f"{gpu.tflops:.4g} TFLOP/s, {gpu.gb:.4g} GB, {gpu.gbps:.4g} GB/s, {gpu.link:.4g} GB/s to the others"
    print0(f"{gpus} x {name}: {peaks}")
    print0(f"assumed utilization, until measured: {', '.join(f'{k} {v}' for k, v in SHARES.items())}; {config.dtype}")
    for role, m, spec in (("weak", p.weak, config.weak), ("strong", p.strong, config.strong)):
        body = (
            f"{m.blocks} blocks x (2 x {m.D} x ({m.Q} + {m.K}) + 3 x {m.D} x {m.F}) = {m.body / 1e9:.4g} G parameters"
        )
        kv = f"KV a token 2 x {m.blocks} x {m.K} x {p.e} B = {2 * m.blocks * m.K * p.e:,} B"
        print0(f"{role} {spec}: {body}, embeddings {m.V} x {m.D} = {m.embeddings / 1e9:.3g} G; {kv}")
    print0(f"\n{'task':20}{'stages':38}{'count':>6}{'samples':>10}{'M tokens':>10}{'PFLOP':>11}{'GB':>8}{'hours':>9}")
    for (task, group), c in [*costs.items(), (("all", ""), sum(costs.values(), Counter()))]:
        counted = f"{c['stages']:6}{c['samples']:10}{c['tokens'] / 1e6:10.1f}{c['flops'] / 1e15:11.1f}"
        print0(f"{task:20}{group:38}{counted}{c['bytes'] / 1e9:8.2f}{c['hours']:9.3f}")
    print0("\nhow (hours of the whole run; a group's are those of its runs):")
    for (task, group), lines in derived.items():
        for text in lines:
            print0(f"  {task} {group}: {text}")
    print0(f"\npeak memory a GPU, of {gpu.gb:.4g} GB x {SHARES['memory']}, of every kind in the task that needs most:")
    for need in needs:
        made_of = " + ".join(f"{k} {v / 1e9:.3g}" for k, v in need.parts.items())
        print0(f"  {need.what}: {made_of} = {need.gb:.1f} GB")
    N = p.strong.body + p.strong.embeddings
    loading = f"{gpus} x 4 B x {N / 1e9:.3g} G = {4 * gpus * N / 1e9:.3g} GB"
    print0(f"host memory while a node of {gpus} loads the strong model: {loading}")
    weights = sum(2 * (m.body + 2 * m.embeddings) for m in (p.weak, p.strong)) / 1e9
    again = "as much again for first-generation Qwen, which is converted"
    print0(f"disk beside the results: the models' weights, {weights:.3g} GB; {again}")
    check(needs, gpu, name)


def here() -> int:
    import torch

    return max(1, torch.cuda.device_count())
