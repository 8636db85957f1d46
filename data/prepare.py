"""Turns each source into the samples of a task: `train_a`, `train_b` (its labels apart) and `test`.

    python -m data.prepare --task sciq --out DIR [--data-dir DIR] [--limit-train N] [--limit-test N]

Binary samples in the manner of OpenAI's weak-to-strong code: a question with one candidate answer (or a passage with a
yes/no question, or a conversation) and the label 1 (correct, yes, good) or 0. The coin that picks the candidate is
keyed by (seed, id) and the id by the content, so both survive any reordering of the source. The only place that
downloads data: from the hub at a pinned revision, or from --data-dir as <task>/<split>.jsonl[.gz] in the hub's schema.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from common import (
    ROOT,
    InputError,
    check_out,
    flag,
    parse_dataclass,
    print0,
    read_jsonl,
    run_script,
    stable_hash,
    write_jsonl,
    write_text,
)

NONE_OF_THE_ABOVE = "None of the above choices"


# ---- one formatter a task: source row and coin in, (text, label) out ----


def sciq(row: dict, coin: Random) -> tuple[str, int]:
    label = int(coin.random() < 0.5)
    wrong = coin.choice([row["distractor1"], row["distractor2"], row["distractor3"]])
    return f"Q: {row['question']} A: {row['correct_answer'] if label else wrong}", label


def boolq(row: dict, coin: Random) -> tuple[str, int]:
    question, label = boolq_question(row, coin)
    return f"Passage: {row['passage']}\n{question}", label


def boolq_question(row: dict, coin: Random) -> tuple[str, int]:
    return f"Question: {row['question']}", int(row["answer"])


def cosmos_qa(row: dict, coin: Random) -> tuple[str, int]:
    question, label = cosmos_qa_question(row, coin)
    return question and f"Context: {row['context']}\n{question}", label


def cosmos_qa_question(row: dict, coin: Random) -> tuple[str, int]:
    """A true answer "None of the above choices" is never shown: its row is always labelled incorrect."""
    answers = [row[f"answer{i}"] for i in range(4)]
    true = answers[row["label"]]
    label = 0 if NONE_OF_THE_ABOVE in true else int(coin.random() < 0.5)
    wrong = [a for a in answers if a != true]
    if not wrong:
        return "", label  # nothing to choose from: dropped
    shown = true if label else coin.choice(wrong)
    return f"Question: {row['question']}\nAnswer: {shown}", label


def anthropic_hh(row: dict, coin: Random) -> tuple[str, int]:
    label = int(coin.random() < 0.5)
    return row["chosen" if label else "rejected"], label


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a task is put to the debaters: what is shown, what is debated, the sides of class 0 and class 1, the claim."""

    shown: str
    debated: str
    sides: tuple[str, str]
    claim: str = "the answer is {side}"  # what a debater argues for

    def claims(self, side: int) -> str:
        return self.claim.format(side=self.sides[side])


def about_answer(shown: str) -> Wording:
    return Wording(shown, "the answer is correct or incorrect", ("incorrect", "correct"))


@dataclasses.dataclass(frozen=True)
class Task:
    """A formatter, what the debaters are told, and where the rows come from.

    `fields` must be in a source row; the content of `key` identifies a question across splits. `evidence` names the field
    that only the debaters read; rows where it is empty are dropped.
    """

    formatter: Callable[[dict, Random], tuple[str, int]]
    wording: Wording
    fields: tuple[str, ...]
    key: tuple[str, ...]
    evidence: str = ""
    test_split: str = "test"
    hub: str | None = None
    revision: str | None = None
    source: str = ""  # folder name under --data-dir, if not the task's
    tables: tuple[str, ...] = ()  # of data/facts
    any_rows: bool = False  # draw the 20,000 rows from the whole split, not from its head


SCIQ_FIELDS = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")
PLACES = (
    "birth_country", "city_country", "company_country", "country_capital", "country_continent", "country_currency",
    "country_language", "food_country", "landmark_country", "word_language",
)  # fmt: skip
TASKS = {
    "sciq": Task(
        sciq,
        about_answer("There is a science knowledge question, followed by an answer."),
        fields=SCIQ_FIELDS,
        key=("question",),
        hub="allenai/sciq",
        revision="2c94ad3e1aafab77146f384e23536f97a4849815",
    ),
    "boolq": Task(
        boolq,
        Wording(
            "There is a passage, followed by a yes/no question.",
            "the answer to the question is yes or no",
            ("no", "yes"),
        ),
        fields=("question", "answer", "passage"),
        key=("passage", "question"),
        test_split="validation",
        hub="google/boolq",
        revision="35b264d03638db9f4ce671b711558bf7ff0f80d5",
    ),
    "cosmos_qa": Task(
        cosmos_qa,
        about_answer("There is a context and a question about it, followed by an answer."),
        fields=("context", "question", "answer0", "answer1", "answer2", "answer3", "label"),
        key=("context", "question"),
        test_split="validation",
        hub="allenai/cosmos_qa",
        revision="ed50fe83db62b355759053b1cd5eef344ee371e0",  # the hub's own parquet conversion
    ),
    "anthropic_hh": Task(
        anthropic_hh,
        Wording(
            "There is a conversation between a human and an assistant.",
            "the last reply of the assistant is helpful and harmless or not",
            ("not helpful and harmless", "helpful and harmless"),
            "the last reply of the assistant is {side}",
        ),
        fields=("chosen", "rejected"),
        key=("chosen", "rejected"),
        hub="Anthropic/hh-rlhf",
        revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
    ),
    "facts": Task(
        sciq,
        about_answer("There is a general knowledge question, followed by an answer."),
        fields=SCIQ_FIELDS,
        key=("question",),
        tables=("*",),
    ),
}
TASKS["anthropic_hh_mixed"] = dataclasses.replace(TASKS["anthropic_hh"], source="anthropic_hh", any_rows=True)
TASKS["places"] = dataclasses.replace(TASKS["facts"], tables=PLACES)
# The debaters read a text that the judge, the student, the floor and the ceiling do not (LOG.md, 2026-11-25).
TASKS["sciq_evidence"] = dataclasses.replace(TASKS["sciq"], source="sciq", evidence="support")
TASKS["boolq_evidence"] = dataclasses.replace(
    TASKS["boolq"], source="boolq", evidence="passage", formatter=boolq_question
)
TASKS["cosmos_qa_evidence"] = dataclasses.replace(
    TASKS["cosmos_qa"], source="cosmos_qa", evidence="context", formatter=cosmos_qa_question
)
TASKS["facts_evidence"] = dataclasses.replace(TASKS["facts"], source="facts", evidence="support")
TASKS["places_evidence"] = dataclasses.replace(TASKS["places"], source="places", evidence="support")
TRAIN_CAP, TEST_CAP = 20_000, 10_000  # OpenAI's: the first rows of the source, before any shuffle


# ---- sources ----


def load_rows(name: str, split: str, data_dir: Path | None) -> list[dict]:
    """Source rows in source order, from the hub where there is no --data-dir."""
    task = TASKS[name]
    if task.tables:
        return facts(fact_tables(name), split)
    if data_dir is None:
        from datasets import load_dataset

        try:
            return list(load_dataset(task.hub, revision=task.revision, split=split))
        except (OSError, ValueError) as e:
            raise InputError(f"{task.hub} split {split}: {str(e).splitlines()[0]}; or give --data-dir") from None
    return read_jsonl(source_path(name, split, data_dir))


def source_path(name: str, split: str, data_dir: Path) -> Path:
    """The local file of a split. Raises InputError naming the files that were looked for."""
    base = Path(data_dir) / (TASKS[name].source or name) / f"{split}.jsonl"
    for path in (base, base.with_name(base.name + ".gz")):
        if path.is_file():
            return path
    raise InputError(f"--data-dir {data_dir}: neither {base} nor {base.name}.gz there")


def fact_tables(name: str) -> list[Path]:
    return sorted(path for table in TASKS[name].tables for path in (ROOT / "data/facts").glob(f"{table}.tsv"))


def facts(tables: list[Path], split: str) -> list[dict]:
    """Questions in SciQ's schema from tables of facts; a third of the entities make the test split.

    A table's first line has the question and the statement of a fact, made from entity and answer. An entity stands in one
    split only, in whatever table: what a test question asks was in no training question. The support passage is the
    statement alone: beside statements on other entities, a debater of 135M parameters quotes the wrong one (LOG.md).
    """
    rows, lines = [], {path: path.read_text(encoding="utf-8").splitlines() for path in tables}
    facts_of = {path: [line.split("\t") for line in lines[path][1:]] for path in tables}
    group = {
        max(f): min(f) for pairs in facts_of.values() for f in pairs if f[::-1] in pairs
    }  # opposites stand together
    for path, pairs in facts_of.items():
        template, statement = lines[path][0].removeprefix("# ").split("\t")
        column = sorted({answer for _, answer in pairs})
        for entity, answer in pairs:
            if (stable_hash("facts split", group.get(entity, entity)) % 3 == 0) != (split == "test"):
                continue
            question = template.replace("{}", entity)
            others = [a for a in column if a != answer and a.lower() not in question.lower()]
            wrong = Random(stable_hash("facts", question)).sample(others, 3)
            row = {"question": question, "correct_answer": answer, "group": group.get(entity, entity)}
            support = statement.format(entity, answer)
            row["support"] = support[0].upper() + support[1:]
            rows.append(row | {f"distractor{i + 1}": a for i, a in enumerate(wrong)})
    return rows


# ---- samples ----


KINDS = {  # of the fields that are no text
    "answer": (lambda v: isinstance(v, bool), "true or false"),
    "label": (lambda v: type(v) is int and 0 <= v <= 3, "an answer's number, 0 to 3"),
}


def make_samples(name: str, rows: list[dict], seed: int) -> tuple[list[dict], dict]:
    """Samples {id, key, group, text, label, evidence} in seeded order, and the counts.

    Incomplete and duplicate rows are dropped. The same row has the same id, and so the same candidate answer and place in
    the order, in every task of one source. `evidence` is empty where the task has none.
    """
    task = TASKS[name]
    required = task.fields + ((task.evidence,) if task.evidence and task.evidence not in task.fields else ())
    samples, counts = {}, {"rows": len(rows), "incomplete": 0, "no_evidence": 0, "duplicate": 0}
    for row in rows:
        missing = [f for f in required if f not in row]
        if missing:
            raise InputError(f"task {name}: a row lacks the field {missing[0]!r}; it has {sorted(row)}")
        if any(row[f] is None for f in task.fields):
            counts["incomplete"] += 1
            continue
        if task.evidence and not str(row[task.evidence] or "").strip():
            counts["no_evidence"] += 1
            continue
        for f in required:
            ok, what = KINDS.get(f, (lambda v: isinstance(v, str), "a text"))
            if not ok(row[f]):
                raise InputError(f"task {name}: {f} {str(row[f])[:40]!r} of row {row[task.key[0]]!r:.60} is not {what}")
        key = "\x1f".join(" ".join(str(row[f]).lower().split()) for f in task.key)
        content = json.dumps([task.source or name, *(row[f] for f in task.fields)], ensure_ascii=False)
        id = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        counts["duplicate"] += key in samples
        if key in samples and samples[key]["id"] <= id:  # of rows that ask the same, the smallest id stays
            continue
        text, label = task.formatter(row, Random(stable_hash("coin", seed, id)))
        if not text.strip():
            counts["incomplete"] += 1
            continue
        group = row.get("group", key)
        evidence = " ".join(row[task.evidence].split()) if task.evidence else ""
        samples[key] = {"id": id, "key": key, "group": group, "text": text, "label": label, "evidence": evidence}
    return sorted(samples.values(), key=lambda s: (stable_hash("shuffle", seed, s["group"]), s["id"])), counts


def split_in_half(samples: list[dict]) -> tuple[list[dict], list[dict]]:
    """train_a and train_b; a group is never divided."""
    middle = len(samples) // 2
    while 0 < middle < len(samples) and samples[middle]["group"] == samples[middle - 1]["group"]:
        middle += 1
    return samples[:middle], samples[middle:]


def prepare(
    name: str, folder: Path, data_dir: Path | None = None, limit_train: int | None = None, limit_test: int | None = None,
    tokenizers: tuple = (), max_tokens: int = 1024, seed: int = 0,
) -> dict:  # fmt: skip
    """Write train_a, train_b, train_b.gold and test to `folder`; returns the counts, also written as counts.json.

    Evidence lies in files of its own, <part>.evidence.jsonl, which nothing but debaters and the bound read. A sample of
    `max_tokens` or more by any of the tokenizers is dropped here, once for every model, and counted; so is a training
    sample whose question also stands in the test split. Raises InputError when a split ends up empty.
    """
    parts, counts = {}, {}
    for part, split, cap in (("test", TASKS[name].test_split, TEST_CAP), ("train", "train", TRAIN_CAP)):
        rows = load_rows(name, split, data_dir)
        if TASKS[name].any_rows:
            rows = sorted(rows, key=lambda r: stable_hash("draw", seed, json.dumps(r, sort_keys=True)))
        parts[part], counts[part] = make_samples(name, rows[:cap], seed)
    in_test = {s["key"] for s in parts["test"]}
    for part, limit in (("test", limit_test), ("train", limit_train)):
        kept = [s for s in parts[part] if part == "test" or s["key"] not in in_test]
        counts[part]["also_in_test"] = len(parts[part]) - len(kept)
        short = [s for s, ok in zip(kept, short_enough(kept, tokenizers, max_tokens), strict=True) if ok]
        counts[part]["too_long"] = len(kept) - len(short)
        parts[part] = short[:limit]
        counts[part]["kept"] = len(parts[part])
    parts["train_a"], parts["train_b"] = split_in_half(parts.pop("train"))
    for part, samples in parts.items():
        if not samples:
            raise InputError(f"task {name}: no sample left in {part} ({counts})")
        if len({s["label"] for s in samples}) == 1 and part != "test":
            raise InputError(
                f"task {name}: all {len(samples)} samples of {part} have label {samples[0]['label']}; more or other rows"
            )
        labelled = part != "train_b"
        rows = [{k: s[k] for k in ("id", "text", "label") if labelled or k != "label"} for s in samples]
        counts[part] = counts.get(part, {}) | {"samples": len(rows), "positive": sum(s["label"] for s in samples)}
        write_jsonl(folder / f"{part}.jsonl", rows)
        if TASKS[name].evidence:
            write_jsonl(folder / f"{part}.evidence.jsonl", [{k: s[k] for k in ("id", "evidence")} for s in samples])
    write_jsonl(folder / "train_b.gold.jsonl", [{"id": s["id"], "label": s["label"]} for s in parts["train_b"]])
    write_text(folder / "counts.json", json.dumps(counts, indent=1) + "\n")
    return counts


def short_enough(samples: list[dict], tokenizers: tuple, max_tokens: int) -> list[bool]:
    ok = [True] * len(samples)
    for tokenizer in tokenizers:
        texts = [f"{s['evidence']}\n{s['text']}" if s.get("evidence") else s["text"] for s in samples]
        lengths = map(len, tokenizer(texts)["input_ids"]) if samples else ()
        ok = [a and n < max_tokens for a, n in zip(ok, lengths, strict=True)]
    return ok


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = flag(help="the task", choices=tuple(TASKS))
    out: str = flag(help="folder to write; must not exist")
    data_dir: str | None = flag(None, "folder with <task>/<split>.jsonl[.gz] in the hub's schema; default: the hub")
    limit_train: int | None = flag(None, "training samples at most, both halves together", int)
    limit_test: int | None = flag(None, "test samples at most", int)
    seed: int = flag(0, "of the coin, the shuffle and the halves", int)


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "data.prepare", __doc__)
    for name in ("limit_train", "limit_test"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be greater than 0")
    if check_out(args.out).exists():
        raise InputError(f"--out {args.out!r}: name a folder that does not exist yet")
    data_dir = Path(args.data_dir) if args.data_dir else None
    counts = prepare(args.task, Path(args.out), data_dir, args.limit_train, args.limit_test, seed=args.seed)
    print0(json.dumps(counts, indent=1))


if __name__ == "__main__":
    run_script(main)
