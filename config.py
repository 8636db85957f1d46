"""What is compared and at which sizes: METHODS, PRESETS, and Config, the flags of w2s.py with their defaults."""

import dataclasses
import importlib.util
from pathlib import Path

import torch

import data.prepare
from common import ROOT, InputError, check_ranges, flag, picked, print0
from generate import ENGINES, DebateConfig
from kernels import CHOICES, resolve
from model import ModelSpec, resolve_dtype
from sizes import GPUS
from train import TrainConfig

# ---- what is compared ----


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to supervise: a row of a table or a point of a figure.

    `reads` is what the members, the judges, read beside the question: a protocol's transcripts (debate, consultancy,
    market_making, independent), other_debate (the one about another question), sides (without their arguments), evidence
    (the passage itself), or nothing. `members` are pairs (debate seed, finetuning seed), `loss` is the student's, and
    `shown` says where: "table2", or "figure2:3" for the point at 3.
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
    "independent": Method("both sides, not hearing each other (control)", "independent", FOUR, ("table4",)),
    "consultancy_single": Method("consultancy, single weak model", "consultancy", SINGLE, ("table4",)),
    "independent_single": Method(
        "not hearing each other, single weak model (control)", "independent", SINGLE, ("table4",)
    ),
    "turns_1_single": Method("1 turn, single weak model", "debate", SINGLE, ("table4",), turns=1),
    "single": Method("single weak model", "debate", SINGLE, ("table5", "figure2:1")),
    "finetune_ensembles": Method("finetune ensembles", "debate", finetune_ensemble(4), ("table5",)),
    "ours": Method("ours (debate ensembles)", "debate", FOUR, EVERYWHERE),
    "ours_aux": Method("ours w/ aux. loss", "debate", FOUR, ("table2",), loss="logconf"),
    "ours_pro": Method("ours w/ pro. loss", "debate", FOUR, ("table2",), loss="product"),
    "naive_ensemble": Method("naive ensemble (control)", "nothing", finetune_ensemble(4), ("table5",)),
    "no_argument": Method("sides without arguments (control)", "sides", finetune_ensemble(4), ("table5",)),
    "other_debate": Method("debates of other questions (control)", "other_debate", FOUR, ("table5",)),
    "other_debate_single": Method(
        "debate of another question, single weak model (control)", "other_debate", SINGLE, ("table5",)
    ),
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
LABELS = {n: m.label for n, m in METHODS.items()} | {
    "weak_floor": "weak performance",
    "strong_ceiling": "strong ceiling",
    "zero_shot_weak": "weak model, zero-shot",
    "zero_shot_strong": "strong model, zero-shot",
    "zero_shot_evidence": "strong model, zero-shot with evidence",
}
SHOWN = {n: m.shown for n, m in METHODS.items()}
TABLE_METHODS = tuple(n for n, m in METHODS.items() if any(s.startswith("table") for s in m.shown))
EXTRA = (  # run only where --methods names them: not the paper's, or the paper's with one judge, at a quarter of the cost
    "ours_aux", "ours_pro", "independent", "other_debate", "consultancy_single", "independent_single", "turns_1_single",
    "other_debate_single",
)  # fmt: skip
DEFAULT_METHODS = tuple(n for n in METHODS if n not in EXTRA)
NO_FIGURES = ("boolq", "cosmos_qa", "boolq_evidence", "cosmos_qa_evidence")  # the paper draws none for the first two

PAPER_TASKS = ("sciq", "boolq", "cosmos_qa", "anthropic_hh")
PAPER = dict(
    tasks=PAPER_TASKS, seeds=(0, 1, 2, 3, 4), weak="Qwen/Qwen-7B", strong="Qwen/Qwen-14B", weak_gpus=4, strong_gpus=8,
    transcript="last",  # "appended to each sample", as the paper words it
    max_tokens_per_forward=6144,  # what `plan` finds to fit in 80 GB
)  # fmt: skip
ADAPTERS = dict(  # they want ten times the rate (Schulman et al. 2025, LoRA Without Regret); a GPU trains them alone
    lora_rank=16, lr=10 * TrainConfig.lr, weak_gpus=1, strong_gpus=1, max_tokens_per_forward=4096
)  # fmt: skip
PRESETS = {
    "smoke": dict(
        tasks=PAPER_TASKS, seeds=(0, 1), weak="random-small", strong="random-large", data_dir=str(ROOT / "data/tiny"),
        lr=3e-3, batch_size=8, epochs=1, max_new_tokens=4, temperature=1.0,  # a larger rate enlarges rounding too
    ),
    "tiny": dict(
        tasks=("places_evidence", "places"), seeds=(0, 1), weak="smollm2-135m:6", strong="smollm2-135m", limit_train=440,
        lr=2e-4, weak_lr=3e-4, batch_size=16, max_new_tokens=16, chat=True, cache_tokens=65536,
        dtype="bfloat16" if torch.cpu._is_avx512_bf16_supported() else "auto",  # twice as fast there, 5 times slower elsewhere
        weak_gpus=1, strong_gpus=1,  # under several processes each trains a model of its own
        methods=tuple(n for n in DEFAULT_METHODS if n in (*TABLE_METHODS, "ensemble_2", "turns_1", "turns_2")),
    ),
    "small": dict(
        tasks=PAPER_TASKS, seeds=(0, 1, 2), weak="Qwen/Qwen2.5-0.5B", strong="Qwen/Qwen2.5-1.5B", limit_train=4000,
        limit_test=2000, max_new_tokens=150, **ADAPTERS,
    ),
    "paper-lora": PAPER | ADAPTERS,
    "paper": PAPER,
}  # fmt: skip
PER_TASK = {  # where a task departs from its preset
    (preset, task): dict(methods=tuple(n for n in of.get("methods", DEFAULT_METHODS) if n in TABLE_METHODS))
    for preset, of in PRESETS.items() for task in NO_FIGURES
} | {
    ("tiny", "places"): dict(methods=tuple(n for n in DEFAULT_METHODS if METHODS[n].shown[0] in ("table2", "table5"))),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What holds for a task: flags over the preset's values for the task, over the preset's, over these defaults."""

    preset: str = flag("tiny", "sizes and models; auto: for `plan` only", choices=(*PRESETS, "auto"))
    tasks: tuple = flag(PAPER_TASKS, "tasks to run", choices=tuple(data.prepare.TASKS))
    task_file: str | None = flag(None, "a task of your own (data/task_file.py); --tasks adds others to it")
    methods: tuple = flag(DEFAULT_METHODS, "rows and points of the tables and figures", choices=tuple(METHODS))
    seeds: tuple = flag((0, 1, 2), "replicates: each finetunes every model anew, on the same debates", int, zero=True)
    weak: str = flag("", "weak model: hub id[@revision], folder or built-in; `:N` keeps its first N blocks")
    strong: str = flag("", "strong model, likewise")
    data_dir: str | None = flag(None, "folder with <task>/<split>.jsonl[.gz] in the hub's schema; default: the hub")
    out: str | None = flag(None, "folder of the results; default: out/<preset>")
    limit_train: int | None = flag(None, "training samples per task, both halves together", int)
    limit_test: int | None = flag(None, "test samples per task", int)
    max_sample_tokens: int = flag(1024, "longer ones are dropped for all", int, most=TrainConfig.max_tokens // 2)
    lr: float = flag(TrainConfig.lr, "learning rate", float)
    weak_lr: float | None = flag(None, "learning rate of the weak model; default: --lr", float)
    epochs: int = flag(TrainConfig.epochs, "passes over the training samples", int)
    batch_size: int = flag(TrainConfig.batch_size, "samples per optimizer step", int)
    aux_warmup: str = flag(TrainConfig.aux_warmup, "of the confidence loss", choices=("openai", "linear"))
    lora_rank: int = flag(TrainConfig.lora_rank, "finetune adapters of this rank (0: the whole model)", int, zero=True)
    lora_alpha: int = flag(TrainConfig.lora_alpha, "adapters count alpha / rank times", int)
    checkpointing: bool = flag(TrainConfig.checkpointing, "recompute activations to save memory", bool)
    transcript: str = flag("first", "judges read it before or after the question", choices=("first", "last"))
    max_new_tokens: int = flag(DebateConfig.max_new_tokens, "longest turn", int)
    temperature: float = flag(DebateConfig.temperature, "of the debaters", float, zero=True)
    top_p: float = flag(DebateConfig.top_p, "of the debaters", float, most=1)
    chat: bool = flag(DebateConfig.chat, "ask the debaters through their chat template", bool)
    dtype: str = flag(TrainConfig.dtype, "of all models", choices=("auto", "float32", "bfloat16"))
    compile: bool = flag(TrainConfig.compile, "torch.compile every block; pays on a GPU", bool)
    kernels: str = flag(TrainConfig.kernels, "Triton or plain PyTorch in finetuning", choices=CHOICES)
    engine: str = flag(DebateConfig.engine, "debater: a copy per process, or sharded over all", choices=tuple(ENGINES))
    weak_gpus: int = flag(
        0, "processes that share a finetuning of the weak model, or the next divisor (0: all)", int, zero=True
    )
    strong_gpus: int = flag(0, "the same for the strong model", int, zero=True)
    cache_tokens: int | None = flag(
        DebateConfig.cache_tokens, "tokens of keys and values a batch of debates may fill; default: what fits", int
    )
    max_tokens_per_forward: int = flag(TrainConfig.max_tokens_per_forward, "most tokens in a finetuning forward", int)
    keep_models: bool = flag(False, "keep every finetuned model as a Hugging Face folder", bool)
    json: bool = flag(False, "status as JSON", bool)
    tensorboard: bool = flag(False, "draw training curves in <out>/tensorboard (needs the package)", bool)
    head_only: bool = flag(False, "train heads alone, all at once, on frozen features; results in <out>/heads", bool)
    head_lr: float = flag(1e-4, "learning rate of --head-only", float)
    head_epochs: int = flag(20, "passes over the training samples of --head-only", int)
    gpus: int | None = flag(None, "plan: GPUs of the run; default: those here", int)
    gpu: str | None = flag(None, "plan: kind of GPU; default: the device here, measured", choices=tuple(GPUS))
    measure: bool = flag(False, "plan: run one longest batch of each kind here, beside its estimate", bool)
    show_config: bool = flag(False, "print what holds for each task and where it comes from, and stop", bool)

    @classmethod
    def of(cls, task: str | None = None, **given) -> "Config":
        """What holds for `task` with these flags, `auto` and what follows from others filled in. Raises as `check`."""
        preset = given.get("preset", cls.preset)
        config = cls(**(PRESETS[preset] | PER_TASK.get((preset, task), {}) | given))
        config = dataclasses.replace(
            config, out=f"out/{preset}" if config.out is None else config.out,
            weak_lr=config.lr if config.weak_lr is None else config.weak_lr,
            dtype=str(resolve_dtype(config.dtype)).removeprefix("torch."), kernels=resolve(config.kernels),
        )  # fmt: skip
        config.check()
        return config

    def settings(self, cls: type, **more):
        """A DebateConfig or TrainConfig with the flags that are its fields, and `more`."""
        return picked(cls, self, **more)

    def check(self) -> None:
        """Raises InputError on values out of range."""
        check_ranges(self)
        for name in ("tasks", "methods", "seeds"):
            if len(set(values := getattr(self, name))) < len(values):
                raise InputError(f"--{name} {' '.join(map(str, values))}: name each once")
        if not self.out or Path(self.out).exists() and not Path(self.out).is_dir():
            raise InputError(f"--out {self.out!r}: not a folder")
        if self.data_dir and not Path(self.data_dir).is_dir():
            raise InputError(f"--data-dir {self.data_dir!r}: no such folder")
        if self.head_only and (self.keep_models or self.tensorboard):
            raise InputError("--head-only: no models to keep, no curves; leave out --keep-models, --tensorboard")
        if self.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise InputError("--tensorboard: the package is not there; pip install tensorboard")
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
