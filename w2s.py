"""Debate helps weak-to-strong generalization, from the data to the tables.

    python w2s.py run --preset smoke                                          two minutes on a CPU, random models
    python w2s.py run --preset tiny                                           a real small model on a CPU
    python w2s.py run --preset small --tasks sciq --methods finetune ours     one GPU, two rows of Table 2
    python w2s.py run --preset small --task-file mytask.jsonl                 your own data (data/task_file.py)
    torchrun --nproc-per-node 8 w2s.py run ...                                every stage on 8 GPUs
    python w2s.py plan | status | report  (same flags)                        what would run | what is done | tables again
    python w2s.py redraw --out results/FOLDER                                 tables and figures of rows that were kept

The method, each step a function below: the strong model debates every training sample (`debates`); weak models, the
judges, are finetuned on ground truth and read the transcripts (`train_members`); their soft labels on the other half are
averaged (`label_with_ensemble`); the strong model is finetuned on those (`train_student`) and scored between the weak
floor and the strong ceiling (`pgr`, in report/stats.py). Every step is a stage: done once, skipped while nothing that it
depends on has changed, continued when it was killed.
"""

import dataclasses
import functools
import hashlib
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
import plan as estimate
import status
import steps
import train
from common import (
    InputError,
    Ranks,
    check_out,
    parse_given,
    print0,
    read_jsonl,
    run_script,
    world,
)
from config import FIGURE_METHODS, METHODS, NO_FIGURES, REFERENCE_RUNS, ZERO_SHOT, Config, Method, show_config
from debate import PROTOCOLS
from generate import DebateConfig
from model import ModelSpec, load_tokenizer
from reach import reached
from report.page import redraw, write
from report.rows import Reported, collect, saved
from stages import Stage, State, digest, locked, settings_of
from steps import Debates, Files, Held, Run, ZeroShot
from train import TrainConfig

# ---- the steps of one task, in the paper's order ----

# What does not make a stage stale as code: tables of which it records the entry that it uses, models, which it records by
# their weights, what reports progress, and descriptions of the work.
APART = (
    "LOSSES", "READ", "PROTOCOL_OF", "PROMPTS", "TASKS", "ENGINES", "BUILTIN", "builtin_folder", "converted_folder", "digest", "ALONE",
    "StepLog", "tensorboard", "print0", "model_card", "Held", "Run", "Files", "Debates", "ZeroShot",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The steps of one task, each a Stage. To build a stage computes nothing and changes nothing."""

    config: Config
    task: str

    @property
    def folder(self) -> Path:
        return Path(self.config.out) / self.task

    @property
    def files(self) -> Files:
        return Files(self.folder, self.task)

    @property
    def runs(self) -> Path:
        """The folder of what is trained on the data and the debates."""
        return results_folder(self.config) / self.task

    @property
    def weak(self) -> ModelSpec:
        return ModelSpec.parse(self.config.weak)

    @property
    def strong(self) -> ModelSpec:
        return ModelSpec.parse(self.config.strong)

    @property
    def has_evidence(self) -> bool:
        return bool(data.prepare.TASKS[self.task].evidence)

    def prepare(self) -> Stage:
        """The samples: train_a for the weak models, train_b for the strong one, and test."""
        c, task = self.config, data.prepare.TASKS[self.task]
        limits = {"limit_train": c.limit_train, "limit_test": c.limit_test, "max_tokens": c.max_sample_tokens}
        row = {k: v for k, v in vars(task).items() if k not in ("formatter", "wording", "file")}
        made_with = {
            "data_dir": None if task.file else c.data_dir and "local",
            "tokenizers": [tokenizer_identity(m) for m in (self.weak, self.strong)],
        }
        return Stage(
            self.folder / "data", {"task": self.task} | row | made_with | limits,
            {p.name: p for p in source_files(self.task, c.data_dir)}, functools.partial(steps.make_data, self.task, c.data_dir, (self.weak, self.strong), limits),
            code=reached([steps.make_data, task.formatter], APART),
            defaults={f.name: f.default for f in dataclasses.fields(task)} | {"values": {}},
        )  # fmt: skip

    def weak_floor(self, seed: int) -> Run:
        """The weak model on ground truth, without debate. Replicate 0 stays: market-making asks it for its choice."""
        return self.member("nothing", 0, 0, 0, seed)

    def strong_ceiling(self, seed: int) -> Run:
        """The strong model on the ground truth of the student's half."""
        gold = self.folder / "data/train_b.gold.jsonl"
        return self.run(f"strong-ceiling-s{seed}", seed, labels=gold, predicts=("test",))

    def debates(self, protocol: str, turns: dict[int, int]) -> Stage:
        """Transcripts of train_a and train_b for every debate seed, with `turns[seed]` turns at least."""
        c, files = self.config, self.files
        settings = DebateConfig(**{f.name: getattr(c, f.name) for f in dataclasses.fields(DebateConfig)})
        inputs = {part: files.samples(part) for part in ("train_a", "train_b")}
        if self.has_evidence:
            inputs |= {f"{part} evidence": files.evidence(part) for part in inputs}
        judge, more, roots = None, {}, [steps.make_debates, generate.ENGINES[c.engine], data.prepare.Wording]
        if protocol == "market_making":
            folder = self.finetuning(self.market_making_judge()).folder / "model"
            inputs["weak_floor"], more = folder, {"transcript": c.transcript}
            judge = functools.partial(steps.weak_choice, folder, getattr(torch, c.dtype), self.task, c.transcript)
            roots.append(steps.weak_choice)
        work = Debates(protocol, self.strong, turns)
        return Stage(
            self.folder / "transcripts" / protocol, inputs=inputs,
            make=functools.partial(steps.make_debates, files, work, settings, judge),
            **settings_of(settings, model=self.strong.identity(), wording=self.wording(), **more),
            minimum={str(k): n for k, n in turns.items()}, code=reached(roots, APART), on_all_ranks=True, work=work,
        )  # fmt: skip

    def wording(self) -> dict:
        """What prompts say of this task, and its names for the two sides."""
        return dataclasses.asdict(debate.PROMPTS[self.task])

    def zero_shot(self, who: str) -> Stage:
        """What a model answers without training, by the likelihood of the two sides' names."""
        c, files = self.config, self.files
        work = ZeroShot(self.weak if who == "zero_shot_weak" else self.strong, who == "zero_shot_evidence")
        settings = DebateConfig(chat=c.chat, dtype=c.dtype, cache_tokens=c.cache_tokens)
        inputs = {part: files.samples(part) for part in ("train_b", "test")}
        if work.evidence:
            inputs |= {f"{part} evidence": files.evidence(part) for part in inputs}
        folder = self.folder / "predictions" / who.replace("_", "-")
        asked = {"model": work.model.identity(), "loss": "none", "chat": c.chat, "dtype": c.dtype}
        return Stage(
            folder, asked | {"wording": self.wording()}, inputs, functools.partial(steps.make_zero_shot, files, work, settings),
            code=reached([steps.make_zero_shot, generate.Debater, data.prepare.Wording], APART), on_all_ranks=True, twins=self.twins(folder), work=work,
        )  # fmt: skip

    def twins(self, folder: Path) -> tuple[Path, ...]:
        """The same run of the other tasks that have the same samples."""
        others = [t for t in self.config.tasks if t != self.task and source_of(t) == source_of(self.task)]
        return tuple(self.folder.with_name(t) / folder.relative_to(self.folder) for t in others)

    def market_making_judge(self) -> Run:
        """The weak floor that market-making asks: finetuned as a whole, also where only heads are compared."""
        return Experiment(dataclasses.replace(self.config, head_only=False), self.task).weak_floor(0)

    def train_members(self, method: Method, seed: int) -> list[Run]:
        """The judges of a method, each finetuned on train_a's ground truth with what it reads."""
        return [self.member(method.reads, k, j, method.turns, seed) for k, j in method.members]

    def member(self, reads: str, debate_seed: int, finetune_seed: int, turns: int, seed: int) -> Run:
        said = f"-d{debate_seed}-t{turns}" if reads in steps.PROTOCOL_OF else ""
        name = {"nothing": "naive", "sides": "no_argument"}.get(reads, reads)
        floor = reads == "nothing" and finetune_seed == 0
        return self.run(
            f"weak-{name}{said}-f{finetune_seed}-s{seed}", seed, finetune_seed, reads=reads,
            debate_seed=debate_seed if said else 0, turns=turns if said else 0, part="train_a",
            predicts=("train_b", "test") if floor else ("train_b",), keep=floor and seed == 0,
        )  # fmt: skip

    def label_with_ensemble(self, name: str, seed: int) -> Stage:
        """Weak labels of train_b: the arithmetic mean of the members' probabilities."""
        members = {m.name: self.finetuning(m).folder / "train_b.jsonl" for m in self.train_members(METHODS[name], seed)}
        return Stage(
            self.weak_labels(name, seed).parent, {"members": list(members)}, members,
            functools.partial(steps.average_labels, list(members.values())), code=reached([steps.average_labels], APART),
        )  # fmt: skip

    def weak_labels(self, name: str, seed: int) -> Path:
        return self.runs / f"weak_labels/{name}/seed{seed}/train_b.jsonl"

    def train_student(self, name: str, seed: int) -> Run:
        """The strong model on the weak labels of train_b, on the plain samples. Gold labels are out of its reach."""
        labels = self.weak_labels(name, seed)
        return self.run(f"strong-{name}-s{seed}", seed, loss=METHODS[name].loss, labels=labels)

    def run(
        self, name: str, seed: int, finetune_seed: int = 0, loss: str = "xent", part: str = "train_b", **more
    ) -> Run:
        """A finetuning with the configuration's settings: of the weak model on train_a, of the strong one on train_b."""
        c = self.config
        spec, lr = (self.weak, c.weak_lr) if part == "train_a" else (self.strong, c.lr)
        lr = c.head_lr if c.head_only else lr
        settings = TrainConfig(
            loss=loss, lr=lr, epochs=c.head_epochs if c.head_only else c.epochs, batch_size=c.batch_size,
            seed=100 * seed + finetune_seed, dtype=c.dtype, aux_warmup=c.aux_warmup, checkpointing=c.checkpointing,
            kernels=c.kernels, max_tokens_per_forward=c.max_tokens_per_forward, compile=c.compile,
            lora_rank=0 if c.head_only else c.lora_rank, lora_alpha=c.lora_alpha,
        )  # fmt: skip
        more["keep"] = more.get("keep", False) or c.keep_models
        return Run(
            name, spec, settings, part=part, order=c.transcript, tensorboard=c.tensorboard, heads=c.head_only, **more
        )  # fmt: skip

    def finetuning(self, run: Run) -> Stage:
        """The stage of a run: its probabilities on each part that it predicts, in predictions/<name>."""
        c, files = self.config, self.files
        read = steps.READ[run.reads]
        parts = dict.fromkeys((run.part, *run.predicts))
        inputs: dict = {part: files.samples(part) for part in parts}
        if run.labels:
            inputs["labels"] = run.labels
        if run.reads == "evidence":
            inputs |= {f"{part} evidence": files.evidence(part) for part in parts}
        reads: dict = {"reads": run.reads}
        if protocol := steps.PROTOCOL_OF.get(run.reads):
            for part in parts:
                path = files.transcripts(protocol, run.debate_seed, part)
                inputs[f"{part} transcripts"] = functools.partial(beginning, path, run.turns)
        if protocol or run.reads == "sides":
            reads |= {"turns": run.turns, "order": run.order, "sides": self.wording()["sides"]}
        make = functools.partial(steps.make_run, files, run, read)
        if run.heads:
            make = functools.partial(steps.make_head, files, run, self.all_runs, read)
        folder = (self.runs if run.heads else self.folder) / "predictions" / run.name
        return Stage(
            folder, inputs=inputs, make=make,
            **settings_of(run.train, model=run.model.identity(), heads=run.heads, **reads),
            code=reached([make.func, read, train.LOSSES[run.train.loss]], APART),
            minimum={"kept models": int(run.keep and not run.heads)},  # a model that was kept and is not asked for does no harm
            on_all_ranks=True, twins=() if run.heads else self.twins(folder), work=run,
            group_size=0 if run.heads else c.weak_gpus if run.part == "train_a" else c.strong_gpus,
        )  # fmt: skip

    def methods(self) -> dict[str, Method]:
        """The chosen rows and points that this task can have."""
        chosen = {n: m for n, m in METHODS.items() if n in self.config.methods}
        if self.task in NO_FIGURES:
            chosen = {n: m for n, m in chosen.items() if n not in FIGURE_METHODS}
        return {n: m for n, m in chosen.items() if m.reads != "evidence" or self.has_evidence}

    def reference_runs(self, seed: int) -> dict[str, Stage]:
        """What stands around the methods in Table 2: no training, the weak floor, the strong ceiling."""
        without = [who for who in ZERO_SHOT if who != "zero_shot_evidence" or self.has_evidence]
        bounds = {"weak_floor": self.weak_floor(seed), "strong_ceiling": self.strong_ceiling(seed)}
        return {who: self.zero_shot(who) for who in without} | {n: self.finetuning(r) for n, r in bounds.items()}

    def all_runs(self) -> Iterator[Run]:
        """Every finetuning that the chosen methods and seeds need."""
        return (s.work for s in self.stages() if isinstance(s.work, Run))

    def stages(self) -> Iterator[Stage]:
        """Every stage that the chosen methods and seeds need, each once, in an order that can run."""
        methods, seeds, stage = self.methods(), self.config.seeds, self.finetuning
        wanted = [self.prepare(), *(stage(self.weak_floor(seed)) for seed in seeds)]
        for protocol in PROTOCOLS:
            turns: dict[int, int] = {}
            for m in methods.values():
                if steps.PROTOCOL_OF.get(m.reads) == protocol:
                    turns |= {k: max(m.turns, turns.get(k, 0)) for k, _ in m.members}
            if turns:
                wanted += [stage(self.market_making_judge())] if protocol == "market_making" else []
                wanted.append(self.debates(protocol, turns))
        wanted += [stage(run) for seed in seeds for m in methods.values() for run in self.train_members(m, seed)]
        wanted += [self.label_with_ensemble(name, seed) for seed in seeds for name in methods]
        for seed in seeds:
            wanted += [*self.reference_runs(seed).values(), *(stage(self.train_student(n, seed)) for n in methods)]
        yield from {stage.folder: stage for stage in wanted}.values()

    def runs_to_report(self) -> Iterator[Reported]:
        """Every row of results.jsonl, finished or not: the reference runs and the students of each seed."""
        for seed in self.config.seeds:
            for name, stage in self.reference_runs(seed).items():
                yield Reported(self.task, name, seed, stage)
            for name, m in self.methods().items():
                judges = dict(zip(m.members, map(self.finetuning, self.train_members(m, seed)), strict=True))
                labels, student = self.weak_labels(name, seed), self.finetuning(self.train_student(name, seed))
                sides = debate.PROMPTS[self.task].sides
                yield Reported(self.task, name, seed, student, labels.parent, m.reads, m.turns, judges, sides)


def results_folder(config: Config) -> Path:
    return Path(config.out) / "heads" if config.head_only else Path(config.out)


def source_of(task: str) -> str:
    """Tasks of one source have the same samples, with and without evidence."""
    return data.prepare.TASKS[task].source or task


def beginning(path: Path, turns: int) -> str:
    """Digest of the first `turns` turns of a transcript file: a longer debate does not change a shorter one."""
    try:
        rows = [[r["id"], r["sides"][:turns], r["turns"][:turns]] for r in read_jsonl(path)]
    except (KeyError, TypeError):
        raise InputError(f"{path}: not transcripts; move the folder away, and they are made again") from None
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def tokenizer_identity(spec: ModelSpec) -> str:
    """The digest of a local folder's tokenizer, or what identifies the model: a cut copy has the same tokenizer."""
    file = Path(spec.name) / "tokenizer.json"
    return digest(file) if file.exists() else spec.identity()["weights"]


def source_files(task: str, data_dir: str | None) -> list[Path]:
    """The local files that a task's samples come from."""
    entry = data.prepare.TASKS[task]
    if entry.tables:
        return data.prepare.fact_tables(task)
    if entry.file:
        return [entry.file]
    splits = ("train", entry.test_split)
    return [data.prepare.source_path(task, split, Path(data_dir)) for split in splits] if data_dir else []


def add_task(path: Path) -> str:
    """Make a task file a task like the others, for this process; returns its name."""
    name, task = data.prepare.task_of_file(path)
    data.prepare.TASKS[name], debate.PROMPTS[name] = task, task.wording
    return name


# ---- commands ----


def run(experiments: list[Experiment]) -> None:
    config, ranks = experiments[0].config, world()
    check_out(config.out)
    print0(f"models in {config.dtype}, kernels: {config.kernels}")
    for spec in (experiments[0].weak, experiments[0].strong):
        tokenizer = load_tokenizer(spec)  # says what is wrong with a model before anything is written
    generate.check_chat(spec, config.chat, tokenizer)
    groups = {size: ranks.split(size) for size in (0, config.weak_gpus, config.strong_gpus)}
    with locked(Path(config.out)):
        make_all([s for e in experiments for s in e.stages()], Path(config.out), groups)
        if ranks.rank == 0:
            write_report(experiments)


def make_all(stages: list[Stage], out: Path, groups: dict[int, Ranks]) -> None:
    """Make every stage that is not done. Neighbours of one group size go to the groups in turn: they do not need each other."""
    start, made, held = time.time(), set(), Held()
    for size, neighbours in itertools.groupby(enumerate(stages, 1), key=lambda numbered: numbered[1].group_size):
        ranks = groups[size]
        for n, stage in list(neighbours)[ranks.index :: ranks.count]:
            name, before = stage.folder.relative_to(out), time.time()
            try:
                if stage.run(ranks, held):
                    made.add(name)
                    took, so_far = time.time() - before, (time.time() - start) / 60
                    ranks.print(f"[{n}/{len(stages)}] {name}: {took:.1f} s ({so_far:.1f} min so far)")
            except Exception as e:
                e.add_note(f"stage {stage.folder} failed; the same command resumes with it, what is finished stays")
                raise
        groups[0].barrier()
    n_made, minutes = len(set().union(*groups[0].gather(made))), (time.time() - start) / 60
    print0(f"{n_made} of {len(stages)} stages made, {len(stages) - n_made} were done, in {minutes:.1f} min")


def accept(experiments: list[Experiment]) -> None:
    """Take finished stages as made by the code as it now is: after a refactoring that changes no result."""
    with locked(Path(experiments[0].config.out)):
        stages = [s for e in experiments for s in e.stages()]
        accepted = [s.folder for s in stages if s.accept()]
        left = sum(s.state()[0] is State.STALE for s in stages)
    print0(f"{len(accepted)} of {len(stages)} stages accepted; {left} are stale for other reasons (see `status`)")


LABELS = REFERENCE_RUNS | ZERO_SHOT | {n: m.label for n, m in METHODS.items()}
SHOWN = {n: m.shown for n, m in METHODS.items()}


def redraw_report(experiments: list[Experiment]) -> None:
    """Tables and figures again from results.jsonl, debates.jsonl and summary.json, where that is all there is."""
    out = results_folder(experiments[0].config)
    redraw(saved(out, LABELS, SHOWN), out)


def write_report(experiments: list[Experiment]) -> None:
    config = experiments[0].config
    report = collect(Path(config.out), [run for e in experiments for run in e.runs_to_report()], LABELS, SHOWN)
    write(report, results_folder(config))
    if report.stale:
        print0(f"note: {report.stale} runs were made with other settings or inputs than these; see `status`")


def show_status(experiments: list[Experiment]) -> None:
    config = experiments[0].config
    status.show([s for e in experiments for s in e.stages()], Path(config.out), config.json)


COMMANDS = {
    "run": run, "plan": estimate.show, "status": show_status, "report": write_report, "redraw": redraw_report, "accept": accept,
}  # fmt: skip


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
    if "task_file" in given:
        given["tasks"] = (add_task(Path(given["task_file"])), *given.get("tasks", ()))
    for_plan = {name: given[name] for name in ("gpu", "gpus", "measure") if name in given}
    if given.get("preset") == "auto":
        for_plan["preset"] = "auto"
    if sys.argv[1] != "plan" and for_plan:
        raise InputError(f"{estimate.flags(for_plan)}: for `w2s.py plan` only; `run` takes the GPUs it has")
    if "gpu" in given and given.get("dtype", "auto") == "auto":
        given["dtype"] = "bfloat16"

    def experiments(**more) -> list[Experiment]:
        return [Experiment(Config.of(task, **given | more), task) for task in Config.of(**given | more).tasks]

    if "preset" in for_plan:
        estimate.choose_preset(lambda name: experiments(preset=name))
    elif given.get("show_config"):
        for task in Config.of(**given).tasks:
            show_config(given, task)
    else:
        COMMANDS[sys.argv[1]](experiments())


if __name__ == "__main__":
    run_script(main)
