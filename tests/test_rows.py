"""What is counted of debates, by hand: what was said, how it was judged, what it cost."""

import json

import pytest

from common import InputError, write_jsonl, write_text
from report.rows import Reported, debate_row, quotes, saved, supervision_cost
from report.tables import Report, table_of_debates
from stages import Stage
from steps import tokens_by_turn

PASSAGE = "Its capital is the old town of Bern, they say."
DEBATES = [
    ["The capital is the old town of Bern.", "the capital is the old town of Bern.", "It is not."],  # quotes it
    ["No.", "No.", "No."],
    ["Perhaps.", "No.", "Perhaps."],
    ["Is the old town of Bern the capital?", "It is.", "It is not."],  # only what the question says
]


def row_of(tmp_path, turns: int, evidence: bool) -> dict:
    data, floor, judge = (tmp_path / name for name in ("sciq/data", "floor", "judge"))
    ids = [f"s{i}" for i in range(4)]
    questions = ["Where?", "Where?", "Where?", "Is the old town of Bern the capital?"]
    write_jsonl(data / "train_b.gold.jsonl", [{"id": i, "label": 1} for i in ids])
    write_jsonl(data / "train_b.jsonl", [{"id": i, "text": q} for i, q in zip(ids, questions, strict=True)])
    if evidence:
        write_jsonl(data / "train_b.evidence.jsonl", [{"id": i, "evidence": PASSAGE} for i in ids])
    said = [{"id": i, "sides": [0, 1, 0], "turns": t, "n_tokens": [1, 1, 1]} for i, t in zip(ids, DEBATES, strict=True)]
    write_jsonl(tmp_path / "said.jsonl", said)
    made = {"config": {}, "inputs": {}, "commit": "abc", "device": "cpu", "seconds": 1.0}
    for folder, ones in ((floor, [0, 0, 0, 0]), (judge, [1, 0, 1, 0])):
        write_jsonl(folder / "train_b.jsonl", [{"id": i, "probs": [1 - y, y]} for i, y in zip(ids, ones, strict=True)])
        write_text(folder / "manifest.json", json.dumps(made))
    run = Reported("sciq", "ours", 0, Stage(judge, {}, {}, lambda out: {}), reads="debate", turns=turns)
    seeds = {"debate_seed": 0, "finetune_seed": 0, "seed": 0}
    return debate_row(tmp_path, run, seeds, tmp_path / "said.jsonl", floor / "train_b.jsonl", judge / "train_b.jsonl")


def test_turns_that_repeat_an_earlier_one_are_counted(tmp_path):
    assert row_of(tmp_path, 3, evidence=False)["repeated"] == (2 + 1) / 8  # "the" is not "The"
    assert row_of(tmp_path, 2, evidence=False)["repeated"] == 1 / 4
    assert row_of(tmp_path, 1, evidence=False)["repeated"] is None


def test_debates_that_quote_the_evidence_are_counted_and_how_they_are_judged(tmp_path):
    row = row_of(tmp_path, 3, evidence=True)
    counted = {k: row[k] for k in ("quoting", "accuracy_quoting", "accuracy_not_quoting")}
    assert counted == pytest.approx({"quoting": 1 / 4, "accuracy_quoting": 1, "accuracy_not_quoting": 1 / 3}, abs=1e-6)
    without = row_of(tmp_path / "without", 3, evidence=False)
    assert not counted.keys() & without.keys()
    heads = [
        [str(head) for head in table_of_debates(Report(tmp_path, [], rows, {}, {}, {}, 0)).parts[0][0][0]]
        for rows in ([row], [without])
    ]
    assert set(heads[0]) - set(heads[1]) == {"quote the evidence %", "judge accuracy there %", "elsewhere %"}


def test_what_debates_cost_is_left_out_where_their_record_is_of_a_killed_run_or_of_other_sets(tmp_path):
    judges = {(k, 0): Stage(tmp_path / f"judge{k}", {}, {}, lambda out: {}) for k in (0, 1)}
    run = Reported("sciq", "ours", 0, judges[0, 0], judges=judges, turns=2, protocol="debate")
    for part in ("train_a", "train_b"):
        write_jsonl(tmp_path / f"sciq/data/{part}.jsonl", [{"id": part, "text": "Where?"}])
    cost = []
    for turns, seeds in ((8, "01"), (0, "01"), (4, "0")):
        made = {"turns": turns, "seconds": 8.0, "tokens": {k: [5, 4, 3] for k in seeds}}
        write_text(tmp_path / "sciq/transcripts/debate/manifest.json", json.dumps(made))
        cost.append(supervision_cost(tmp_path, run))
    assert cost == [{"supervision_seconds": 8.0, "supervision_tokens": 18}, {}, {}]


def test_turns_are_counted_where_a_killed_run_left_more_of_one_half(tmp_path):
    for part, n in (("train_a", 3), ("train_b", 2)):
        write_jsonl(tmp_path / f"{part}.jsonl", [{"n_tokens": n * [4]}])
    assert tokens_by_turn(tmp_path) == [8, 8, 4]


def test_a_quote_has_five_words_in_a_row():
    assert quotes(["It is the OLD town, of Bern!"], PASSAGE, "") and quotes(
        ["", "capital is the old town"], PASSAGE, ""
    )
    assert not quotes(["The old town of Bern"[4:], "its capital is the new town of Bern"], PASSAGE, "")


def test_rows_from_which_nothing_can_be_drawn_are_refused(tmp_path):
    for told, rows in (("no results.jsonl", None), ("which answers are right", [{"task": "sciq", "method": "ours"}])):
        if rows:
            write_jsonl(tmp_path / "results.jsonl", rows)
            write_jsonl(tmp_path / "debates.jsonl", [])
        with pytest.raises(InputError, match=told):
            saved(tmp_path, {}, {})
