"""Debate helps weak-to-strong generalization, from the data to the tables.

    python w2s.py run --preset smoke                                          two minutes on a CPU, random models
    python w2s.py run --preset tiny                                           a real small model on a CPU
    python w2s.py run --preset small --tasks sciq --methods finetune ours     one GPU, two rows of Table 2
    torchrun --nproc-per-node 8 w2s.py run ...                                every stage on 8 GPUs
    python w2s.py plan | status | report  (same flags)                        what would run | what is done | tables again

The method, each step a function below: the strong model debates every training sample (`debates`); weak models, the
judges, are finetuned on ground truth and read the transcripts (`train_members`); their soft labels on the other half are
averaged (`label_with_ensemble`); the strong model is finetuned on those (`train_student`) and scored between the weak
floor and the strong ceiling (`pgr`, in stats.py). Every step is a stage: done once, skipped while nothing that it
depends on has changed, continued when it was killed.
"""

import dataclasses
import functools
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import data.prepare
import debate
import generate
import heads
import page
import plan as estimate
import report
import stats
import train
from common import (
    ROOT,
    InputError,
    align_by_id,
    check_out,
    flag,
    gather,
    in_groups,
    parse_given,
    print0,
    rank,
    read_jsonl,
    run_script,
    write_jsonl,
    write_text,
)
from debate import PROTOCOLS, assign_side, judge_input, transcript_text, with_evidence
from generate import DebateConfig
from kernels import CHOICES, conf_loss, resolve
from model import Classifier, ModelSpec, load_tokenizer, resolve_dtype
from sizes import GPUS
from stages import Stage, digest, is_locked, locked, read_manifest
from train import TrainConfig

# ---- what is compared ----


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to supervise: a row of a table or a point of a figure.

    `reads` is what the members, the judges, read beside the question: a protocol's transcripts (debate, consultancy,
    market_making), sides (without their arguments), evidence (the passage itself), or nothing. `members` are pairs
    (debate seed, finetuning seed), `loss` is the student's, and `shown` says where: "table2", or "figure2:3" for the
    point at 3.
    """

    label: str
    reads: str
    members: tuple[tuple[int, int], ...]
    shown: tuple[str, ...]
    turns: int = 3
    loss: str = "xent"


def debate_ensemble(size: int) -> tuple[tuple[int, int], ...]:
    """Members that read differently sampled debates."""
    return tuple((k, 0) for k in range(size))


def finetune_ensemble(size: int) -> tuple[tuple[int, int], ...]:
    """Members that read the same debates and differ in their finetuning seed."""
    return tuple((0, j) for j in range(size))


SINGLE, FOUR = debate_ensemble(1), debate_ensemble(4)
EVERYWHERE = ("table2", "table4", "table5", "figure2:4", "figure3:3")
METHODS = {
    "finetune": Method("finetune", "nothing", SINGLE, ("table2",)),
    "finetune_aux": Method("finetune w/ aux. loss", "nothing", SINGLE, ("table2",), loss="logconf"),
    "finetune_pro": Method("finetune w/ pro. loss", "nothing", SINGLE, ("table2",), loss="product"),
    "consultancy": Method("consultancy", "consultancy", FOUR, ("table4",)),
    "market_making": Method("market-making", "market_making", FOUR, ("table4",)),
    "single": Method("single weak model", "debate", SINGLE, ("table5", "figure2:1")),
    "finetune_ensembles": Method("finetune ensembles", "debate", finetune_ensemble(4), ("table5",)),
    "ours": Method("ours (debate ensembles)", "debate", FOUR, EVERYWHERE),
    "naive_ensemble": Method("naive ensemble (control)", "nothing", finetune_ensemble(4), ("table5",)),
    "no_argument": Method("sides without arguments (control)", "sides", finetune_ensemble(4), ("table5",)),
    "evidence": Method("reads the evidence itself (bound)", "evidence", SINGLE, ("table5",)),
    "ensemble_2": Method("2 members", "debate", debate_ensemble(2), ("figure2:2",)),
    "ensemble_3": Method("3 members", "debate", debate_ensemble(3), ("figure2:3",)),
    "ensemble_5": Method("5 members", "debate", debate_ensemble(5), ("figure2:5",)),
    "ensemble_6": Method("6 members", "debate", debate_ensemble(6), ("figure2:6",)),
    "turns_1": Method("1 turn", "debate", FOUR, ("figure3:1",), turns=1),
    "turns_2": Method("2 turns", "debate", FOUR, ("figure3:2",), turns=2),
    "turns_4": Method("4 turns", "debate", FOUR, ("figure3:4",), turns=4),
    "turns_5": Method("5 turns", "debate", FOUR, ("figure3:5",), turns=5),
    "turns_6": Method("6 turns", "debate", FOUR, ("figure3:6",), turns=6),
}
TABLE_METHODS = tuple(n for n, m in METHODS.items() if any(s.startswith("table") for s in m.shown))
ZERO_SHOT = dict(
    zip(
        stats.ZERO_SHOT,
        ("weak model, zero-shot", "strong model, zero-shot", "strong model, zero-shot with evidence"),
        strict=True,
    )
)
REFERENCE_RUNS = dict(zip(stats.BOUNDS, ("weak performance", "strong ceiling"), strict=True))
FIGURE_METHODS = tuple(n for n in METHODS if n not in TABLE_METHODS)
NO_FIGURES = ("boolq", "cosmos_qa", "boolq_evidence", "cosmos_qa_evidence")  # the paper draws none for the first two

PAPER_TASKS = ("sciq", "boolq", "cosmos_qa", "anthropic_hh")
PRESETS = {
    "smoke": dict(
        tasks=PAPER_TASKS, seeds=(0, 1), weak="random-small", strong="random-large", data_dir=str(ROOT / "data/tiny"),
        lr=1e-2, batch_size=8, epochs=1, max_new_tokens=4, temperature=1.0,
    ),
    "tiny": dict(
        tasks=("places_evidence", "places"), seeds=(0, 1), weak="smollm2-135m:6", strong="smollm2-135m", limit_train=440,
        lr=2e-4, weak_lr=3e-4, batch_size=16, max_new_tokens=16, chat=True, dtype="bfloat16", cache_tokens=65536,
        weak_gpus=1, strong_gpus=1,  # under several processes each trains a model of its own
        methods=(*TABLE_METHODS, "ensemble_2", "turns_1", "turns_2"),
    ),
    "small": dict(
        tasks=PAPER_TASKS, seeds=(0, 1, 2), weak="Qwen/Qwen2.5-0.5B", strong="Qwen/Qwen2.5-1.5B", limit_train=4000,
        limit_test=2000, max_new_tokens=150,
    ),
    "paper": dict(
        tasks=PAPER_TASKS, seeds=(0, 1, 2, 3, 4), weak="Qwen/Qwen-7B", strong="Qwen/Qwen-14B", weak_gpus=4, strong_gpus=8,
        transcript="last",  # "appended to each sample", as the paper words it
        cache_tokens=26_000, max_tokens_per_forward=6144,  # what `plan` finds to fit in 80 GB: 800 kB of keys and values a token
    ),
}  # fmt: skip
PER_TASK = {  # where a task departs from its preset
    ("tiny", "places"): dict(
        methods=tuple(n for n in TABLE_METHODS if "table4" not in METHODS[n].shown or n == "ours")
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What holds for a task: flags over the preset's values for the task, over the preset's, over these defaults."""

    preset: str = flag("tiny", "sizes and models; auto: for `plan` only", choices=(*PRESETS, "auto"))
    tasks: tuple = flag(PAPER_TASKS, "tasks to run", choices=tuple(data.prepare.TASKS))
    methods: tuple = flag(tuple(METHODS), "rows and points of the tables and figures", choices=tuple(METHODS))
    seeds: tuple = flag((0, 1, 2), "replicates: each finetunes every model anew, on the same debates", int)
    weak: str = flag("", "weak model: hub id[@revision], folder or built-in; `:N` keeps its first N blocks")
    strong: str = flag("", "strong model, likewise")
    data_dir: str | None = flag(None, "folder with <task>/<split>.jsonl[.gz] in the hub's schema; default: the hub")
    out: str | None = flag(None, "folder of the results; default: out/<preset>")
    limit_train: int | None = flag(None, "training samples per task, both halves together", int)
    limit_test: int | None = flag(None, "test samples per task", int)
    max_sample_tokens: int = flag(1024, "longer samples are dropped, for all models", int)
    lr: float = flag(TrainConfig.lr, "learning rate", float)
    weak_lr: float | None = flag(None, "learning rate of the weak model; default: --lr", float)
    epochs: int = flag(TrainConfig.epochs, "passes over the training samples", int)
    batch_size: int = flag(TrainConfig.batch_size, "samples per optimizer step", int)
    aux_warmup: str = flag(TrainConfig.aux_warmup, "of the confidence loss", choices=("openai", "linear"))
    checkpointing: bool = flag(TrainConfig.checkpointing, "recompute activations to save memory", bool)
    transcript: str = flag("first", "judges read it before or after the question", choices=("first", "last"))
    max_new_tokens: int = flag(DebateConfig.max_new_tokens, "longest turn", int)
    temperature: float = flag(DebateConfig.temperature, "of the debaters", float)
    top_p: float = flag(DebateConfig.top_p, "of the debaters", float)
    chat: bool = flag(DebateConfig.chat, "ask the debaters through their chat template", bool)
    dtype: str = flag(TrainConfig.dtype, "of all models", choices=("auto", "float32", "bfloat16"))
    kernels: str = flag(TrainConfig.kernels, "Triton or plain PyTorch in finetuning", choices=CHOICES)
    engine: str = flag(
        DebateConfig.engine,
        "what generates the debates: replicated (a copy of the model per process), sharded (one over all), vllm",
        choices=("replicated", "sharded", "vllm"),
    )
    weak_gpus: int = flag(0, "processes that share a finetuning of the weak model; others do the next (0: all)", int)
    strong_gpus: int = flag(0, "the same for the strong model", int)
    cache_tokens: int = flag(
        DebateConfig.cache_tokens, "tokens of keys and values that a batch of debates may fill", int
    )
    max_tokens_per_forward: int = flag(
        TrainConfig.max_tokens_per_forward, "most tokens in one forward of finetuning; does not change the result", int
    )
    keep_models: bool = flag(False, "keep every finetuned model as a Hugging Face folder", bool)
    json: bool = flag(False, "status as JSON", bool)
    tensorboard: bool = flag(
        False, "training curves for TensorBoard too, in <out>/tensorboard (needs the package)", bool
    )
    head_only: bool = flag(False, "train heads alone, all at once, on frozen features; results in <out>/heads", bool)
    head_lr: float = flag(1e-4, "learning rate of --head-only", float)
    head_epochs: int = flag(20, "passes over the training samples of --head-only", int)
    gpus: int | None = flag(None, "plan: GPUs of the run; default: those here", int)
    gpu: str | None = flag(None, "plan: kind of GPU; default: the device here, measured", choices=tuple(GPUS))
    measure: bool = flag(False, "plan: run one longest batch of each kind here, beside its estimate", bool)
    show_config: bool = flag(False, "print what holds for each task and where it comes from, and stop", bool)

    @classmethod
    def of(cls, task: str | None = None, **given) -> "Config":
        """What holds for `task` with these flags; `auto` and values that follow from others are filled in.

        Raises InputError on values out of range.
        """
        preset = given.get("preset", cls.preset)
        config = cls(**(PRESETS[preset] | PER_TASK.get((preset, task), {}) | given))
        config = dataclasses.replace(
            config, out=f"out/{preset}" if config.out is None else config.out,
            weak_lr=config.lr if config.weak_lr is None else config.weak_lr,
            dtype=str(resolve_dtype(config.dtype)).removeprefix("torch."), kernels=resolve(config.kernels),
        )  # fmt: skip
        config.check()
        return config

    def check(self) -> None:
        """Raises InputError on values out of range."""
        for name in (
            "limit_train",
            "limit_test",
            "max_sample_tokens",
            "epochs",
            "batch_size",
            "max_new_tokens",
            "lr",
            "weak_lr",
            "head_lr",
            "head_epochs",
            "cache_tokens",
            "max_tokens_per_forward",
            "gpus",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} {value}: must be greater than 0, and finite")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise InputError(f"--temperature {self.temperature} must be >= 0, --top-p {self.top_p} in (0, 1]")
        for name in ("weak_gpus", "strong_gpus"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative (0: all)")
        for name in ("tasks", "methods", "seeds"):
            if len(set(values := getattr(self, name))) < len(values):
                raise InputError(f"--{name} {' '.join(map(str, values))}: name each once")
        if not self.out or Path(self.out).exists() and not Path(self.out).is_dir():
            raise InputError(f"--out {self.out!r}: not a folder")
        if self.data_dir and not Path(self.data_dir).is_dir():
            raise InputError(f"--data-dir {self.data_dir!r}: no such folder")
        if self.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise InputError("--tensorboard: the package is not there; pip install tensorboard")
        if any(s < 0 for s in self.seeds):
            raise InputError(f"--seeds {' '.join(map(str, self.seeds))}: must not be negative")
        for spec in (self.weak, self.strong):
            ModelSpec.parse(spec)


def show_config(given: dict, task: str) -> None:
    """Every field of a task's configuration, its value, and whether a flag, the task, the preset or the default set it."""
    config = Config.of(task, **given)
    layers = {"flag": given, f"{config.preset}, {task}": PER_TASK.get((config.preset, task), {}),
              f"preset {config.preset}": PRESETS[config.preset]}  # fmt: skip
    print0(task)
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        print0(f"  {f.name:24}{shown!s:60} {next((name for name, of in layers.items() if f.name in of), 'default')}")


# ---- what stages do, for plan.py; None: next to nothing ----


@dataclasses.dataclass(frozen=True)
class Run:
    """A finetuning, or heads alone: predictions on `predicts`, parts of the data."""

    name: str
    model: ModelSpec
    reads: str
    turns: int
    predicts: tuple[str, ...]
    train: TrainConfig
    heads: bool
    keep: bool
    debate_seed: int = 0


@dataclasses.dataclass(frozen=True)
class Debates:
    protocol: str
    turns: dict[int, int]  # of each debate seed
    model: ModelSpec


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    model: ModelSpec
    evidence: bool


# ---- stages of one task, in the paper's order ----


class Experiment:
    """All stages of one task. Constructing one computes nothing; every method returns a Stage."""

    def __init__(self, config: Config, task: str):
        self.config, self.task = config, task
        self.folder = Path(config.out) / task  # data and debates
        self.runs = results_folder(config) / task  # what is trained on them
        self.weak, self.strong = ModelSpec.parse(config.weak), ModelSpec.parse(config.strong)
        self.otherwise: list[str] = []  # stale but still reported
        self.heads: dict[Path, dict[str, tuple]] = {}  # of --head-only: features -> run -> labelled rows, TrainConfig

    def classifier(self, model: ModelSpec, sharded: bool = False):
        return load_classifier(model, self.config.dtype, self.config.kernels, sharded)

    def file(self, name: str) -> Path:
        return self.folder / "data" / name

    def prepare(self) -> Stage:
        c = self.config
        limits = {"limit_train": c.limit_train, "limit_test": c.limit_test, "max_tokens": c.max_sample_tokens}
        source = {
            "task": self.task,
            "evidence": data.prepare.TASKS[self.task].evidence,
            "data_dir": c.data_dir and "local",
            "formatter": code(data.prepare.TASKS[self.task].formatter),
        }
        return Stage(
            self.folder / "data",
            source | limits | {"tokenizers": [tokenizer_identity(m) for m in (self.weak, self.strong)]},
            {p.name: p for p in source_files(self.task, c.data_dir)},
            lambda out: data.prepare.prepare(
                self.task, out, c.data_dir and Path(c.data_dir),
                tokenizers=(load_tokenizer(self.weak), load_tokenizer(self.strong)), **limits,
            ),
        )  # fmt: skip

    def weak_floor(self, seed: int) -> Stage:
        """The weak model on ground truth, without debate. Replicate 0 stays: market-making asks it for its choice."""
        return self.member("nothing", 0, 0, 0, seed)

    def strong_ceiling(self, seed: int) -> Stage:
        """The strong model on the ground truth of the student's half."""
        texts, gold = self.file("train_b.jsonl"), self.file("train_b.gold.jsonl")
        return self.finetuning(
            f"strong-ceiling-s{seed}", "strong", self.strong, self.train_config(self.strong, seed, 0),
            {"train": texts, "gold": gold}, lambda: joined(texts, gold), ("test",),
        )  # fmt: skip

    def debates(self, protocol: str, turns: dict[int, int]) -> Stage:
        """Transcripts of train_a and train_b for every debate seed, with `turns[seed]` turns at least."""

        c = self.config
        folder = self.folder / "transcripts" / protocol
        settings = DebateConfig(c.max_new_tokens, c.temperature, c.top_p, c.chat, c.dtype, c.cache_tokens, c.engine)
        form = [code(f) for f in (debate.encode_question, debate.encode_turn, debate.encode_instruction)]
        inputs = {part: self.file(f"{part}.jsonl") for part in ("train_a", "train_b")}
        inputs |= {f"{part} evidence": path for part in inputs if (path := self.evidence_file(part))}
        if protocol == "market_making":
            inputs["weak_floor"] = self.market_making_judge().folder / "model"
            form += [code(Experiment.judge_text), code(judge_input), code(transcript_text), c.transcript]

        def make(out: Path) -> dict:
            cost: dict[str, int] = {}
            samples = {part: self.samples_with_evidence(part) for part in ("train_a", "train_b")}
            choose = self.weak_choice() if protocol == "market_making" else None
            for n in sorted(set(turns.values())):
                for part, rows in samples.items():
                    files = {k: out / f"seed{k}" / f"{part}.jsonl" for k in turns if turns[k] == n}
                    speaker = functools.partial(debater, self.strong, settings)
                    new = debate.make_transcripts(
                        speaker, self.task, protocol, rows, files, n, settings.batch_size, choose,
                        settings.engine == "sharded",
                    )  # fmt: skip
                    cost = {k: cost.get(k, 0) + v for k, v in new.items()}
            return cost | {"tokens": {k: tokens_by_turn(out / f"seed{k}") for k in turns}}

        asked = {str(k): n for k, n in turns.items()}
        wording = {"wording": self.wording(protocol), "form": form}
        config = {"model": self.strong.identity(), **wording, **dataclasses.asdict(settings)}
        work = Debates(protocol, turns, self.strong)
        return Stage(folder, config, inputs, make, minimum=asked, on_all_ranks=True, work=work)

    def wording(self, protocol: str) -> list[str]:
        """All that a protocol's prompts say for this task, and its names for the two sides."""

        asked = [debate.debate_prompt(self.task, protocol, turn, side) for turn in range(3) for side in (0, 1)]
        return [*asked, *debate.PROMPTS[self.task].sides]

    def evidence_file(self, part: str) -> Path | None:
        """The file of what only debaters read, where the task has such a text."""
        return self.file(f"{part}.evidence.jsonl") if data.prepare.TASKS[self.task].evidence else None

    def samples_with_evidence(self, part: str) -> list[dict]:
        """What debaters and the bound read; nobody else may."""
        file, samples = self.evidence_file(part), self.file(f"{part}.jsonl")
        return joined(samples, file) if file else read_jsonl(samples)

    def zero_shot(self, who: str) -> Stage:
        """What a model answers without training, by the likelihood of the two sides' names."""

        c = self.config
        model = self.weak if who == "zero_shot_weak" else self.strong
        settings = DebateConfig(chat=c.chat, dtype=c.dtype, cache_tokens=c.cache_tokens)
        parts = ("train_b", "test")
        inputs = {part: self.file(f"{part}.jsonl") for part in parts}
        if who == "zero_shot_evidence":
            inputs |= {f"{part} evidence": self.evidence_file(part) for part in parts}

        def make(out: Path) -> dict:
            speaker = debater(model, settings)
            for part in parts:
                rows = self.samples_with_evidence(part) if who == "zero_shot_evidence" else read_jsonl(inputs[part])
                probs = debate.zero_shot(speaker, self.task, rows)
                predictions = [{"id": r["id"], "probs": p} for r, p in zip(rows, probs, strict=True)]
                write_jsonl(out / f"{part}.jsonl", predictions)
            return {}

        wording = {"wording": self.wording("zero_shot"), "code": code(debate.zero_shot)}
        config = {"model": model.identity(), "loss": "none", "chat": c.chat, "dtype": c.dtype}
        folder = self.folder / "predictions" / who.replace("_", "-")
        work = ZeroShot(model, who == "zero_shot_evidence")
        return Stage(folder, config | wording, inputs, make, twins=self.twins(folder), work=work)

    def twins(self, folder: Path) -> tuple[Path, ...]:
        """The same run of the other tasks that have the same samples."""
        others = [t for t in self.config.tasks if t != self.task and source_of(t) == source_of(self.task)]
        return tuple(self.folder.with_name(t) / folder.relative_to(self.folder) for t in others)

    def market_making_judge(self) -> Stage:
        """The weak floor that market-making asks: finetuned as a whole, also where only heads are compared."""
        return Experiment(dataclasses.replace(self.config, head_only=False), self.task).weak_floor(0)

    def weak_choice(self):
        """Samples and their transcripts so far -> the class that the weak floor prefers."""
        classifier = self.classifier(ModelSpec(str(self.market_making_judge().folder / "model")))

        def choose(samples: list[dict], rows: list[dict]) -> list[int]:
            texts = [
                self.judge_text("market_making", s, r, len(r["turns"])) for s, r in zip(samples, rows, strict=True)
            ]
            return train.predict(classifier, texts, TrainConfig()).argmax(-1).tolist()

        return choose

    def judge_text(self, reads: str, sample: dict, row: dict | None, turns: int) -> str:
        """What a weak model reads: the question, and beside it what `reads` says (see Method)."""
        if reads == "nothing" or reads in PROTOCOLS and turns == 0:
            return sample["text"]
        if reads == "evidence":
            return with_evidence(sample["evidence"], sample["text"])
        if reads == "sides":
            sides = [assign_side(sample["id"], turn) for turn in (0, 1)]
            return judge_input(
                sample["text"], transcript_text(self.task, "debate", sides, ["", ""]), self.config.transcript
            )
        transcript = transcript_text(self.task, reads, row["sides"][:turns], row["turns"][:turns])
        return judge_input(sample["text"], transcript, self.config.transcript)

    def train_members(self, method: Method, seed: int) -> list[Stage]:
        """The judges of a method, each finetuned on train_a's ground truth with what it reads."""
        return [self.member(method.reads, k, j, method.turns, seed) for k, j in method.members]

    def member(self, reads: str, debate_seed: int, finetune_seed: int, turns: int, seed: int) -> Stage:
        debated = reads in PROTOCOLS
        called = {"nothing": "naive", "sides": "no_argument"}.get(reads, reads)
        name = f"weak-{called}" + (f"-d{debate_seed}-t{turns}" if debated else "") + f"-f{finetune_seed}-s{seed}"
        parts = ("train_a", "train_b")
        said = {p: self.folder / f"transcripts/{reads}/seed{debate_seed}/{p}.jsonl" for p in parts if debated}
        inputs = {part: self.file(f"{part}.jsonl") for part in parts}
        if reads == "evidence":
            inputs |= {f"{part} evidence": self.evidence_file(part) for part in parts}
        inputs |= {f"{p} transcripts": functools.partial(beginning, path, turns) for p, path in said.items()}

        def read(part: str) -> list[dict]:
            rows = self.samples_with_evidence(part) if reads == "evidence" else read_jsonl(self.file(f"{part}.jsonl"))
            spoken = (
                align_by_id(read_jsonl(said[part]), [r["id"] for r in rows], str(said[part]))
                if debated
                else [None] * len(rows)
            )
            return [r | {"text": self.judge_text(reads, r, t, turns)} for r, t in zip(rows, spoken, strict=True)]

        floor = reads == "nothing" and finetune_seed == 0
        reader = name.removesuffix(f"-f{finetune_seed}-s{seed}")
        judge = [code(Experiment.judge_text), code(judge_input), code(transcript_text), self.config.transcript]
        wording = self.wording(reads) if debated else self.wording("debate")
        return self.finetuning(
            name, reader, self.weak, self.train_config(self.weak, seed, finetune_seed), inputs, lambda: read("train_a"),
            ("train_b", "test") if floor else ("train_b",), read, keep=floor and seed == 0,
            reads=None if reads == "nothing" else [code(with_evidence)] if reads == "evidence" else [*judge, wording],
            context=(reads, turns if debated else 0, debate_seed),
        )  # fmt: skip

    def label_with_ensemble(self, name: str, seed: int) -> Stage:
        """Weak labels of train_b: the arithmetic mean of the members' probabilities."""
        members = {m.folder.name: m.folder / "train_b.jsonl" for m in self.train_members(METHODS[name], seed)}

        def make(out: Path) -> dict:
            tables = [read_jsonl(path) for path in members.values()]
            ids = [r["id"] for r in tables[0]]
            tables = [align_by_id(t, ids, str(path)) for t, path in zip(tables, members.values(), strict=True)]
            mean = [
                [sum(p) / len(p) for p in zip(*(r["probs"] for r in rows), strict=True)]
                for rows in zip(*tables, strict=True)
            ]
            write_jsonl(out / "train_b.jsonl", [{"id": i, "probs": p} for i, p in zip(ids, mean, strict=True)])
            return {"samples": len(ids)}

        return Stage(self.runs / f"weak_labels/{name}/seed{seed}", {"members": list(members)}, members, make)

    def train_student(self, name: str, seed: int) -> Stage:
        """The strong model on the weak labels of train_b, on the plain samples. Gold labels are out of its reach."""
        texts, labels = self.file("train_b.jsonl"), self.label_with_ensemble(name, seed).folder / "train_b.jsonl"
        return self.finetuning(
            f"strong-{name}-s{seed}", "strong", self.strong, self.train_config(self.strong, seed, 0, METHODS[name].loss),
            {"train": texts, "weak labels": labels}, lambda: joined(texts, labels), ("train_b", "test"),
        )  # fmt: skip

    def train_config(self, model: ModelSpec, seed: int, finetune_seed: int, loss: str = "xent"):
        c = self.config
        lr = c.head_lr if c.head_only else c.weak_lr if model is self.weak else c.lr
        return TrainConfig(
            loss=loss, lr=lr, epochs=c.head_epochs if c.head_only else c.epochs, batch_size=c.batch_size,
            seed=100 * seed + finetune_seed, dtype=c.dtype, aux_warmup=c.aux_warmup, checkpointing=c.checkpointing,
            kernels=c.kernels, max_tokens_per_forward=c.max_tokens_per_forward,
        )  # fmt: skip

    def finetuning(
        self,
        name,
        reader,
        model,
        train_config,
        inputs,
        samples,
        parts,
        read=None,
        keep=False,
        reads=None,
        context=("nothing", 0, 0),
    ) -> Stage:
        """Finetune `model` on `samples()` and write its probabilities on each of `parts` to predictions/<name>.

        Runs of one `reader` read the same texts. `reads` identifies how these are made of the inputs, where they are
        not the samples' own.
        """
        import model as models

        read = read or (lambda part: read_jsonl(self.file(f"{part}.jsonl")))
        keep = keep or self.config.keep_models
        code_of_loss = [
            code(train.LOSSES[train_config.loss]),
            code(getattr(conf_loss, f"{train_config.loss}_target", conf_loss.cross_entropy)),
        ]
        config = {
            "model": model.identity(),
            "loss_code": code_of_loss,
            "reads": reads,
            **dataclasses.asdict(train_config),
        }
        tested = {"test": self.file("test.jsonl")} if "test" in parts else {}
        folder = self.runs / "predictions" / name
        work = Run(name, model, *context[:2], parts, train_config, self.config.head_only, keep, context[2])
        if self.config.head_only:
            runs = self.heads.setdefault(reader, {})
            runs[name] = (samples, train_config, parts, read)

            def make(out: Path) -> dict:
                probs, cost = self.train_heads(reader, model)[name]
                for part in parts:
                    write_jsonl(out / f"{part}.jsonl", train.prediction_rows(read(part), probs[part]))
                return cost

            return Stage(folder, config | {"head_only": True}, inputs | tested, make, work=work)

        def make(out: Path) -> dict:
            classifier, rows = self.classifier(model, sharded=True), samples()
            texts, labels = [r["text"] for r in rows], train.soft_labels(rows, 2)
            cost = train.finetune(classifier, texts, labels, train_config, out / "steps.jsonl")
            files = {}
            del cost["log"]
            for part in parts:
                rows = read(part)
                probs = train.predict(classifier, [r["text"] for r in rows], train_config)
                files[part] = train.prediction_rows(rows, probs)
            for name, rows in files.items() if rank() == 0 else ():
                write_jsonl(out / f"{name}.jsonl", rows)
            if keep:
                models.save_model(classifier, out / "model", train_config, f"{self.task}, {folder.name}")
            return cost

        kept = {"kept models": int(keep)}  # a model that was kept and is not asked for does no harm
        group_size = self.config.weak_gpus if model is self.weak else self.config.strong_gpus
        return Stage(
            folder, config, inputs | tested, make, minimum=kept, on_all_ranks=True, group_size=group_size,
            twins=self.twins(folder), work=work,
        )  # fmt: skip

    @functools.cache  # noqa: B019
    def train_heads(self, reader: str, model: ModelSpec) -> dict[str, tuple[dict, dict]]:
        """All runs of one reader at once: run -> (probabilities of each part, cost). Texts become features only once."""

        start, runs = time.time(), self.heads[reader]
        classifier = self.classifier(model)

        def features(rows: list[dict], config):
            texts = [r["text"] for r in rows]
            return train.forward_all(classifier, texts, config, classifier.features).to(classifier.model.device)

        labelled, configs = [run[0]() for run in runs.values()], [run[1] for run in runs.values()]
        labels = [train.soft_labels(rows, 2).to(classifier.model.device) for rows in labelled]
        weights = heads.finetune_heads(features(labelled[0], configs[0]), labels, configs, self.config.kernels)
        read = {part: read for *_, parts, read in runs.values() for part in parts}
        of = {part: features(read[part](part), configs[0]) for part in read}
        probs = [{part: (x @ w.T).softmax(-1).cpu() for part, x in of.items()} for w in weights]
        for p in probs:
            for part in p:
                train.check_finite(p[part])
        cost = {"seconds": round((time.time() - start) / len(runs), 3), "train_tokens": 0}
        return {name: (p, cost) for name, p in zip(runs, probs, strict=True)}

    def methods(self) -> dict[str, Method]:
        """The chosen rows and points that this task can have."""
        chosen = {n: m for n, m in METHODS.items() if n in self.config.methods}
        if self.task in NO_FIGURES:
            chosen = {n: m for n, m in chosen.items() if n not in FIGURE_METHODS}
        has_evidence = data.prepare.TASKS[self.task].evidence
        return {n: m for n, m in chosen.items() if m.reads != "evidence" or has_evidence}

    def reference_runs(self, seed: int) -> dict[str, Stage]:
        """What stands around the methods in Table 2: no training, the weak floor, the strong ceiling."""
        without = [who for who in ZERO_SHOT if who != "zero_shot_evidence" or self.evidence_file("test")]
        bounds = {"weak_floor": self.weak_floor(seed), "strong_ceiling": self.strong_ceiling(seed)}
        return {who: self.zero_shot(who) for who in without} | bounds

    def stages(self) -> Iterator[Stage]:
        """Every stage that the chosen methods and seeds need, each once, in an order that can run."""
        methods = self.methods()
        wanted = [self.prepare(), *map(self.weak_floor, self.config.seeds)]
        for protocol in PROTOCOLS:
            turns: dict[int, int] = {}
            for m in methods.values():
                if m.reads == protocol:
                    turns |= {k: max(m.turns, turns.get(k, 0)) for k, _ in m.members}
            if turns:
                wanted += [self.market_making_judge()] if protocol == "market_making" else []
                wanted.append(self.debates(protocol, turns))
        for seed in self.config.seeds:
            wanted += [stage for m in methods.values() for stage in self.train_members(m, seed)]
        for seed in self.config.seeds:
            wanted += [self.label_with_ensemble(n, seed) for n in methods]
        for seed in self.config.seeds:
            wanted += [*self.reference_runs(seed).values(), *(self.train_student(n, seed) for n in methods)]
        yield from {stage.folder: stage for stage in wanted}.values()

    def results(self) -> Iterator[dict]:
        """One row per (method, seed) that is done: accuracy, the supervisor's accuracy, cost and provenance."""
        for seed in self.config.seeds:
            students = {n: self.train_student(n, seed) for n in self.methods()}
            for name, stage in (self.reference_runs(seed) | students).items():
                if self.is_there(stage):
                    supervisor = self.label_with_ensemble(name, seed).folder if name in METHODS else None
                    row = report.result_row(self.task, name, seed, self.folder, stage.folder, supervisor)
                    yield row | (self.supervision_cost(METHODS[name], seed) if supervisor else {})

    def readings(self) -> Iterator[dict]:
        """The weak models that are done and read debates: where their transcripts and probabilities on train_b are,
        and those of the weak floor, which read none."""

        seen, out = set(), Path(self.config.out)
        methods = [m for m in self.methods().values() if m.reads in PROTOCOLS]
        for seed in self.config.seeds:
            before = self.weak_floor(seed).folder / "train_b.jsonl"
            for m in methods:
                for (k, j), stage in zip(m.members, self.train_members(m, seed), strict=True):
                    said = self.folder / f"transcripts/{m.reads}/seed{k}/train_b.jsonl"
                    if stage.folder not in seen and said.exists() and before.exists() and self.is_there(stage):
                        seen.add(stage.folder)
                        manifest = read_manifest(stage.folder)
                        yield {
                            "task": self.task, "protocol": m.reads, "turns": m.turns, "debate_seed": k,
                            "finetune_seed": j, "seed": seed, "sides": debate.PROMPTS[self.task].sides,
                            **report.origin(manifest),
                            "transcripts": str(said.relative_to(out)), "before": str(before.relative_to(out)),
                            "predictions": str((stage.folder / "train_b.jsonl").relative_to(out)),
                        }  # fmt: skip

    def is_there(self, stage: Stage) -> bool:
        """Whether a stage can be reported: done, with these settings or others. Raises InputError on files changed since."""
        difference = stage.difference()
        for line in difference or ():
            if line.startswith(("output ", "manifest.json")):
                raise InputError(f"{stage.folder}: {line}; `run` makes it again")
        if difference and not read_manifest(stage.folder).keys() >= {"config", "inputs", "seconds", "commit", "device"}:
            raise InputError(f"{stage.folder}: manifest.json lacks what a stage writes; `run` makes it again")
        if difference:
            self.otherwise.append(stage.folder.name)
        return difference is not None

    def supervision_cost(self, method: Method, seed: int) -> dict:
        """Seconds and tokens of the weak labels, if made for this method alone: its members and its share of the debates."""
        members = [read_manifest(m.folder) or {} for m in self.train_members(method, seed)]
        debates = read_manifest(self.folder / "transcripts" / method.reads) or {}
        samples = sum(len(read_jsonl(self.file(f"{part}.jsonl"))) for part in ("train_a", "train_b"))
        seeds = {k for k, _ in method.members}
        turns = samples * method.turns * len(seeds)
        share = turns / debates["turns"] if debates else 0
        seconds = sum(m.get("seconds", 0) for m in members) + share * debates.get("seconds", 0)
        said = sum(sum(debates["tokens"][str(k)][: method.turns]) for k in seeds) if debates else 0
        tokens = sum(m.get("train_tokens", 0) for m in members) + said
        return {"supervision_seconds": round(seconds, 3), "supervision_tokens": tokens}


def results_folder(config: Config) -> Path:
    return Path(config.out) / "heads" if config.head_only else Path(config.out)


def source_of(task: str) -> str:
    """Tasks of one source have the same samples, with and without evidence."""
    return data.prepare.TASKS[task].source or task


def joined(texts: Path, labels: Path) -> list[dict]:
    """Samples with their labels from another file, matched by id."""
    rows = read_jsonl(texts)
    return [
        r | y for r, y in zip(rows, align_by_id(read_jsonl(labels), [r["id"] for r in rows], str(labels)), strict=True)
    ]


def tokens_by_turn(folder: Path) -> list[int]:
    """Of all transcripts of a debate seed, how many tokens each turn has."""
    rows = [r["n_tokens"] for path in sorted(folder.glob("*.jsonl")) for r in read_jsonl(path)]
    return [sum(turn) for turn in zip(*rows, strict=True)]


def beginning(path: Path, turns: int) -> str:
    """Digest of the first `turns` turns of a transcript file: a longer debate does not change a shorter one."""
    try:
        rows = [[r["id"], r["sides"][:turns], r["turns"][:turns]] for r in read_jsonl(path)]
    except (KeyError, TypeError):
        raise InputError(
            f"{path}: not transcripts; move the folder away, and the same command makes them again"
        ) from None
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@functools.cache
def code(function) -> str:
    """Digest of a function's source, white space aside: to edit it makes the stages that use it stale."""
    return hashlib.sha256("".join(inspect.getsource(function).split()).encode()).hexdigest()[:16]


@functools.cache
def tokenizer_identity(spec: ModelSpec) -> str:
    """The digest of a local folder's tokenizer, or what identifies the model: a cut copy has the same tokenizer."""
    file = Path(spec.name) / "tokenizer.json"
    return digest(file) if file.exists() else spec.identity()["weights"]


def source_files(task: str, data_dir: str | None) -> list[Path]:
    """The local files that a task's samples come from."""
    if data.prepare.TASKS[task].tables:
        return data.prepare.fact_tables(task)
    splits = ("train", data.prepare.TASKS[task].test_split)
    return [data.prepare.source_path(task, split, Path(data_dir)) for split in splits] if data_dir else []


@functools.lru_cache(maxsize=1)
def load_classifier(spec: ModelSpec, dtype: str, kernels: str, sharded: bool):
    """Loaded once for all its runs; a run starts by resetting the weights. Its optimizer stays too, so one at a time."""

    return Classifier(spec, 2, getattr(torch, dtype), kernels, sharded)


@functools.lru_cache(maxsize=1)
def debater(spec: ModelSpec, settings):

    return generate.ENGINES[settings.engine](spec, settings)


# ---- commands ----


def run(experiments: list[Experiment]) -> None:
    check_out(experiments[0].config.out)
    print0(f"models in {experiments[0].config.dtype}, kernels: {experiments[0].config.kernels}")

    for spec in (experiments[0].weak, experiments[0].strong):
        tokenizer = load_tokenizer(spec)  # says what is wrong with a model before anything is written
    generate.check_chat(spec, experiments[0].config.chat, tokenizer)
    for size in (experiments[0].config.weak_gpus, experiments[0].config.strong_gpus):
        with in_groups(size):
            pass  # what cannot be cut is refused now
    with locked(Path(experiments[0].config.out)):
        make_all(experiments)
        if rank() == 0:
            write_report(experiments)


def make_all(experiments: list[Experiment]) -> None:
    stages = [s for e in experiments for s in e.stages()]
    start, made = time.time(), []
    for size, like in itertools.groupby(enumerate(stages, 1), key=lambda numbered: numbered[1].group_size):
        with in_groups(size) as (mine, groups):  # stages side by side do not need each other
            for n, stage in list(like)[mine::groups]:
                name = stage.folder.relative_to(experiments[0].config.out)
                before = time.time()
                if make_one(stage):
                    made.append(name)
                    took, so_far = time.time() - before, (time.time() - start) / 60
                    print0(f"[{n}/{len(stages)}] {name}: {took:.1f} s ({so_far:.1f} min so far)")
    made = len({name for names in gather(made) for name in names})
    print0(
        f"{made} of {len(stages)} stages made, {len(stages) - made} were done, in {(time.time() - start) / 60:.1f} min"
    )


def make_one(stage: Stage) -> bool:
    """Run a stage; the debater and the classifier, each of which may fill the memory, are never held together."""
    debates = stage.folder.parent.name == "transcripts" or stage.folder.name.startswith("zero-shot")
    if debates:
        release(load_classifier)
    try:
        return stage.run()
    except Exception as e:
        e.add_note(f"stage {stage.folder} failed; what is finished stays, and the same command resumes with this stage")
        raise
    finally:
        if debates:
            release(debater)


def release(cached) -> None:
    """Free what a cached function holds, if anything: collecting takes a fifth of a second."""
    if cached.cache_info().currsize:
        cached.cache_clear()
        gc.collect()


def write_report(experiments: list[Experiment]) -> None:
    out = Path(experiments[0].config.out)
    rows = [row for e in experiments for row in e.results()]
    if not rows:
        raise InputError(f"--out {out}: nothing is finished there yet; start with `python w2s.py run`")
    labels = REFERENCE_RUNS | ZERO_SHOT | {n: m.label for n, m in METHODS.items()}
    shown = {n: m.shown for n, m in METHODS.items()}
    into = results_folder(experiments[0].config)
    readings = [reading for e in experiments for reading in e.readings()]
    made = report.collect(out, rows, readings, labels, shown)
    paths = [*report.write(made, into), into / "report.html"]
    write_text(paths[-1], page.build(made, out, into))
    write_text(into / "README.md", report.card(made))
    otherwise = sum(len(e.otherwise) for e in experiments)
    if otherwise:
        print0(f"note: {otherwise} runs were made with other settings or inputs than these; `status` says with which")
    if experiments[0].config.tensorboard:
        report.write_tensorboard(made, out, into / "tensorboard")
    for path in paths:
        if path.suffix == ".md":
            print0(path.read_text())
    for path in paths:
        print0(f"wrote {path}")


def states(experiments: list[Experiment]) -> list[dict]:
    """Per stage its state, why it is stale, the seconds it took, and those it will take, estimated from similar stages."""
    rows = []
    for e in experiments:
        for stage in e.stages():
            difference = stage.difference()
            state = "missing" if difference is None else "stale" if difference else "done"
            if state != "done" and (stage.folder / "started.json").exists() and is_locked(Path(e.config.out)):
                state = "running"
            seconds = (read_manifest(stage.folder) or {}).get("seconds")
            name = stage.folder.relative_to(e.config.out).as_posix()
            rows.append({"stage": name, "state": state, "why": difference or [], "seconds": seconds})
    spent: dict[str, list[float]] = {}
    for row in rows:
        row["like"] = row["stage"].split("-")[0]  # task/predictions/weak, task/weak_labels/ours/seed0
        if row["state"] == "done" and row["seconds"] is not None:
            spent.setdefault(row["like"], []).append(row["seconds"])
    for row in rows:
        like = spent.get(row.pop("like"))
        row["expected"] = sum(like) / len(like) if like and row["state"] != "done" else None
    return rows


def status(experiments: list[Experiment]) -> None:
    rows = states(experiments)
    if experiments[0].config.json:
        print0(json.dumps(rows, indent=1))
        return
    for task in dict.fromkeys(row["stage"].split("/")[0] for row in rows):
        print0(task)
        for row in rows:
            if row["stage"].startswith(f"{task}/"):
                took = f"{row['seconds']:8.1f} s" if row["state"] == "done" else ""
                why = f"  ({'; '.join(row['why'])})" if row["why"] else ""
                print0(f"  {row['state']:8}{row['stage']:60}{took}{why}")
    count = {state: sum(r["state"] == state for r in rows) for state in ("done", "running", "stale", "missing")}
    left = [r["expected"] for r in rows if r["state"] != "done"]
    known = [x for x in left if x is not None]
    more = f"; about {sum(known) / 60:.0f} min left for {len(known)} of {len(left)}" if known else ""
    print0(", ".join(f"{n} {state}" for state, n in count.items()) + more)


COMMANDS = {"run": run, "plan": estimate.show, "status": status, "report": write_report}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = sys.argv[1] if len(sys.argv) > 1 else ""
        if asked in ("-h", "--help"):
            print(
                f"{__doc__}\nusage: python w2s.py {{{','.join(COMMANDS)}}} [flags]; `python w2s.py run --help` lists them"
            )
            return
        raise InputError(f"command {asked!r}: choose from {', '.join(COMMANDS)}")
    given = parse_given(Config, sys.argv[2:], f"w2s.py {sys.argv[1]}", __doc__)
    wrong = {name: given[name] for name in ("gpu", "gpus", "measure") if name in given}
    if given.get("preset") == "auto":
        wrong["preset"] = "auto"
    if sys.argv[1] != "plan" and wrong:
        flags = estimate.flags(wrong)
        raise InputError(f"{flags}: for `w2s.py plan` only; `run` takes the GPUs it has")
    if "gpu" in given and given.get("dtype", "auto") == "auto":
        given["dtype"] = "bfloat16"

    def experiments(**more) -> list[Experiment]:
        return [Experiment(Config.of(t, **given | more), t) for t in Config.of(**given | more).tasks]

    if "preset" in wrong:
        estimate.choose_preset(lambda name: experiments(preset=name))
        return
    if given.get("show_config"):
        for task in Config.of(**given).tasks:
            show_config(given, task)
        return
    COMMANDS[sys.argv[1]](experiments())


if __name__ == "__main__":
    run_script(main)
