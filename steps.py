"""What each step of the method does: read, debate, finetune, average. w2s.py puts the steps in order.

A step fills its stage's folder: `make_...(files, work, ..., out, ranks, held)` writes files to `out` and returns what it cost.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import data.prepare
import debate
import generate
import heads
import train
from common import ALONE, Ranks, align_by_id, read_jsonl, write_jsonl
from debate import PROTOCOLS, assign_side, judge_input, transcript_text, with_evidence
from generate import DebateConfig
from model import Classifier, ModelSpec, load_kept, load_tokenizer, save_model
from train import TrainConfig

# ---- what a stage does ----


class Debates(NamedTuple):
    """Transcripts of one protocol: how many turns for each debate seed."""

    protocol: str
    model: ModelSpec
    turns: dict[int, int]


class ZeroShot(NamedTuple):
    """What a model answers without training."""

    model: ModelSpec
    evidence: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """One finetuning: `model` learns `labels` of the samples of `part` and predicts those of `predicts`.

    `reads` is what it sees of a sample (see Method); of a protocol's transcripts it reads the first `turns` turns of
    `debate_seed`. `labels` is a file; without one, the part's own ground truth.
    """

    name: str
    model: ModelSpec
    train: TrainConfig
    reads: str = "nothing"
    debate_seed: int = 0
    turns: int = 0
    order: str = "first"  # of transcript and question
    part: str = "train_b"
    labels: Path | None = None
    predicts: tuple[str, ...] = ("train_b", "test")
    keep: bool = False
    tensorboard: bool = False
    heads: bool = False


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the samples and transcripts of a task lie."""

    folder: Path
    task: str

    def samples(self, part: str) -> Path:
        return self.folder / f"data/{part}.jsonl"

    def evidence(self, part: str) -> Path:
        return self.folder / f"data/{part}.evidence.jsonl"

    def transcripts(self, protocol: str, seed: int, part: str) -> Path:
        return self.folder / f"transcripts/{protocol}/seed{seed}/{part}.jsonl"

    def inputs(self, parts: Iterable[str], evidence: bool) -> dict[str, Path]:
        """What a stage reads of these parts: the samples, and the evidence where it does."""
        samples = {part: self.samples(part) for part in parts}
        return samples | ({f"{part} evidence": self.evidence(part) for part in parts} if evidence else {})


# ---- what a finetuned model reads of a sample: one function for each value of `reads` ----


def read_nothing(run: Run, files: Files, part: str) -> list[dict]:
    """The samples as they are: floor, ceiling, students and naive judges."""
    return read_jsonl(files.samples(part))


def read_evidence(run: Run, files: Files, part: str) -> list[dict]:
    """The passage itself, in place of a debate about it."""
    samples = joined(read_jsonl(files.samples(part)), files.evidence(part))
    return [s | {"text": with_evidence(s["evidence"], s["text"])} for s in samples]


def read_sides(run: Run, files: Files, part: str) -> list[dict]:
    """The sides that the debaters take, without their arguments."""
    samples = read_jsonl(files.samples(part))
    sides = [[assign_side(s["id"], turn) for turn in (0, 1)] for s in samples]
    return beside(run, samples, [transcript_text(files.task, "debate", of_sample, ["", ""]) for of_sample in sides])


def read_transcript(run: Run, files: Files, part: str) -> list[dict]:
    """The first turns of a transcript, and the question."""
    return beside(run, *transcribed(run, files, part))


def read_other_debate(run: Run, files: Files, part: str) -> list[dict]:
    """The debate about the next sample, and the question."""
    samples, said = transcribed(run, files, part)
    return beside(run, samples, said[1:] + said[:1])


def beside(run: Run, samples: list[dict], said: list[str]) -> list[dict]:
    """Each sample as a judge reads it with what was said."""
    return [s | {"text": judge_input(s["text"], text, run.order)} for s, text in zip(samples, said, strict=True)]


def transcribed(run: Run, files: Files, part: str) -> tuple[list[dict], list[str]]:
    """The samples, and of each the first turns of its transcript."""
    protocol = PROTOCOL_OF[run.reads]
    rows = joined(read_jsonl(files.samples(part)), files.transcripts(protocol, run.debate_seed, part))
    return rows, [transcript_text(files.task, protocol, *(r[k][: run.turns] for k in ("sides", "turns"))) for r in rows]


PROTOCOL_OF = {p: p for p in PROTOCOLS} | {"other_debate": "debate"}  # whose transcripts they are
READ = {"nothing": read_nothing, "evidence": read_evidence, "sides": read_sides, "other_debate": read_other_debate}
READ |= dict.fromkeys(PROTOCOLS, read_transcript)


def weak_choice(floor: Path, dtype: torch.dtype, task: str, order: str) -> debate.Chooser:
    """For market-making: samples and their transcripts so far -> the class that the weak floor, a model's folder, prefers."""
    classifier = load_kept(floor, 2, dtype)

    def choose(samples: list[dict], rows: list[dict]) -> list[int]:
        said = [transcript_text(task, "market_making", r["sides"], r["turns"]) for r in rows]
        pairs = zip(samples, said, strict=True)
        texts = [judge_input(s["text"], text, order) if text else s["text"] for s, text in pairs]
        return train.predict(classifier, texts, TrainConfig()).argmax(-1).tolist()

    return choose


# ---- the work of a stage ----


class Held:
    """The one model in memory: the classifier or the debater that is asked for. What was held before gives way first."""

    def __init__(self):
        self.key, self.model = None, None
        self.heads: dict[tuple, tuple] = {}  # of --head-only: what was predicted and its cost, by task and run

    def get(self, load: type, *key):
        """`load(*key)`, or what is held when it was made so."""
        if (load, key) != self.key:
            self.release()
            self.key, self.model = (load, key), load(*key)
        return self.model

    def release(self) -> None:
        if self.key:
            self.key = self.model = None
            gc.collect()  # sharded models hold on to themselves
            torch.cuda.empty_cache()

    def classifier(self, spec: ModelSpec, settings: TrainConfig, ranks: Ranks) -> Classifier:
        dtype, adapters = getattr(torch, settings.dtype), (settings.lora_rank, settings.lora_alpha)
        return self.get(Classifier, spec, 2, dtype, settings.kernels, ranks, *adapters)


def make_data(
    task: str, data_dir: str | None, models: tuple, limits: dict, out: Path, ranks: Ranks, held: Held
) -> dict:
    tokenizers = tuple(map(load_tokenizer, models))
    return data.prepare.prepare(task, out, data_dir and Path(data_dir), tokenizers=tokenizers, **limits)


def make_debates(
    files: Files, work: Debates, settings: DebateConfig, judge: Callable | None, out: Path, ranks: Ranks, held: Held
) -> dict:
    """Transcripts of both halves. `judge` of market-making loads the weak floor (`weak_choice`)."""
    cost: dict[str, int] = {}
    choose = judge and judge()
    speaker = functools.partial(held.get, generate.ENGINES[settings.engine], work.model, settings, ranks)
    for n in sorted(set(work.turns.values())):
        for part in ("train_a", "train_b"):
            rows = debated(files, part)
            paths = {k: out / f"seed{k}" / f"{part}.jsonl" for k in work.turns if work.turns[k] == n}
            new = debate.make_transcripts(speaker, files.task, work.protocol, rows, paths, n, choose, ranks)
            cost = {k: cost.get(k, 0) + v for k, v in new.items()}
    held.release()
    return cost | {"tokens": {p.name.removeprefix("seed"): tokens_by_turn(p) for p in sorted(out.glob("seed*"))}}


def make_zero_shot(files: Files, work: ZeroShot, settings: DebateConfig, out: Path, ranks: Ranks, held: Held) -> dict:
    """Class probabilities of train_b and test by the likelihood of the two sides' names."""
    speaker = held.get(generate.ENGINES[settings.engine], work.model, settings, ranks)
    share = ALONE if settings.engine == "sharded" else ranks  # all of them answer together, or each its share
    for part in ("train_b", "test"):
        rows = debated(files, part) if work.evidence else read_jsonl(files.samples(part))
        probs = debate.zero_shot(speaker, files.task, rows, share)
        if ranks.rank == 0:
            write_jsonl(out / f"{part}.jsonl", [{"id": r["id"], "probs": p} for r, p in zip(rows, probs, strict=True)])
    return {}


def debated(files: Files, part: str) -> list[dict]:
    """What debaters read: the samples, with evidence where the task has any."""
    samples, evidence = read_jsonl(files.samples(part)), files.evidence(part)
    return joined(samples, evidence) if evidence.exists() else samples


def make_run(files: Files, run: Run, read: Callable, out: Path, ranks: Ranks, held: Held) -> dict:
    """Finetune, predict, and keep the model where asked."""
    classifier = held.classifier(run.model, run.train, ranks)
    rows = labelled(files, run, read)
    texts, labels = [r["text"] for r in rows], train.soft_labels(rows, 2)
    with tensorboard(files, run, ranks) as tracker:
        cost = train.finetune(classifier, texts, labels, run.train, out / "steps.jsonl", tracker)
    for part in run.predicts:
        rows = read(run, files, part)
        probs = train.predict(classifier, [r["text"] for r in rows], run.train)
        if ranks.rank == 0:
            write_jsonl(out / f"{part}.jsonl", train.prediction_rows(rows, probs))
    if run.keep:
        save_model(classifier, out / "model", run.train, f"{files.task}, {run.name}")
    return {name: value for name, value in cost.items() if name != "log"}


@contextlib.contextmanager
def tensorboard(files: Files, run: Run, ranks: Ranks) -> Iterator[train.Tracker | None]:
    """Draws a run for TensorBoard as it trains, where that is asked for; the file is closed with the run."""
    if not run.tensorboard or ranks.rank:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(files.folder.parent / "tensorboard" / files.task / run.name) as writer:

        def track(row: dict) -> None:
            for name in row.keys() - {"step"}:
                writer.add_scalar(name, row[name], row["step"])
            writer.flush()

        yield track


def labelled(files: Files, run: Run, read: Callable) -> list[dict]:
    """The run's training samples as it reads them, with their labels."""
    rows = read(run, files, run.part)
    return joined(rows, run.labels) if run.labels else rows


def make_head(files: Files, run: Run, read: Callable, all_runs: Callable, out: Path, ranks: Ranks, held: Held) -> dict:
    """--head-only: the run's head, trained at once with those of all runs that read the same."""
    if (files.task, run.name) not in held.heads:
        start, reading = time.time(), operator.attrgetter("model", "reads", "debate_seed", "turns", "part", "heads")
        alike = [r for r in all_runs() if reading(r) == reading(run)]  # a frozen model's features serve them all
        parts = dict.fromkeys([run.part, *(part for r in alike for part in r.predicts)])
        texts = {part: [row["text"] for row in read(run, files, part)] for part in parts}
        labels = [train.soft_labels(labelled(files, r, read), 2) for r in alike]
        # of its own: what `held.classifier` gives may hold the weights of the last finetuning
        classifier = held.get(Classifier, run.model, 2, getattr(torch, run.train.dtype), run.train.kernels)
        probs = heads.finetune_and_predict(classifier, texts, run.part, labels, [r.train for r in alike])
        cost = {"seconds": round((time.time() - start) / len(alike), 3), "train_tokens": 0}
        held.heads |= {(files.task, r.name): (p, cost) for r, p in zip(alike, probs, strict=True)}
    probs, cost = held.heads[files.task, run.name]
    for part in run.predicts if ranks.rank == 0 else ():
        write_jsonl(out / f"{part}.jsonl", train.prediction_rows(read(run, files, part), probs[part]))
    return cost


def average_labels(members: list[Path], out: Path, ranks: Ranks, held: Held) -> dict:
    """Weak labels: the arithmetic mean of the members' probabilities."""
    ids = [r["id"] for r in read_jsonl(members[0])]
    tables = [align_by_id(read_jsonl(path), ids, str(path)) for path in members]
    rows = []
    for sample_id, *of_members in zip(ids, *tables, strict=True):
        by_class = zip(*(r["probs"] for r in of_members), strict=True)
        rows.append({"id": sample_id, "probs": [sum(p) / len(p) for p in by_class]})
    write_jsonl(out / "train_b.jsonl", rows)
    return {"samples": len(ids)}


def joined(rows: list[dict], path: Path) -> list[dict]:
    """Rows with what a file holds on the same samples, matched by id."""
    more = align_by_id(read_jsonl(path), [r["id"] for r in rows], str(path))
    return [r | m for r, m in zip(rows, more, strict=True)]


def tokens_by_turn(folder: Path) -> list[int]:
    """Of all transcripts of a debate seed, how many tokens each turn has."""
    rows = [r["n_tokens"] for path in sorted(folder.glob("*.jsonl")) for r in read_jsonl(path)]
    by_turn = itertools.zip_longest(*rows, fillvalue=0)  # a killed run leaves more turns of one half
    return [sum(turn) for turn in by_turn]
