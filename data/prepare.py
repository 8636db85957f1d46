"""Turns each source into the samples of a task: `train_a`, `train_b` (its labels apart) and `test`.

    python -m data.prepare --task sciq --out DIR [--data-dir DIR] [--limit-train N] [--limit-test N]

Binary samples in the manner of OpenAI's weak-to-strong code: a question with one candidate answer (or a passage with a
yes/no question, or a conversation) and the label 1 (correct, yes, good) or 0. The coin that picks the candidate is
keyed by (seed, id) and the id by the content, so both survive any reordering of the source. Rows come from the hub at a
pinned revision, or from --data-dir as <task>/<split>.jsonl[.gz] in the hub's schema.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import common
from common import InputError, flag, read_jsonl, stable_hash, write_jsonl, write_text
from data import task_file

# ---- one formatter per task: source row and coin in, (text, label) out ----


def sciq(row: dict, coin: Random) -> tuple[str, int]:
    label = int(coin.random() < 0.5)
    wrong = coin.choice([row["distractor1"], row["distractor2"], row["distractor3"]])
    return f"Q: {row['question']} A: {row['correct_answer'] if label else wrong}", label


def boolq(row: dict, coin: Random) -> tuple[str, int]:
    return f"Passage: {row['passage']}\nQuestion: {row['question']}", int(row["answer"])


def boolq_question(row: dict, coin: Random) -> tuple[str, int]:
    return f"Question: {row['question']}", int(row["answer"])


def cosmos_qa(row: dict, coin: Random) -> tuple[str, int]:
    question, label = cosmos_qa_question(row, coin)
    return question and f"Context: {row['context']}\n{question}", label


def cosmos_qa_question(row: dict, coin: Random) -> tuple[str, int]:
    """A true answer "None of the above choices" is never shown: its row is always labelled incorrect."""
    answers = [row[f"answer{i}"] for i in range(4)]
    true = answers[row["label"]]
    label = 0 if "None of the above choices" in true else int(coin.random() < 0.5)
    wrong = [a for a in answers if a != true]
    if not wrong:
        return "", label  # nothing to choose from: dropped
    return f"Question: {row['question']}\nAnswer: {true if label else coin.choice(wrong)}", label


def anthropic_hh(row: dict, coin: Random) -> tuple[str, int]:
    label = int(coin.random() < 0.5)
    return row["chosen" if label else "rejected"], label


def as_given(row: dict, coin: Random) -> tuple[str, int]:
    """Of a task file: nothing is drawn."""
    return row["text"], row["label"]


# ---- what the debaters are given of a split's passages ----


def as_it_is(passages: list[str]) -> list[str]:
    return passages


def half(passages: list[str]) -> list[str]:
    """The first sentence, the third, and so on."""
    return [" ".join(re.split(r"(?<=[.!?]) ", passage)[::2]) for passage in passages]


def of_next_sample(passages: list[str]) -> list[str]:
    return passages[1:] + passages[:1]


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a task is put to the debaters: what is shown, what is debated, the sides of class 0 and class 1, the claim, and
    how every turn is to begin."""

    shown: str
    debated: str = "the answer is correct or incorrect"
    sides: tuple[str, str] = ("incorrect", "correct")
    claim: str = "the answer is {side}"  # what a debater argues for
    begin: str = ""  # the last sentence of every instruction

    def claims(self, side: int) -> str:
        return self.claim.format(side=self.sides[side])

    def parts(self) -> dict:
        """Its parts that are not empty: what results are compared by."""
        return {part: value for part, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True)
class Task:
    """A formatter, what the debaters are told, and where the rows come from.

    `fields` must be in a source row, each a text or one of its `values`; the content of `key` identifies a question across
    splits. `evidence` names the field that only the debaters read, as `given` to them; rows where it is empty are dropped.
    """

    formatter: Callable[[dict, Random], tuple[str, int]]
    wording: Wording
    fields: tuple[str, ...]
    key: tuple[str, ...]
    values: dict[str, tuple] = dataclasses.field(default_factory=dict)
    evidence: str = ""
    given: Callable[[list[str]], list[str]] = as_it_is
    test_split: str = "test"
    hub: str | None = None
    revision: str | None = None
    source: str = ""  # folder name under --data-dir, if not the task's
    tables: tuple[str, ...] = ()  # of data/facts
    any_rows: bool = False  # draw the 20,000 rows from the whole split, not from its head
    file: Path | None = None  # a task file, which holds both splits (data/task_file.py)


SCIQ_FIELDS = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")
PLACES = (
    "birth_country", "city_country", "company_country", "country_capital", "country_continent", "country_currency",
    "country_language", "food_country", "landmark_country", "word_language",
)  # fmt: skip
TASKS = {
    "sciq": Task(
        sciq, Wording("There is a science knowledge question, followed by an answer."), SCIQ_FIELDS, ("question",),
        hub="allenai/sciq", revision="2c94ad3e1aafab77146f384e23536f97a4849815"),
    "boolq": Task(
        boolq, Wording("There is a passage, followed by a yes/no question.", "the answer to the question is yes or no", ("no", "yes")),
        ("question", "answer", "passage"), ("passage", "question"), {"answer": (False, True)}, test_split="validation",
        hub="google/boolq", revision="35b264d03638db9f4ce671b711558bf7ff0f80d5"),
    "cosmos_qa": Task(
        cosmos_qa, Wording("There is a context and a question about it, followed by an answer."),
        ("context", "question", "answer0", "answer1", "answer2", "answer3", "label"), ("context", "question"), {"label": (0, 1, 2, 3)}, test_split="validation",
        hub="allenai/cosmos_qa", revision="ed50fe83db62b355759053b1cd5eef344ee371e0"),  # the hub's own parquet conversion
    "anthropic_hh": Task(
        anthropic_hh,
        Wording("There is a conversation between a human and an assistant.", "the last reply of the assistant is helpful and harmless or not",
                ("not helpful and harmless", "helpful and harmless"), "the last reply of the assistant is {side}"),
        ("chosen", "rejected"), ("chosen", "rejected"),
        hub="Anthropic/hh-rlhf", revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"),
    "facts": Task(
        sciq, Wording("There is a general knowledge question, followed by an answer."), SCIQ_FIELDS, ("question",), tables=("*",)),
}  # fmt: skip
TASKS["anthropic_hh_mixed"] = dataclasses.replace(TASKS["anthropic_hh"], source="anthropic_hh", any_rows=True)
TASKS["places"] = dataclasses.replace(TASKS["facts"], tables=PLACES)
# The debaters read a text that the judge, the student, the floor and the ceiling do not (LOG.md, 2026-11-25).
EVIDENCE = {"sciq": "support", "boolq": "passage", "cosmos_qa": "context", "facts": "support", "places": "support"}
TASKS |= {f"{t}_evidence": dataclasses.replace(TASKS[t], source=t, evidence=field) for t, field in EVIDENCE.items()}
# A debater of 135M parameters quotes a passage of one sentence more often when told to (LOG.md, 2026-11-29).
QUOTING = dataclasses.replace(TASKS["facts"].wording, begin="Begin with the words of the passage.")
TASKS |= {t: dataclasses.replace(TASKS[t], wording=QUOTING) for t in ("facts_evidence", "places_evidence")}
TASKS["boolq_evidence"] = dataclasses.replace(TASKS["boolq_evidence"], formatter=boolq_question)
TASKS["cosmos_qa_evidence"] = dataclasses.replace(TASKS["cosmos_qa_evidence"], formatter=cosmos_qa_question)
TASKS["sciq_half_evidence"] = dataclasses.replace(TASKS["sciq_evidence"], given=half)
TASKS["sciq_other_evidence"] = dataclasses.replace(TASKS["sciq_evidence"], given=of_next_sample)
TRAIN_CAP, TEST_CAP = 20_000, 10_000  # OpenAI's: the first rows of the source, before any shuffle


def task_of_file(path: Path) -> tuple[str, Task]:
    """Name and entry of a task file. Raises InputError where the file is none, or its name cannot be a task's."""
    name = Path(path.name.removesuffix(".gz")).stem
    taken = ["heads", "tables", "figures", "tensorboard"]  # what else lies in a folder of results
    taken += [other for other, task in TASKS.items() if not task.file]
    if name in taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        allowed = f"up to 64 letters, digits, - and _, and none of {', '.join(taken)}"
        raise InputError(f"--task-file {path}: rename the file; its name is the task's, of {allowed}")
    wording, rows = task_file.read(path)
    evidence = "evidence" if "evidence" in rows[0] else ""
    return name, Task(as_given, Wording(**wording), ("text",), ("text",), evidence=evidence, any_rows=True, file=path)


# ---- sources ----


def load_rows(name: str, split: str, data_dir: Path | None) -> list[dict]:
    """Source rows in source order, from the hub where there is no --data-dir."""
    task = TASKS[name]
    if task.tables:
        return facts(fact_tables(name), split)
    if task.file:
        return [row for row in task_file.read(task.file)[1] if row["split"] == split]
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
    found = [path for path in (base, base.with_name(base.name + ".gz")) if path.is_file()]
    if not found:
        raise InputError(f"--data-dir {data_dir}: neither {base} nor {base.name}.gz there")
    return found[0]


def fact_tables(name: str) -> list[Path]:
    folder = Path(__file__).parent / "facts"
    return sorted(path for table in TASKS[name].tables for path in folder.glob(f"{table}.tsv"))


def facts(tables: list[Path], split: str) -> list[dict]:
    """Questions in SciQ's schema from tables of facts; a third of the entities make the test split.

    A table's first line has the question and the statement of a fact, made from entity and answer. An entity stands in one
    split only, in whatever table: what a test question asks was in no training question. The support passage is the
    statement alone: beside statements on other entities, a debater of 135M parameters quotes the wrong one (LOG.md).
    """
    rows, texts = [], [path.read_text(encoding="utf-8").removeprefix("# ") for path in tables]
    contents = [[line.split("\t") for line in text.splitlines()] for text in texts]
    group = {max(f): min(f) for _, *pairs in contents for f in pairs if f[::-1] in pairs}  # opposites: one group
    for (template, statement), *pairs in contents:
        column = sorted({answer for _, answer in pairs})
        for entity, answer in pairs:
            together = group.get(entity, entity)
            if (stable_hash("facts split", together) % 3 == 0) != (split == "test"):
                continue
            question = template.replace("{}", entity)
            others = [a for a in column if a != answer and a.lower() not in question.lower()]
            wrong = Random(stable_hash("facts", question)).sample(others, 3)
            support = statement.format(entity, answer)
            row = {"question": question, "correct_answer": answer, "group": together}
            row |= {f"distractor{i}": a for i, a in enumerate(wrong, 1)}
            rows.append(row | {"support": support[0].upper() + support[1:]})
    return rows


# ---- samples ----


def make_samples(name: str, rows: list[dict], seed: int) -> tuple[list[dict], dict]:
    """Samples {id, key, group, text, label, evidence} in seeded order, and the counts.

    Incomplete and duplicate rows are dropped. In every task of one source the same row has the same id, and so the same
    candidate answer and place in the order. `evidence` is empty where the task has none.
    """
    task = TASKS[name]
    required = (*task.fields, task.evidence) if task.evidence else task.fields
    samples, counts = {}, {"rows": len(rows), "incomplete": 0, "no_evidence": 0, "duplicate": 0}
    for row in rows:
        if missing := [f for f in required if f not in row]:
            raise InputError(f"task {name}: a row lacks the field {missing[0]!r}; it has {sorted(row)}")
        incomplete = any(row[f] is None for f in task.fields)
        if incomplete or task.evidence and not str(row[task.evidence] or "").strip():
            counts["incomplete" if incomplete else "no_evidence"] += 1
            continue
        for f in required:
            values = [json.dumps(v) for v in task.values.get(f, ())]  # as JSON, 1 is neither true nor "1"
            if json.dumps(row[f]) not in values if values else not isinstance(row[f], str):
                what = f"one of {', '.join(values)}" if values else "a text"
                raise InputError(f"task {name}: {f} {str(row[f])[:40]!r} of row {row[task.key[0]]!r:.60} is not {what}")
        key = "\x1f".join(" ".join(str(row[f]).lower().split()) for f in task.key)
        content = json.dumps([task.source or name, *(row[f] for f in task.fields)], ensure_ascii=False)
        id = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        if task.file:
            key = id = row["id"]  # no two rows of a task file say the same, to the letter
        counts["duplicate"] += key in samples
        if key in samples and samples[key]["id"] <= id:  # of rows that ask the same, the smallest id stays
            continue
        text, label = task.formatter(row, Random(stable_hash("coin", seed, id)))
        if not text.strip():
            counts["incomplete"] += 1
            continue
        evidence = " ".join(row[task.evidence].split()) if task.evidence else ""
        sample = {"id": id, "key": key, "group": row.get("group", key), "text": text, "label": label}
        samples[key] = sample | {"evidence": evidence}
    shuffled = sorted(samples.values(), key=lambda s: (stable_hash("shuffle", seed, s["group"]), s["id"]))
    given = task.given([s["evidence"] for s in shuffled])
    return [s | {"evidence": passage} for s, passage in zip(shuffled, given, strict=True)], counts


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
    `max_tokens` or more by any of the tokenizers is dropped here, once for every model; so is a training sample whose
    question also stands in the test split. The first rows of a split are taken (TRAIN_CAP, TEST_CAP) before anything is
    dropped: a task with evidence never reads further rows instead. Raises InputError when a split ends up empty.
    """
    task, parts, counts, in_test = TASKS[name], {}, {}, set()
    splits = ("test", task.test_split, TEST_CAP, limit_test), ("train", "train", TRAIN_CAP, limit_train)
    for part, split, cap, limit in splits:
        rows = load_rows(name, split, data_dir)
        if task.any_rows:
            rows.sort(key=lambda r: stable_hash("draw", seed, json.dumps(r, sort_keys=True)))
        samples, counts[part] = make_samples(name, rows[:cap], seed)
        new = [s for s in samples if s["key"] not in in_test]
        short = [s for s, ok in zip(new, short_enough(new, tokenizers, max_tokens), strict=True) if ok]
        parts[part], in_test = short[:limit], {s["key"] for s in samples}
        dropped = {"also_in_test": len(samples) - len(new), "too_long": len(new) - len(short)}
        counts[part] |= dropped | {"kept": len(parts[part])}
    parts["train_a"], parts["train_b"] = split_in_half(parts.pop("train"))
    for part, samples in parts.items():
        if not samples:
            raise InputError(f"task {name}: no sample left in {part} ({counts})")
        n, positive = len(samples), sum(s["label"] for s in samples)
        if positive in (0, n) and part != "test":
            raise InputError(f"task {name}: all {n} samples of {part} have label {positive > 0:d}; more or other rows")
        counts[part] = counts.get(part, {}) | {"samples": n, "positive": positive}
        fields = {part: ("id", "text") if part == "train_b" else ("id", "text", "label")}
        fields |= {"train_b.gold": ("id", "label")} if part == "train_b" else {}
        fields |= {f"{part}.evidence": ("id", "evidence")} if task.evidence else {}
        for file, keys in fields.items():
            write_jsonl(folder / f"{file}.jsonl", [{k: s[k] for k in keys} for s in samples])
    write_text(folder / "counts.json", json.dumps(counts, indent=1) + "\n")
    return counts


def short_enough(samples: list[dict], tokenizers: tuple, max_tokens: int) -> list[bool]:
    texts = [f"{s['evidence']}\n{s['text']}" if s.get("evidence") else s["text"] for s in samples]
    lengths = [list(map(len, t(texts)["input_ids"])) for t in tokenizers if texts]
    return [all(n < max_tokens for n in of_sample) for of_sample in zip(*lengths, strict=True)] or [True] * len(texts)


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = flag(help="the task", choices=tuple(TASKS))
    out: str = flag(help="folder to write; must not exist")
    data_dir: str | None = flag(None, "folder with <task>/<split>.jsonl[.gz] in the hub's schema; default: the hub")
    limit_train: int | None = flag(None, "training samples at most, both halves together", int)
    limit_test: int | None = flag(None, "test samples at most", int)
    seed: int = flag(0, "of the coin, the shuffle and the halves", int, zero=True)


def main() -> None:
    args = common.parse_dataclass(Args, sys.argv[1:], "data.prepare", __doc__)
    if common.check_out(args.out).exists():
        raise InputError(f"--out {args.out!r}: name a folder that does not exist yet")
    data_dir = args.data_dir and Path(args.data_dir)
    counts = prepare(args.task, Path(args.out), data_dir, args.limit_train, args.limit_test, seed=args.seed)
    common.print0(json.dumps(counts, indent=1))


if __name__ == "__main__":
    common.run_script(main)
