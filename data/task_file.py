"""Your own data as a task: `python w2s.py run --task-file mytask.jsonl`. The file's name without its ending is the task's.

JSON lines, also gzipped. A row is one answer to be judged, `label` 1 where it is right and 0 where it is not:

    {"question": "What is 17 + 25?", "answer": "42", "label": 1}
    {"question": "What is 17 + 25?", "answer": "32", "label": 0}

or, all through the file, one `text` that is true or false. A row may have more, and what is not named here is ignored:

    id        a name or number of its own, by which results are matched; otherwise it is made from the text
    evidence  what the debaters read and nobody else; in all rows or in none
    split     train or test; in all rows or in none. Otherwise a fifth of the rows is the test split

Rows on the same question stay together, in the test split or in one half of the rest. The first line may say how the task is
put to the debaters. Each part of it may be left out:

    {"wording": {"shown": "There is a film review.", "claim": "the review is {side}", "sides": ["negative", "positive"]}}

`sides` are the names of class 0 and class 1; `debated`, what the debate is about, follows from the claim; `begin`, as in "Begin
with the words of the passage.", ends what a debater is asked in every turn, and is empty unless given. A preset's limits
(--limit-train, --limit-test) hold for the file too.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from common import InputError, numbered_jsonl, stable_hash

MIN_ROWS = 8  # two halves and a test split, each with both labels
DEFAULT = {
    "text": {"shown": "There is a statement.", "claim": "the statement is {side}", "sides": ("false", "true")},
    "question": {"shown": "There is a question, followed by an answer.", "claim": "the answer is {side}",
                 "sides": ("incorrect", "correct")},
}  # fmt: skip
WORDING = ("shown", "debated", "claim", "sides", "begin")


def read(path: Path) -> tuple[dict, list[dict]]:
    """The wording, and rows {id, group, text, label, split} and, if there is any, evidence.

    A group is a question, which stands in one split. Raises InputError naming the file, the line and what may stand there.
    """
    numbered, given = numbered_rows(path), {}
    if numbered and "wording" in numbered[0][1] and not {"text", "question", "label"} & numbered[0][1].keys():
        number, header = numbered.pop(0)
        given = header["wording"]
        for fault in wording_faults(given):
            raise InputError(f"{path}:{number}: {fault}")
    if len(numbered) < MIN_ROWS:
        raise InputError(f"{path}: {len(numbered) or 'no'} rows; at least {MIN_ROWS} are needed")
    rows, lines, first = [], {}, numbered[0][1]
    for number, row in numbered:
        for fault in row_faults(row, first):
            raise InputError(f"{path}:{number}: {fault}")
        text = row.get("text") or f"Q: {row['question']} A: {row['answer']}"
        id = str(row.get("id", hashlib.blake2b(text.encode(), digest_size=8).hexdigest()))
        for what, value in (("text", text), ("id", id)):
            if (line := lines.setdefault((what, value), number)) != number:
                raise InputError(f"{path}:{number}: the same {what} as line {line}: {value[:60]!r}")
        more = {f: row[f] for f in ("label", "split", "evidence") if f in row}
        rows.append({"id": id, "group": row.get("question", text), "text": text} | more)
    if "split" not in first:
        draw_test_split(rows)
    for split in ("train", "test"):
        zeros, ones = (sum((r["split"], r["label"]) == (split, label) for r in rows) for label in (0, 1))
        if not zeros or not ones:
            found = f"the {split} split has {zeros} rows with label 0 and {ones} with label 1"
            raise InputError(f"{path}: {found}; both labels are needed (rows on the same question stay together)")
    wording = DEFAULT["text" if "text" in first else "question"] | given
    zero, one = wording["sides"]
    debated = wording["claim"].format(side=f"{one} or {zero}")
    return {"debated": debated} | wording | {"sides": (zero, one)}, rows


def numbered_rows(path: Path) -> list[tuple[int, dict]]:
    """Rows with the numbers of their lines, without the fields that are null."""
    if not path.is_file():
        raise InputError(f"--task-file {path}: no such file ({path.absolute()})")
    return [(n, {k: v for k, v in row.items() if v is not None}) for n, row in numbered_jsonl(path)]


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def wording_faults(given: object) -> Iterator[str]:
    """What is wrong with the first line's wording."""
    if not isinstance(given, dict) or not given.keys() <= set(WORDING):
        yield f"wording {str(given)[:60]}: an object with some of {', '.join(WORDING)} is needed"
    for part in given.keys() - {"sides"}:
        if not is_text(given[part]):
            yield f"{part} {given[part]!r:.40}: a text is needed, in quotes"
    claim, sides = given.get("claim", "it is {side}"), given.get("sides", ["no", "yes"])
    if not re.fullmatch(r"[^{}]*\S \{side\}", claim):
        yield f"claim {claim[:60]!r}: it must end with {{side}}, as in 'the answer is {{side}}'"
    if not isinstance(sides, list) or not all(map(is_text, sides)) or len(sides) != 2 or sides[0] == sides[1]:
        yield f"sides {str(sides)[:60]}: two names are needed, of class 0 and of class 1"


def row_faults(row: dict, first: dict) -> Iterator[str]:
    """What is wrong with a row, in itself or beside the first one."""

    def of(field: str) -> str:
        return f"{field} {row[field]!r:.40}" if field in row else f"no {field}"

    if ("text" in row) == bool({"question", "answer"} & row.keys()):
        yield f"either text, or question and answer, is needed; the row has {', '.join(row)[:80] or 'nothing'}"
    if ("text" in row) != ("text" in first):
        yield "the first row has text, or this one; the other has question and answer: one kind in a file"
    for field in ("text",) if "text" in row else ("question", "answer"):
        if not is_text(row.get(field)):
            yield f"{of(field)}: a text is needed, in quotes"
    if type(row.get("label")) is not int or row["label"] not in (0, 1):
        yield f"{of('label')}: 1 (right) or 0 (wrong) is needed"
    for field in ("split", "evidence"):
        if (field in row) != (field in first):
            yield f"{of(field)}, unlike in the first row: it must stand in all rows or in none"
    if row.get("split", "train") not in ("train", "test"):
        yield f"{of('split')}: train or test is needed"
    if not is_text(row.get("evidence", "none")):
        yield f"{of('evidence')}: a text is needed, in quotes"
    if type(row.get("id", 0)) is not int and not is_text(row["id"]):
        yield f"{of('id')}: a name or a whole number is needed"


def draw_test_split(rows: list[dict]) -> None:
    """A fifth of the rows, and what else there is on their questions, is the test split: whatever the order of the file."""
    drawn = sorted(rows, key=lambda r: (stable_hash("test split", r["group"]), r["id"]))[: round(len(rows) / 5)]
    groups = {r["group"] for r in drawn}
    for row in rows:
        row["split"] = "test" if row["group"] in groups else "train"
