"""What the judge should read: weak labels by where the transcript stands, from the debates of a run of w2s.py.

    python -m bench.orders --results out/tiny --task places_evidence --out orders --lr 3e-4 --batch-size 16
    torchrun --nproc-per-node 2 -m bench.orders ...      finetunings side by side

For each form and debate seed a weak model is finetuned on train_a, with the debate seed as its own, and judges train_b.
Prints accuracy with 95% intervals over seeds and items, paired with `transcript, question`. A finished judgement in --out
is not made again.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import (
    InputError,
    check_out,
    flag,
    parse_dataclass,
    print0,
    read_json,
    run_script,
    world,
    write_jsonl,
    write_text,
)
from data.prepare import TASKS
from debate import judge_input, with_evidence
from model import Classifier, ModelSpec, resolve_dtype
from report.rows import scored
from report.stats import bootstrap_means, interval
from steps import READ, Files, Run, joined
from train import TrainConfig, finetune, predict, prediction_rows, soft_labels


def question_around(run: Run, files: Files, part: str) -> list[dict]:
    """The question in front of the transcript too."""
    plain, debated = READ["nothing"](run, files, part), READ["debate"](run, files, part)
    return [p | {"text": f"{p['text']}\n{d['text']}"} for p, d in zip(plain, debated, strict=True)]


def passage_last(run: Run, files: Files, part: str) -> list[dict]:
    """The passage behind the question."""
    rows = joined(READ["nothing"](run, files, part), files.evidence(part))
    return [r | {"text": judge_input(r["text"], with_evidence(r["evidence"], "").rstrip(), "last")} for r in rows]


FORMS: dict[str, tuple[Callable, dict]] = {  # how a sample is read, and with what of Run's fields
    "question alone": (READ["nothing"], {}),
    "transcript, question": (READ["debate"], {"turns": 3}),
    "question, transcript": (READ["debate"], {"turns": 3, "order": "last"}),
    "question, transcript, question": (question_around, {"turns": 3}),
    "first turn, question": (READ["debate"], {"turns": 1}),
    "sides alone, question": (READ["sides"], {}),
    "passage, question": (READ["evidence"], {}),
    "question, passage": (passage_last, {}),
}


@dataclasses.dataclass(frozen=True)
class Args:
    results: str = flag("out/tiny", "folder of a run of w2s.py whose debates are finished")
    task: str = flag("places_evidence", "a task of that run with evidence", choices=tuple(TASKS))
    seeds: tuple = flag((0, 1, 2), "debate seeds", int, zero=True)
    forms: tuple = flag(tuple(FORMS), "what is compared", choices=tuple(FORMS))
    weak: str = flag("smollm2-135m:6", "the judge: hub id, folder or built-in model; `:N` keeps its first N blocks")
    lr: float = flag(TrainConfig.lr, "learning rate", float)
    batch_size: int = flag(TrainConfig.batch_size, "samples per optimizer step", int)
    epochs: int = flag(TrainConfig.epochs, "passes over train_a", int)
    dtype: str = flag("auto", "of the judge", choices=("auto", "float32", "bfloat16"))
    out: str = flag("", "folder of the judgements")


def judgement(args: Args, form: str, seed: int) -> Path:
    return Path(args.out) / f"{form.replace(', ', '-').replace(' ', '_')}-{seed}.jsonl"


def judge(args: Args, classifier: Classifier, files: Files, form: str, seed: int) -> None:
    config = TrainConfig(lr=args.lr, batch_size=args.batch_size, epochs=args.epochs, seed=seed, dtype=args.dtype)
    read, more = FORMS[form]
    run = Run(form, classifier.spec, config, "debate", seed, **more)
    learned, judged = (read(run, files, part) for part in ("train_a", "train_b"))
    finetune(classifier, [r["text"] for r in learned], soft_labels(learned, 2), config)
    probs = predict(classifier, [r["text"] for r in judged], config)
    write_jsonl(judgement(args, form, seed), prediction_rows(judged, probs))


def show(args: Args, files: Files) -> None:
    def correct_of(form: str, seed: int) -> np.ndarray:
        probs, gold = scored(judgement(args, form, seed), files.folder / "data/train_b.gold.jsonl")
        return probs.argmax(1) == gold

    correct = {form: np.stack([correct_of(form, seed) for seed in args.seeds]) for form in args.forms}
    draws = bootstrap_means(correct)
    base = "transcript, question" if "transcript, question" in correct else args.forms[0]
    print0(f"| the judge reads | per seed | mean | minus {base} |\n|---|---|---|---|")
    for form, c in correct.items():
        (low, high), (below, above) = interval(draws[form]), interval(draws[form] - draws[base])
        each = " ".join(f"{100 * x:.1f}" for x in c.mean(1))
        mean, less = 100 * c.mean(), 100 * (c.mean() - correct[base].mean())
        paired = f"{less:+.1f} [{100 * below:+.1f}, {100 * above:+.1f}]" if form != base else ""
        print0(f"| {form} | {each} | {mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] | {paired} |")


def main() -> None:
    args, ranks = parse_dataclass(Args, sys.argv[1:], "bench.orders", __doc__), world()
    check_out(args.out)
    files = Files(Path(args.results) / args.task, args.task)
    for seed in args.seeds:
        if not files.transcripts("debate", seed, "train_b").exists() or not files.evidence("train_b").exists():
            raise InputError(f"--results {args.results} --task {args.task}: no debates of seed {seed} with evidence")
    settings = {k: v for k, v in vars(args).items() if k not in ("seeds", "forms", "out")}
    file = Path(args.out, "settings.json")
    if odd := [f"{k} {v}" for k, v in (read_json(file) or settings).items() if v != settings.get(k)]:
        raise InputError(f"--out {args.out}: judgements with {', '.join(odd)} are there; name another folder")
    if ranks.rank == 0:
        write_text(file, json.dumps(settings, indent=1) + "\n")
    missing = [(f, s) for f in args.forms for s in args.seeds if not judgement(args, f, s).exists()]
    if mine := missing[ranks.rank :: ranks.size]:
        classifier = Classifier(ModelSpec.parse(args.weak), 2, resolve_dtype(args.dtype))
        for n, (form, seed) in enumerate(mine, 1):
            judge(args, classifier, files, form, seed)
            print0(f"{n} of {len(mine)}: {form}, debate seed {seed}")
    ranks.barrier()
    if ranks.rank == 0:
        show(args, files)


if __name__ == "__main__":
    run_script(main)
