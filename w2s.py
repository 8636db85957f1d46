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
import generate
import plan as estimate
import status
import steps
import train
from common import (
    InputError,
    Ranks,
    check_out,
    group_size,
    parse_given,
    print0,
    read_jsonl,
    refuse_shared_gpus,
    run_script,
    world,
)
from config import LABELS, METHODS, SHOWN, Config, Method, show_config
from debate import PROTOCOLS
from generate import DebateConfig
from model import ModelSpec, load_tokenizer
from reach import reached
from report import stats
from report.page import redraw, write
from report.rows import Reported, collect, saved
from report.study import redraw_study
from stages import Stage, State, digest, locked, settings_of
from steps import Debates, Files, Held, Run, ZeroShot
from train import TrainConfig

# ---- the steps of one task, in the paper's order ----


class Experiment:
    """The steps of one task, each a Stage. To build a stage computes nothing and changes nothing."""

    def __init__(self, config: Config, task: str):
        self.config, self.task = config, task
        self.weak, self.strong = ModelSpec.parse(config.weak), ModelSpec.parse(config.strong)
        self.folder = Path(config.out) / task
        self.files = Files(self.folder, task)
        self.runs = results_folder(config) / task  # what is trained on the data and the debates
        self.has_evidence = bool(data.prepare.TASKS[task].evidence)
        self.wording = data.prepare.TASKS[task].wording.parts()  # the sides' names, and what prompts say

    def prepare(self) -> Stage:
        """The samples: train_a for the weak models, train_b for the strong one, and test."""
        c, task = self.config, data.prepare.TASKS[self.task]
        limits = {"limit_train": c.limit_train, "limit_test": c.limit_test, "max_tokens": c.max_sample_tokens}
        row = {k: v for k, v in vars(task).items() if k not in ("formatter", "given", "wording", "file")}
        source = {"data_dir": None if task.file else c.data_dir and "local"}
        source["tokenizers"] = [tokenizer_identity(m) for m in (self.weak, self.strong)]
        return Stage(
            self.folder / "data", {"task": self.task} | row | source | limits,
            {p.name: p for p in source_files(self.task, c.data_dir)},
            functools.partial(steps.make_data, self.task, c.data_dir, (self.weak, self.strong), limits),
            code=reached([steps.make_data, task.formatter, task.given]),
            defaults={f.name: f.default for f in dataclasses.fields(task)} | {"values": {}},
        )  # fmt: skip

    def debates(self, protocol: str, turns: dict[int, int]) -> Stage:
        """Transcripts of train_a and train_b for every debate seed, with `turns[seed]` turns at least."""
        c, work = self.config, Debates(protocol, self.strong, turns)
        settings, inputs = c.settings(DebateConfig), self.files.inputs(("train_a", "train_b"), self.has_evidence)
        judge, more, roots = None, {}, [steps.make_debates, generate.ENGINES[c.engine], data.prepare.Wording]
        if protocol == "market_making":
            floor = self.market_making_judge().folder / "model"
            inputs["weak_floor"], more = floor, {"transcript": c.transcript}
            judge = functools.partial(steps.weak_choice, floor, getattr(torch, c.dtype), self.task, c.transcript)
            roots.append(steps.weak_choice)
        return Stage(
            self.folder / "transcripts" / protocol, inputs=inputs,
            make=functools.partial(steps.make_debates, self.files, work, settings, judge),
            **settings_of(settings, model=self.strong.identity(), wording=self.wording, **more),
            minimum={str(k): n for k, n in turns.items()}, code=reached(roots), on_all_ranks=True, work=work,
        )  # fmt: skip

    def market_making_judge(self) -> Stage:
        """The weak floor that market-making asks: finetuned as a whole, also where only heads are compared."""
        return Experiment(dataclasses.replace(self.config, head_only=False), self.task).weak_floor(0)

    def train_members(self, method: Method, seed: int) -> list[Stage]:
        """The judges of a method, each finetuned on train_a's ground truth with what it reads."""
        return [self.train_member(method, k, j, seed) for k, j in method.members]

    def train_member(self, method: Method, debate_seed: int, finetune_seed: int, seed: int) -> Stage:
        reads, debated = method.reads, method.reads in steps.PROTOCOL_OF
        said = f"-d{debate_seed}-t{method.turns}" if debated else ""
        name = {"nothing": "naive", "sides": "no_argument"}.get(reads, reads)
        floor = reads == "nothing" and finetune_seed == 0
        return self.finetune(
            f"weak-{name}{said}-f{finetune_seed}-s{seed}", seed, finetune_seed, part="train_a", reads=reads,
            debate_seed=debate_seed if debated else 0, turns=method.turns if debated else 0,
            predicts=("train_b", "test") if floor else ("train_b",), keep=floor and seed == 0,  # for market-making
        )  # fmt: skip

    def label_with_ensemble(self, name: str, seed: int) -> Stage:
        """Weak labels of train_b: the arithmetic mean of the members' probabilities."""
        members = {m.work.name: m.folder / "train_b.jsonl" for m in self.train_members(METHODS[name], seed)}
        return Stage(
            self.weak_labels(name, seed).parent, {"members": list(members)}, members,
            functools.partial(steps.average_labels, list(members.values())), code=reached([steps.average_labels]),
        )  # fmt: skip

    def weak_labels(self, name: str, seed: int) -> Path:
        return self.runs / f"weak_labels/{name}/seed{seed}/train_b.jsonl"

    def train_student(self, name: str, seed: int) -> Stage:
        """The strong model on the weak labels of train_b, on the plain samples. Gold labels are out of its reach."""
        labels = self.weak_labels(name, seed)
        return self.finetune(f"strong-{name}-s{seed}", seed, loss=METHODS[name].loss, labels=labels)

    def weak_floor(self, seed: int) -> Stage:
        """The weak model on ground truth, without debate: the one judge of plain finetuning."""
        return self.train_members(METHODS["finetune"], seed)[0]

    def strong_ceiling(self, seed: int) -> Stage:
        """The strong model on the ground truth of the student's half."""
        gold = self.folder / "data/train_b.gold.jsonl"
        return self.finetune(f"strong-ceiling-s{seed}", seed, labels=gold, predicts=("test",))

    def zero_shot(self, who: str) -> Stage:
        """What a model answers without training, by the likelihood of the two sides' names."""
        c, name = self.config, who.replace("_", "-")
        work = ZeroShot(self.weak if who == "zero_shot_weak" else self.strong, who == "zero_shot_evidence")
        sharded = c.engine == "sharded" and work.model == self.strong  # the weak one fits; vLLM has no likelihoods
        engine = "sharded" if sharded else "replicated"
        settings = DebateConfig(chat=c.chat, dtype=c.dtype, cache_tokens=c.cache_tokens, engine=engine)
        asked = {"model": work.model.identity(), "loss": "none", "chat": c.chat, "dtype": c.dtype}
        wording = {part: value for part, value in self.wording.items() if part != "begin"}  # nobody takes a turn
        return Stage(
            self.folder / "predictions" / name, asked | {"wording": wording},
            self.files.inputs(("train_b", "test"), work.evidence),
            functools.partial(steps.make_zero_shot, self.files, work, settings),
            code=reached([steps.make_zero_shot, generate.ENGINES[engine], data.prepare.Wording]),
            on_all_ranks=True, twins=self.twins(name), work=work,
        )  # fmt: skip

    def finetune(
        self, name: str, seed: int, finetune_seed: int = 0, part: str = "train_b", loss: str = "xent", keep: bool = False, **more
    ) -> Stage:  # fmt: skip
        """A finetuning with the configuration's settings: of the weak model on train_a, of the strong one on train_b.

        It writes its probabilities on each part that it predicts to predictions/<name>.
        """
        c, weak = self.config, part == "train_a"
        more_settings = {"lr": c.weak_lr if weak else c.lr}
        if c.head_only:
            more_settings = {"lr": c.head_lr, "epochs": c.head_epochs, "lora_rank": 0}
        settings = c.settings(TrainConfig, loss=loss, seed=100 * seed + finetune_seed, **more_settings)
        run = Run(
            name, self.weak if weak else self.strong, settings, part=part, order=c.transcript, heads=c.head_only,
            keep=keep or c.keep_models, tensorboard=c.tensorboard, **more,
        )  # fmt: skip
        parts, protocol = dict.fromkeys((part, *run.predicts)), steps.PROTOCOL_OF.get(run.reads)
        inputs: dict = self.files.inputs(parts, run.reads == "evidence")
        if run.labels:
            inputs["labels"] = run.labels
        for p in parts if protocol else ():
            transcripts = self.files.transcripts(protocol, run.debate_seed, p)
            inputs[f"{p} transcripts"] = functools.partial(beginning, transcripts, run.turns)
        reads: dict = {"reads": run.reads}
        if protocol or run.reads == "sides":
            reads |= {"turns": run.turns, "order": run.order, "sides": self.wording["sides"]}
        read = steps.READ[run.reads]
        make = functools.partial(steps.make_run, self.files, run, read)
        if run.heads:
            make = functools.partial(steps.make_head, self.files, run, read, self.all_runs)
        return Stage(
            self.runs / "predictions" / name, inputs=inputs, make=make,
            **settings_of(settings, model=run.model.identity(), heads=run.heads, **reads),
            code=reached([make.func, read, train.LOSSES[loss]]),
            minimum={"kept models": int(run.keep and not run.heads)},  # a model that was kept and is not asked for does no harm
            on_all_ranks=True, twins=() if run.heads else self.twins(name), work=run,
            group_size=0 if run.heads else c.weak_gpus if weak else c.strong_gpus,
        )  # fmt: skip

    def twins(self, name: str) -> tuple[Path, ...]:
        """The same predictions of the other tasks that have the same samples."""
        others = [t for t in self.config.tasks if t != self.task and source_of(t) == source_of(self.task)]
        return tuple(self.folder.with_name(t) / "predictions" / name for t in others)

    # ---- all of them ----

    def methods(self) -> dict[str, Method]:
        """The chosen rows and points that this task can have."""
        chosen = {n: m for n, m in METHODS.items() if n in self.config.methods}
        return {n: m for n, m in chosen.items() if m.reads != "evidence" or self.has_evidence}

    def reference_runs(self, seed: int) -> dict[str, Stage]:
        """What stands around the methods in Table 2: no training, the weak floor, the strong ceiling."""
        untrained = [who for who in stats.ZERO_SHOT if who != "zero_shot_evidence" or self.has_evidence]
        bounds = {"weak_floor": self.weak_floor(seed), "strong_ceiling": self.strong_ceiling(seed)}
        return {who: self.zero_shot(who) for who in untrained} | bounds

    def all_runs(self) -> Iterator[Run]:
        """Every finetuning that the chosen methods and seeds need."""
        return (s.work for s in self.stages() if isinstance(s.work, Run))

    def stages(self) -> Iterator[Stage]:
        """Every stage that the chosen methods and seeds need, each once, in an order that can run."""
        methods, seeds = self.methods(), self.config.seeds
        wanted = [self.prepare(), *map(self.weak_floor, seeds)]
        for protocol in PROTOCOLS:
            turns: dict[int, int] = {}
            for m in methods.values():
                if steps.PROTOCOL_OF.get(m.reads) == protocol:
                    turns |= {k: max(m.turns, turns.get(k, 0)) for k, _ in m.members}
            if turns:
                wanted += [self.market_making_judge()] if protocol == "market_making" else []
                wanted.append(self.debates(protocol, turns))
        wanted += [member for seed in seeds for m in methods.values() for member in self.train_members(m, seed)]
        wanted += [self.label_with_ensemble(name, seed) for seed in seeds for name in methods]
        for seed in seeds:
            wanted += [*self.reference_runs(seed).values(), *(self.train_student(name, seed) for name in methods)]
        yield from {stage.folder: stage for stage in wanted}.values()

    def runs_to_report(self) -> Iterator[Reported]:
        """Every row of results.jsonl, finished or not: the reference runs and the students of each seed."""
        for seed in self.config.seeds:
            for name, stage in self.reference_runs(seed).items():
                yield Reported(self.task, name, seed, stage)
            for name, m in self.methods().items():
                judges = dict(zip(m.members, self.train_members(m, seed), strict=True))
                student, labels = self.train_student(name, seed), self.weak_labels(name, seed).parent
                yield Reported(
                    self.task, name, seed, student, labels, m.reads, m.turns, judges, self.wording["sides"],
                    steps.PROTOCOL_OF.get(m.reads, ""),
                )  # fmt: skip


def results_folder(config: Config) -> Path:
    return Path(config.out, "heads" if config.head_only else "")


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
    data.prepare.TASKS[name] = task
    return name


# ---- commands ----


def run(experiments: list[Experiment]) -> None:
    config, ranks = experiments[0].config, world()
    check_out(config.out)
    print0(f"models in {config.dtype}, kernels: {config.kernels}")
    for spec in (experiments[0].weak, experiments[0].strong):
        tokenizer = load_tokenizer(spec)  # says what is wrong with a model before anything is written
    generate.check_chat(spec, config.chat, tokenizer)
    sizes = (config.weak_gpus, config.strong_gpus)
    alone = config.engine != "sharded" and all(group_size(ranks.size, size) == 1 for size in sizes)
    if not alone:
        refuse_shared_gpus("--weak-gpus 1 --strong-gpus 1 --engine replicated")
    generate.ENGINES[config.engine].check(experiments[0].strong, ranks)
    groups = {size: ranks.split(size) for size in dict.fromkeys((0, *sizes))}
    with locked(Path(config.out)):
        make_all([s for e in experiments for s in e.stages()], Path(config.out), groups)
        if ranks.rank == 0:
            write_report(experiments)


def make_all(stages: list[Stage], out: Path, groups: dict[int, Ranks]) -> None:
    """Make every stage that is not done. Neighbours of one group size go to the groups in turn: they do not need each other."""
    start, made, held = time.time(), set(), Held()
    for size, pairs in itertools.groupby(enumerate(stages, 1), key=lambda pair: pair[1].group_size):
        ranks, neighbours = groups[size], list(pairs)
        if ranks.count > 1:  # those never made first, so that every group gets its share of them
            once = groups[0].broadcast({n for n, stage in neighbours if (stage.folder / "manifest.json").exists()})
            neighbours.sort(key=lambda pair: pair[0] in once)
        for n, stage in neighbours[ranks.index :: ranks.count]:
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


def redraw_report(experiments: list[Experiment]) -> None:
    """Tables and figures again from results.jsonl and debates.jsonl, where that is all there is.

    Of a study, a folder with study.json: of all its runs, and across them.
    """
    out = results_folder(experiments[0].config)
    if (out / "study.json").exists():
        redraw_study(out, LABELS, SHOWN)
    else:
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
    command, *argv = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(
            f"{__doc__}\nusage: python w2s.py {{{','.join(COMMANDS)}}} [flags]; `python w2s.py run --help` lists them"
        )
        return
    if command not in COMMANDS:
        raise InputError(f"command {command!r}: choose from {', '.join(COMMANDS)}")
    given = parse_given(Config, argv, f"w2s.py {command}", __doc__)
    if "task_file" in given:
        given["tasks"] = (add_task(Path(given["task_file"])), *given.get("tasks", ()))
    for_plan = {name: given[name] for name in ("gpu", "gpus", "measure") if name in given}
    if given.get("preset") == "auto":
        for_plan["preset"] = "auto"
    if command != "plan" and for_plan:
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
        COMMANDS[command](experiments())


if __name__ == "__main__":
    run_script(main)
