"""data/: rows to samples, splits, counts, fact tables, and what is said of bad files."""

import gzip
import json
from collections import Counter
from random import Random

import pytest
from conftest import ROOT

from common import InputError, read_jsonl, write_jsonl
from data import prepare as p
from model import ModelSpec, load_tokenizer

PARTS = ("train_a", "train_b", "test")
TINY = ROOT / "data/tiny"
PAPER_TASKS = ("sciq", "boolq", "cosmos_qa", "anthropic_hh")


# ---- formatters ----


SCIQ = dict(
    question="What do bees make?", correct_answer="honey", distractor1="silk", distractor2="wax", distractor3="ink"
)
BOOLQ = {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True}
BOOLQ_TEXT = "Passage: Ice is frozen water.\nQuestion: is ice cold"
NONE = "None of the above choices ."
COSMOS = dict(context="c", question="q ?", answer0="a .", answer1="b .", answer2="c .", answer3=NONE, label=1)
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
FORMATTED = [  # of the second cosmos_qa row NONE is the truth, which is never shown
    (p.sciq, SCIQ | {"support": "s"}, ["honey"], ["silk", "wax", "ink"], "Q: What do bees make? A: "),
    (p.boolq, BOOLQ, [BOOLQ_TEXT], [], ""),
    (p.boolq, BOOLQ | {"answer": False}, [], [BOOLQ_TEXT], ""),
    (p.cosmos_qa, COSMOS, ["b ."], ["a .", "c .", NONE], "Context: c\nQuestion: q ?\nAnswer: "),
    (p.cosmos_qa, COSMOS | {"label": 3}, [], ["a .", "b .", "c ."], "Context: c\nQuestion: q ?\nAnswer: "),
    (p.anthropic_hh, HH, [HH["chosen"]], [HH["rejected"]], ""),
]


@pytest.mark.parametrize("formatter, row, true, false, start", FORMATTED)
def test_a_formatter_shows_the_truth_or_another_answer(formatter, row, true, false, start):
    shown = {formatter(row, Random(seed)) for seed in range(200)}
    assert shown == {(start + text, 1) for text in true} | {(start + text, 0) for text in false}


def test_the_coin_is_fair():
    assert 900 < sum(p.sciq(SCIQ, Random(seed))[1] for seed in range(2000)) < 1100


# ---- samples and splits ----


def prepared(task, folder, data_dir, **settings):
    """Counts, and the rows of each part."""
    counts = p.prepare(task, folder, data_dir, **settings)
    return counts, {part: read_jsonl(folder / f"{part}.jsonl") for part in PARTS}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_the_order_of_the_source_does_not_matter(task, tmp_path):
    shuffled = [[dict(reversed(r.items())) for r in Random(1).sample(rows, len(rows))] for rows in tiny_rows(task)]
    p.prepare(task, tmp_path / "a", TINY)
    p.prepare(task, tmp_path / "b", write_source(tmp_path / "shuffled", *shuffled, task))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert set(files_of(tmp_path / "a")) == {*(f"{x}.jsonl" for x in PARTS), "train_b.gold.jsonl", "counts.json"}


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_halves_are_disjoint_balanced_and_shuffled(task, tmp_path):
    counts, parts = prepared(task, tmp_path / "data", TINY)
    ids = {part: {r["id"] for r in rows} for part, rows in parts.items()}
    assert sum(map(len, parts.values())) == len(set.union(*ids.values()))
    texts = [r["text"] for rows in parts.values() for r in rows]
    assert task == "cosmos_qa" or len(texts) == len(set(texts))
    assert abs(len(parts["train_a"]) - len(parts["train_b"])) <= 1
    assert len(parts["train_a"] + parts["train_b"]) == counts["train"]["kept"] == 40 and len(parts["test"]) == 24
    source, fields = read_jsonl(TINY / task / "train.jsonl"), p.TASKS[task].key
    texts = [r["text"] for r in parts["train_a"]]
    places = [next(i for i, row in enumerate(source) if any(row[f] in t for f in fields)) for t in texts]
    assert places != sorted(places) and max(places) > 30


def test_another_seed_gives_other_coins_and_halves(tmp_path):
    _, first = prepared("sciq", tmp_path / "a", TINY)
    _, second = prepared("sciq", tmp_path / "b", TINY, seed=1)
    labels = [{r["id"]: r["label"] for r in parts["test"]} for parts in (first, second)]
    assert labels[0].keys() == labels[1].keys() and labels[0] != labels[1]
    assert {r["id"] for r in first["train_a"]} != {r["id"] for r in second["train_a"]}


def question(i, **changes):
    row = {"question": f"Question {i}?", "correct_answer": f"yes {i}", "support": ""}
    return row | {f"distractor{n}": f"no {i}.{n}" for n in (1, 2, 3)} | changes


def write_source(folder, train, test, task="sciq"):
    write_jsonl(folder / task / "train.jsonl", train)
    write_jsonl(folder / task / f"{p.TASKS[task].test_split}.jsonl", test)
    return folder


def tiny_rows(task="sciq"):
    """Rows of both splits."""
    return [read_jsonl(TINY / task / f"{split}.jsonl") for split in ("train", p.TASKS[task].test_split)]


def test_duplicates_are_removed_and_counted(tmp_path):
    train = [question(i) for i in range(20)]
    train += [question(3), question(4, question="question  4? ", correct_answer="another")]  # of one split
    test = [question(i) for i in range(100, 105)] + [question(5), question(6, question="QUESTION 6?", distractor1="x")]
    counts, parts = prepared("sciq", tmp_path / "data", write_source(tmp_path / "source", train, test))
    asked = Counter(" ".join(r["text"].lower().split("?")[0].split()) for rows in parts.values() for r in rows)
    assert len(asked) == 25 and set(asked.values()) == {1}
    assert len(parts["test"]) == 7 and len(parts["train_a"] + parts["train_b"]) == 18
    wanted = {"rows": 22, "duplicate": 2, "also_in_test": 2, "kept": 18}
    assert counts["train"] | wanted == counts["train"] and counts["test"]["duplicate"] == 0
    assert json.loads((tmp_path / "data/counts.json").read_text()) == counts
    p.prepare("sciq", tmp_path / "again", write_source(tmp_path / "back", train[::-1], test[::-1]))
    assert files_of(tmp_path / "again") == files_of(tmp_path / "data")  # whichever of the same questions comes first


def test_incomplete_rows_are_dropped_and_counted():
    rows = [question(i, distractor2=None if i < 3 else "no") for i in range(10)]
    samples, counts = p.make_samples("sciq", rows, 0)
    assert counts["incomplete"] == 3 and len(samples) == 7


def test_too_long_samples_are_dropped_for_all_models_and_counted(tmp_path):
    lengths = [30, 49, 50, 51, 80]  # of "Q: ... A: x" in bytes
    rows = [question(0, question=str(n).ljust(n - 8, "?"), correct_answer="x") for n in lengths]
    rows = [r | {f"distractor{n}": str(n) for n in (1, 2, 3)} for r in rows]
    test = [r | {"question": "t" + r["question"][:-1]} for r in rows]
    source = write_source(tmp_path / "source", rows + [question(i) for i in range(6)], test)
    tokenizers = (load_tokenizer(ModelSpec("random-small")),)
    counts, parts = prepared("sciq", tmp_path / "data", source, tokenizers=tokenizers, max_tokens=50)
    for split, kept in (("train", parts["train_a"] + parts["train_b"]), ("test", parts["test"])):
        assert {len(r["text"]) for r in kept} >= {30, 49} and max(len(r["text"]) for r in kept) < 50
        assert counts[split]["too_long"] == 3


def test_a_sample_must_be_short_enough_by_every_tokenizer():
    a, b = (lambda texts, x=x: {"input_ids": [x * t.count(x) for t in texts]} for x in "ab")
    assert p.short_enough([{"text": t} for t in ("aaab", "abbb", "aabb")], (a, b), 3) == [False, False, True]


def test_groups_are_not_divided():
    samples = [{"group": g} for g in "aabbbbbccd"]  # the middle falls into b
    first, second = p.split_in_half(samples)
    assert "".join(s["group"] for s in first) == "aabbbbb" and "".join(s["group"] for s in second) == "ccd"


def test_limits_cut_each_split(tmp_path):
    counts, parts = prepared("boolq", tmp_path / "data", TINY, limit_train=10, limit_test=4)
    assert [len(parts[x]) for x in PARTS] == [5, 5, 4] and counts["train"]["kept"] == 10
    _, whole = prepared("boolq", tmp_path / "whole", TINY)
    assert parts["test"] == whole["test"][:4]


def test_mixed_hh_draws_from_the_whole_split(tmp_path, monkeypatch):
    monkeypatch.setattr(p, "TRAIN_CAP", 20)
    _, head = prepared("anthropic_hh", tmp_path / "a", TINY)
    _, mixed = prepared("anthropic_hh_mixed", tmp_path / "b", TINY)
    rows = read_jsonl(TINY / "anthropic_hh/train.jsonl")
    source = {row[reply]: i for i, row in enumerate(rows) for reply in ("chosen", "rejected")}
    places = [[source[r["text"]] for r in parts["train_a"] + parts["train_b"]] for parts in (head, mixed)]
    assert max(places[0]) < 20 < 30 < max(places[1]) and len(places[1]) > 15


@pytest.mark.parametrize("task", [*PAPER_TASKS, "places"])
def test_gold_labels_of_train_b_are_in_no_other_file(task, tmp_path):
    _, parts = prepared(task, tmp_path / "data", TINY)
    gold = read_jsonl(tmp_path / "data/train_b.gold.jsonl")
    assert [r["id"] for r in gold] == [r["id"] for r in parts["train_b"]]
    assert all(r.keys() == {"id", "label"} for r in gold) and {r["label"] for r in gold} == {0, 1}
    assert all(r.keys() == {"id", "text"} for r in parts["train_b"])
    assert all(r.keys() == {"id", "text", "label"} for part in ("train_a", "test") for r in parts[part])
    ids = [r["id"] for r in gold]
    holders = [f.name for f in (tmp_path / "data").iterdir() if any(i in f.read_text() for i in ids)]
    assert sorted(holders) == ["train_b.gold.jsonl", "train_b.jsonl"]


# ---- fact tables ----


def tables_of(task):
    """Of each table: its path, the templates of question and statement, and the pairs of entity and answer."""
    for path in p.fact_tables(task):
        header, *lines = path.read_text().splitlines()
        yield path, *header.removeprefix("# ").split("\t"), [line.split("\t") for line in lines]


@pytest.mark.parametrize("task", ["facts", "places"])
def test_entities_of_the_parts_are_disjoint_also_the_other_way_round(task, tmp_path):
    _, parts = prepared(task, tmp_path / "data", None)
    part_of = {r["text"][3:].rpartition(" A: ")[0]: x for x in PARTS for r in parts[x]}
    found = {x: set() for x in PARTS}
    for _, template, _, pairs in tables_of(task):
        for entity, answer in pairs:
            part = part_of[template.replace("{}", entity)]
            found[part].add(entity)
            if [answer, entity] in pairs:  # as in "the opposite of hot is cold"
                assert part_of[template.replace("{}", answer)] == part, (template, entity, answer)
    assert min(map(len, found.values())) >= 50
    assert sum(map(len, found.values())) == len(set.union(*found.values()))


def test_there_are_enough_facts_and_no_distractor_is_the_answer():
    tables = p.fact_tables("facts")
    rows = {split: p.facts(tables, split) for split in ("train", "test")}
    lines = [(path.stem, line) for path in tables for line in path.read_text().splitlines()[1:]]
    assert len(tables) >= 12 and len(lines) >= 1000 and len(set(lines)) == len(lines)
    assert len(rows["train"]) + len(rows["test"]) == len(lines)
    assert 0.25 < len(rows["test"]) / len(lines) < 0.42
    for row in rows["train"] + rows["test"]:
        wrong = [row[f"distractor{i}"] for i in (1, 2, 3)]
        assert len({a.casefold() for a in (*wrong, row["correct_answer"])}) == 4, row
        assert row["question"].endswith("?") and "{}" not in row["question"]


def test_distractors_are_other_answers_of_the_same_table(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("# Where is {}?\t{} is in {}.\n" + "".join(f"thing {i}\tplace {i % 7}\n" for i in range(60)))
    column = {f"place {i}" for i in range(7)}
    rows = p.facts([path], "train") + p.facts([path], "test")
    wrong = [{r[f"distractor{i}"] for i in (1, 2, 3)} for r in rows]
    assert all(w < column - {r["correct_answer"]} and len(w) == 3 for w, r in zip(wrong, rows, strict=True))
    assert len(set(map(frozenset, wrong))) > 10
    assert p.facts([path], "test") == p.facts([path], "test") and len(rows) == 60


def test_the_passage_of_a_question_states_its_answer():
    for path, template, statement, pairs in tables_of("facts"):
        said = {template.replace("{}", e): statement.format(e, a) for e, a in pairs}
        for row in p.facts([path], "train") + p.facts([path], "test"):
            assert row["support"].lower() == said[row["question"]].lower() and row["correct_answer"] in row["support"]


@pytest.mark.parametrize("task", ["sciq_evidence", "boolq_evidence", "cosmos_qa_evidence", "facts_evidence"])
def test_evidence_lies_in_files_of_its_own_and_in_no_text(task, tmp_path):
    source = p.TASKS[task].source
    counts = p.prepare(task, tmp_path / "with", TINY)
    p.prepare(source, tmp_path / "without", TINY)
    for part in PARTS:
        samples, evidence = (read_jsonl(tmp_path / f"with/{part}{x}.jsonl") for x in ("", ".evidence"))
        assert [r["id"] for r in samples] == [r["id"] for r in evidence] and all(r["evidence"] for r in evidence)
        assert not any(e["evidence"] in r["text"] for e, r in zip(evidence, samples, strict=True))
    if not counts["train"]["no_evidence"] + counts["test"]["no_evidence"]:  # the same questions, candidates and halves
        ids = [[r["id"] for r in read_jsonl(tmp_path / f"{x}/train_a.jsonl")] for x in ("with", "without")]
        assert ids[0] == ids[1]


def test_half_of_a_passage_and_that_of_another_question():
    rows = [
        r | {"support": f"{i}: a. {i}: b? {i}: c."} for i, r in enumerate(read_jsonl(TINY / "sciq/train.jsonl")[:6])
    ]
    whole, half, other = (p.make_samples(f"sciq{x}_evidence", rows, 0)[0] for x in ("", "_half", "_other"))
    assert [s["text"] for s in whole] == [s["text"] for s in half] == [s["text"] for s in other]
    for n, sample in enumerate(whole):
        i = sample["evidence"][0]
        assert half[n]["evidence"] == f"{i}: a. {i}: c." and other[n - 1]["evidence"] == f"{i}: a. {i}: b? {i}: c."


def test_rows_without_evidence_are_dropped_and_counted():
    rows = read_jsonl(TINY / "sciq/train.jsonl")[:4]
    rows = [row | {"support": s} for row, s in zip(rows, ["It is so.", "", None, "  "], strict=True)]
    samples, counts = p.make_samples("sciq_evidence", rows, 0)
    assert [s["evidence"] for s in samples] == ["It is so."] and counts["no_evidence"] == 3
    with pytest.raises(InputError, match="lacks the field 'support'"):
        p.make_samples("sciq_evidence", [{k: v for k, v in rows[0].items() if k != "support"}], 0)


# ---- task files ----


def own_rows(n=60):
    """Questions each with a right and a wrong answer."""
    return [{"question": f"{i // 2} + 1?", "answer": str(i // 2 + 1 + i % 2), "label": 1 - i % 2} for i in range(n)]


def of_file(path, rows, folder):
    """Name, entry, counts and rows of each part of a task file."""
    write_jsonl(path, rows)
    name, p.TASKS[name] = task = p.task_of_file(path)
    return *task, *prepared(name, folder, None)


@pytest.fixture(autouse=True)
def no_new_tasks(monkeypatch):
    monkeypatch.setattr(p, "TASKS", dict(p.TASKS))


def test_rows_of_a_task_file_are_samples_whatever_their_order(tmp_path):
    rows = own_rows()
    name, task, counts, parts = of_file(tmp_path / "own-1.jsonl", rows, tmp_path / "a")
    assert name == "own-1" and task.wording == p.Wording("There is a question, followed by an answer.")
    assert [counts[x]["samples"] for x in PARTS] == [24, 24, 12] and not task.evidence
    gold = zip(parts["train_b"], read_jsonl(tmp_path / "a/train_b.gold.jsonl"), strict=True)
    labelled = [*parts["train_a"], *parts["test"], *(r | label for r, label in gold)]
    assert {r["text"]: r["label"] for r in labelled} == {
        f"Q: {r['question']} A: {r['answer']}": r["label"] for r in rows
    }
    asked = {x: {r["text"].split(" A: ")[0] for r in parts[x]} for x in PARTS}
    assert sum(map(len, asked.values())) == 30  # no question stands in two parts
    of_file(tmp_path / "own-1.jsonl", [dict(reversed(r.items())) for r in reversed(rows)], tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    flipped = of_file(tmp_path / "own-1.jsonl", [r | {"label": 1 - r["label"]} for r in rows], tmp_path / "c")[-1]
    assert [[r["id"] for r in flipped[x]] for x in PARTS] == [[r["id"] for r in parts[x]] for x in PARTS]


def test_ids_splits_and_evidence_of_a_task_file_are_kept(tmp_path):
    rows = [{"text": f"{i} is even", "label": 1 - i % 2, "id": i, "evidence": f"{i}  mod 2"} for i in range(40)]
    rows.append({"text": "1 IS EVEN", "label": 0, "id": "X", "evidence": "e", "odd": []})  # case makes a difference
    rows = [r | {"split": "test" if i < 7 else "train"} for i, r in enumerate(rows)]
    _, task, counts, parts = of_file(tmp_path / "own.jsonl", rows, tmp_path / "a")
    assert {r["id"]: r["text"] for r in parts["test"]} == {str(i): f"{i} is even" for i in range(7)}
    assert {r["id"] for x in ("train_a", "train_b") for r in parts[x]} == {*map(str, range(7, 40)), "X"}
    evidence = {r["id"]: r["evidence"] for x in PARTS for r in read_jsonl(tmp_path / f"a/{x}.evidence.jsonl")}
    assert evidence == {str(i): f"{i} mod 2" for i in range(40)} | {"X": "e"}
    assert counts["train"]["duplicate"] == counts["train"]["also_in_test"] == 0
    given = ("There is a statement.", "the statement is true or false", ("false", "true"), "the statement is {side}")
    assert task.wording == p.Wording(*given)


def test_the_first_line_of_a_task_file_words_it(tmp_path):
    shown, claim, sides = "There is a film review.", "the review is {side}", ("negative", "positive")
    header = {"wording": {"shown": shown, "claim": claim, "sides": sides}}
    lines = "\n\n".join(map(json.dumps, [header, *own_rows(20)]))
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    wording = p.Wording(shown, "the review is positive or negative", sides, claim)
    name, task = p.task_of_file(tmp_path / "own.jsonl.gz")
    assert (name, task.wording, wording.claims(1)) == ("own", wording, "the review is positive")
    write_jsonl(tmp_path / "own.jsonl", [{"wording": {"debated": "this or that", "begin": "Quote."}}, *own_rows(20)])
    wording = p.Wording("There is a question, followed by an answer.", "this or that", begin="Quote.")
    assert p.task_of_file(tmp_path / "own.jsonl")[1].wording == wording


# ---- files ----


def test_gz_reads_like_jsonl(tmp_path):
    for path in (write_source(tmp_path / "packed", *tiny_rows()) / "sciq").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    p.prepare("sciq", tmp_path / "a", TINY)
    p.prepare("sciq", tmp_path / "b", tmp_path / "packed")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


TRAIN = (TINY / "sciq/train.jsonl").read_bytes()  # 40 rows
WHOLE = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(99)), mtime=0)
LINES = [b'{"question": "cut of', b"[1, 2]", b"7", b'"text"']
BAD = [  # file, content, what is said
    ("other.jsonl", TRAIN, r"sciq/train\.jsonl"),
    ("train.jsonl", TRAIN.replace(b'"distractor2"', b'"distractor9"', 1), "sciq.*'distractor2'"),
    *(("train.jsonl", TRAIN + line, r"sciq/train\.jsonl:41: ") for line in LINES),
    *(("train.jsonl.gz", gzip.compress(TRAIN + line, mtime=0), r"sciq/train\.jsonl\.gz:41: ") for line in LINES),
    ("train.jsonl.gz", b"text", r"sciq/train\.jsonl\.gz"),
    ("train.jsonl.gz", WHOLE[:-20], r"sciq/train\.jsonl\.gz"),
    ("train.jsonl.gz", WHOLE[:30] + b"\xff" * 30 + WHOLE[60:], r"sciq/train\.jsonl\.gz"),
    ("train.jsonl.gz", gzip.compress(b"\xff\xfe", mtime=0), r"sciq/train\.jsonl\.gz"),
    ("train.jsonl", json.dumps(question(1)).encode(), "no sample left in train_a"),
]


@pytest.mark.parametrize("file, content, told", BAD)
def test_a_bad_file_is_named(file, content, told, tmp_path):
    source = write_source(tmp_path, *tiny_rows())
    (source / "sciq/train.jsonl").unlink()
    (source / "sciq" / file).write_bytes(content)
    with pytest.raises(InputError, match=told):
        p.prepare("sciq", tmp_path / "data", source)
