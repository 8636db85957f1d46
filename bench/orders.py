"""What the judge should read: weak labels by where the transcript stands, from the debates of a run of w2s.py.

    python -m bench.orders --results out/tiny --task places_evidence --out orders --lr 3e-4 --batch-size 16
    torchrun --nproc-per-node 2 -m bench.orders ...      finetunings side by side

For each form below and each debate seed a weak model is finetuned on train_a, with the debate seed as its own, and judges
train_b. Prints accuracy over seeds with 95% intervals over seeds and items, paired with `transcript, question`. A finished
judgement in --out is not made again.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import (
    ALONE,
    InputError,
    check_out,
    flag,
    parse_dataclass,
    print0,
    read_jsonl,
    run_script,
    world,
    write_jsonl,
)
from debate import PROMPTS, judge_input, transcript_text, with_evidence
from model import Classifier, ModelSpec, resolve_dtype
from report.stats import bootstrap_means, interval
from steps import Files, joined
from train import TrainConfig, finetune, predict, prediction_rows, soft_labels

FORMS: dict[
    str, Callable[[str, Callable[[int, bool], str], str], str]
] = {  # of question, debate(turns, words), evidence
    "question alone": lambda q, debate, evidence: q,
    "transcript, question": lambda q, debate, evidence: judge_input(q, debate(3, True), "first"),
    "question, transcript": lambda q, debate, evidence: judge_input(q, debate(3, True), "last"),
    "question, transcript, question": lambda q, debate, evidence: f"{q}\n{judge_input(q, debate(3, True), 'first')}",
    "first turn, question": lambda q, debate, evidence: judge_input(q, debate(1, True), "first"),
    "sides alone, question": lambda q, debate, evidence: judge_input(q, debate(2, False), "first"),
    "passage, question": lambda q, debate, evidence: with_evidence(evidence, q),
    "question, passage": lambda q, debate, evidence: f"{q}\nPassage: {evidence}",
}


@dataclasses.dataclass(frozen=True)
class Args:
    results: str = flag("out/tiny", "folder of a run of w2s.py whose debates are finished")
    task: str = flag("places_evidence", "a task of that run with evidence", choices=tuple(PROMPTS))
    seeds: tuple = flag((0, 1, 2), "debate seeds", int)
    forms: tuple = flag(tuple(FORMS), "what is compared", choices=tuple(FORMS))
    weak: str = flag("smollm2-135m:6", "the judge: hub id, folder or built-in model; `:N` keeps its first N blocks")
    lr: float = flag(TrainConfig.lr, "learning rate", float)
    batch_size: int = flag(TrainConfig.batch_size, "samples per optimizer step", int)
    epochs: int = flag(TrainConfig.epochs, "passes over train_a", int)
    dtype: str = flag("auto", "of the judge", choices=("auto", "float32", "bfloat16"))
    out: str = flag("", "folder of the judgements")


def texts(args: Args, form: str, seed: int, part: str) -> list[str]:
    """What the judge reads of every sample of `part`."""
    files = Files(Path(args.results) / args.task, args.task)
    samples = joined(files.samples(part), files.transcripts("debate", seed, part))
    evidence = [r["evidence"] for r in joined(files.samples(part), files.evidence(part))]

    def said(row: dict) -> Callable[[int, bool], str]:
        return lambda n, words: transcript_text(
            args.task, "debate", row["sides"][:n], row["turns"][:n] if words else [""] * n
        )

    return [FORMS[form](row["text"], said(row), passage) for row, passage in zip(samples, evidence, strict=True)]


def judgement(args: Args, form: str, seed: int) -> Path:
    return Path(args.out) / f"{form.replace(', ', '-').replace(' ', '_')}-{seed}.jsonl"


def judge(args: Args, classifier: Classifier, form: str, seed: int) -> None:
    rows = {
        part: read_jsonl(Files(Path(args.results) / args.task, args.task).samples(part))
        for part in ("train_a", "train_b")
    }
    config = TrainConfig(lr=args.lr, batch_size=args.batch_size, epochs=args.epochs, seed=seed, dtype=args.dtype)
    finetune(classifier, texts(args, form, seed, "train_a"), soft_labels(rows["train_a"], 2), config)
    probs = predict(classifier, texts(args, form, seed, "train_b"), config)
    write_jsonl(judgement(args, form, seed), prediction_rows(rows["train_b"], probs))


def show(args: Args) -> None:
    gold = np.array([r["label"] for r in read_jsonl(Path(args.results) / args.task / "data/train_b.gold.jsonl")])

    def answers(form: str, seed: int) -> np.ndarray:
        return np.array([r["probs"] for r in read_jsonl(judgement(args, form, seed))]).argmax(1)

    correct = {form: np.stack([answers(form, seed) == gold for seed in args.seeds]) for form in args.forms}
    draws = bootstrap_means(correct)
    base = "transcript, question" if "transcript, question" in correct else args.forms[0]
    print0(f"| the judge reads | per seed | mean | minus {base} |\n|---|---|---|---|")
    for form, c in correct.items():
        (low, high), (below, above) = interval(draws[form]), interval(draws[form] - draws[base])
        each = " ".join(f"{100 * x:.1f}" for x in c.mean(1))
        mean, less = 100 * c.mean(), 100 * (c.mean() - correct[base].mean())
        paired = f"{less:+.1f} [{100 * below:+.1f}, {100 * above:+.1f}]"
        print0(
            f"| {form} | {each} | {mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] | {paired if form != base else ''} |"
        )


def main() -> None:
    args, ranks = parse_dataclass(Args, sys.argv[1:], "bench.orders", __doc__), world()
    check_out(args.out)
    files = Files(Path(args.results) / args.task, args.task)
    for seed in args.seeds:
        if not files.transcripts("debate", seed, "train_b").exists() or not files.evidence("train_b").exists():
            raise InputError(
                f"--results {args.results} --task {args.task}: no debates of seed {seed} with evidence there"
            )
    missing = [(f, s) for f in args.forms for s in args.seeds if not judgement(args, f, s).exists()]
    mine = missing[ranks.rank :: ranks.size]
    if mine:
        classifier = Classifier(ModelSpec.parse(args.weak), 2, resolve_dtype(args.dtype), ranks=ALONE)
        for n, (form, seed) in enumerate(mine, 1):
            judge(args, classifier, form, seed)
            print0(f"{n} of {len(mine)}: {form}, debate seed {seed}")
    ranks.barrier()
    show(args)


if __name__ == "__main__":
    run_script(main)
