"""Any change of the configuration makes exactly the stages stale that depend on it: no more, no fewer, and down to the end."""

import dataclasses
import json
import re

import pytest
from conftest import METHODS, SMOKE, record, run

from common import read_jsonl, write_jsonl
from stages import Stage, State

JUDGE = {  # of each method
    "finetune": "floor", "finetune_aux": "floor", "single": "debate judge", "ours": "debate judge",
    "market_making": "market judge", "no_argument": "sides judge", "independent": "deaf judge", "other_debate": "placebo judge",
}  # fmt: skip
DEBATES, ZERO_SHOT = {"debate", "market_making", "independent"}, {"zero-shot-weak", "zero-shot-strong"}
READERS = set(JUDGE.values()) - {"floor"}
WEAK = {"floor", *READERS}
STRONG = {"ceiling", *(f"student of {judge}" for judge in WEAK)}
TRAINED = WEAK | STRONG

# Written by hand, from the paper's steps: what reads which fields, and what a kind of stage is made from.
READERS_OF = [
    (TRAINED, "--lr 0.5", "--epochs 3", "--batch-size 3", "--aux-warmup linear", "--lora-rank 4", "--lora-alpha 8"),
    (STRONG, "--lr 0.5 --weak-lr 0.003"),  # the weak model follows --lr, but for this
    (WEAK, "--weak-lr 0.5"),
    (DEBATES | TRAINED | ZERO_SHOT, "--dtype bfloat16"),
    ({*READERS, "market_making"}, "--transcript last"),
    (DEBATES, "--temperature 0.3", "--top-p 0.5", "--max-new-tokens 7"),
    ({"data"}, "--limit-train 10", "--limit-test 5", "--max-sample-tokens 99"),
    (WEAK | {"zero-shot-weak"}, "--weak random-small:1"),  # a cut copy has the same tokenizer
    (DEBATES | STRONG | {"zero-shot-strong"}, "--strong random-large:1"),
    (set(), "--checkpointing", "--max-tokens-per-forward 99", "--cache-tokens 99", "--weak-gpus 1", "--strong-gpus 1"),
    (set(), "--seeds 0 2", "--methods finetune finetune_pro ours", "--head-lr 0.5"),  # more stages, none stale
]
READ_BY = {flags: kinds for kinds, *changes in READERS_OF for flags in changes}
MADE_FROM = {  # in an order that can run
    "data": set(),
    **dict.fromkeys(("floor", "debate", "independent", "sides judge", "ceiling", *sorted(ZERO_SHOT)), {"data"}),
    "market_making": {"data", "floor"},
    "debate judge": {"data", "debate"},
    "market judge": {"data", "market_making"},
    "deaf judge": {"data", "independent"},
    "placebo judge": {"data", "debate"},
    **{f"labels of {judge}": {judge} for judge in sorted(WEAK)},
    **{f"student of {judge}": {"data", f"labels of {judge}"} for judge in sorted(WEAK)},
}


def kind_of(stage: str) -> str:
    _, folder, *rest = stage.split("/")
    name, *run = rest[0].split("-") if rest else [folder]
    if folder == "weak_labels":
        return f"labels of {JUDGE[name]}"
    if name == "strong":
        return "ceiling" if run[0] == "ceiling" else f"student of {JUDGE[run[0]]}"
    judges = JUDGE | {"naive": "floor", "debate": "debate judge"}
    return judges[run[0]] if name == "weak" else rest[0] if rest else folder


def test_the_tables_know_every_kind_of_stage(smoke, status):
    assert set(JUDGE) == set(METHODS) and {kind_of(stage) for stage in status(smoke)} == set(MADE_FROM)


@pytest.mark.parametrize("flags", READ_BY)
def test_exactly_what_reads_a_flag_is_stale(flags, smoke, status):
    for stage, row in status(smoke, *flags.split()).items():
        if (smoke / stage).exists():
            assert row["state"] == ("stale" if kind_of(stage) in READ_BY[flags] else "done"), stage
            assert len(row["why"]) == (row["state"] == "stale")


@pytest.mark.parametrize("kind", MADE_FROM)
def test_exactly_what_is_made_from_a_stage_is_stale_when_that_changes(kind, copied, status):
    for manifest in copied.rglob("manifest.json"):
        if kind_of(manifest.parent.relative_to(copied).as_posix()) == kind:
            for name in json.loads(manifest.read_text())["outputs"]:
                file = manifest.parent / name
                if file.suffix == ".jsonl":
                    write_jsonl(file, read_jsonl(file)[::-1])
                elif file.suffix == ".json":
                    file.write_text(file.read_text() + "\n")
                record(file)
    for stage, row in status(copied).items():
        assert row["state"] == ("stale" if kind in MADE_FROM[kind_of(stage)] else "done"), stage


def test_a_run_makes_again_what_a_change_reaches_down_to_the_end(copied, status, capsys):
    wanted = set(READ_BY["--transcript last"])
    for kind in MADE_FROM:
        wanted |= {kind} if MADE_FROM[kind] & wanted else set()
    assert run("w2s", *SMOKE, copied, "--transcript", "last") == 0
    made = set(re.findall(r"^\[.*\] (\S+): ", capsys.readouterr().out, re.MULTILINE))
    rows = status(copied, "--transcript", "last")
    assert made == {stage for stage in rows if kind_of(stage) in wanted}
    assert {row["state"] for row in rows.values()} == {"done"}


def test_accept_takes_what_differs_in_code_alone(tmp_path):
    made = Stage(tmp_path / "made", {"lr": 1}, {}, lambda out, ranks: {}, code={"f": "before"})
    made.run()
    now = dataclasses.replace(made, config={"lr": 1, "rank": 0}, defaults={"rank": 0}, code={"f": "after"})
    assert now.state()[0] is State.STALE and now.accept() and now.state()[0] is State.DONE
    assert not now.accept()  # nothing is left to accept
    other = dataclasses.replace(now, config={"lr": 2, "rank": 0}, code={"f": "later"})
    assert not other.accept() and other.state()[0] is State.STALE
    gone = dataclasses.replace(now, inputs={"samples": tmp_path / "samples.jsonl"}, code={"f": "later"})
    assert not gone.accept() and gone.state()[1] == [f"input {tmp_path / 'samples.jsonl'} is missing"]
