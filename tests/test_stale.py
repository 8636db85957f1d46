"""Any change of the configuration makes exactly the stages stale that depend on it: no more, no fewer, and down to the end.

No model runs: what a stage writes here is a digest of all that it asks for, so that whatever is made again differs.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stages as stages_module
import w2s
from common import write_jsonl
from stages import Stage
from w2s import Config, Experiment

METHODS = ("finetune", "ours", "market_making", "no_argument")
PARTS = ("train_a", "train_b")
LABELLED = {"naive": "floor", "read": "reader", "sides": "sides"}  # by whom a student's labels are made
DEBATES, WEAK = {"debate", "market_making"}, {"floor", "reader", "sides"}
STRONG = {"ceiling", *(f"{who} student" for who in LABELLED)}
TRAINED = WEAK | STRONG
ZERO_SHOT = {"zero-shot-weak", "zero-shot-strong"}

# Written by hand, from the paper's steps: what a field is read by, and what a kind of stage is made from.
READ_BY = {
    "lr": (0.5, STRONG),
    "weak_lr": (0.5, WEAK),
    "epochs": (3, TRAINED),
    "batch_size": (3, TRAINED),
    "aux_warmup": ("linear", TRAINED),
    "checkpointing": (True, TRAINED),
    "dtype": ("bfloat16", DEBATES | TRAINED | ZERO_SHOT),
    "max_tokens_per_forward": (99, TRAINED),
    "cache_tokens": (99, DEBATES),
    "weak_gpus": (1, set()),
    "strong_gpus": (1, set()),
    "transcript": ("last", {"reader", "sides", "market_making"}),
    "temperature": (0.3, DEBATES),
    "top_p": (0.5, DEBATES),
    "max_new_tokens": (7, DEBATES),
    "chat": (True, DEBATES | ZERO_SHOT),
    "limit_train": (10, {"data"}),
    "limit_test": (5, {"data"}),
    "max_sample_tokens": (99, {"data"}),
    "weak": ("random-small:1", WEAK | {"zero-shot-weak"}),  # a cut copy has the same tokenizer
    "strong": ("random-large:1", DEBATES | STRONG | {"zero-shot-strong"}),
    "seeds": ((0, 2), set()),  # more stages, none stale
    "methods": ((*METHODS, "single", "finetune_pro"), set()),
    "head_lr": (0.5, set()),
    "json": (True, set()),
}
MADE_FROM = {
    "floor": {"data"},
    "debate": {"data"},
    "market_making": {"data", "floor"},
    "reader": {"data", "debate", "market_making"},
    "sides": {"data"},
    "ceiling": {"data"},
    **{who: {"data"} for who in ZERO_SHOT},
}
for who, member in LABELLED.items():
    MADE_FROM |= {f"{who} labels": {member}, f"{who} student": {"data", f"{who} labels"}}


def kind_of(stage: Stage) -> str:
    name, folder = stage.folder.name, stage.folder.parent.name
    if name in ZERO_SHOT:
        return name
    if folder == "predictions":
        starts = {"weak-naive": "floor", "weak-no_argument": "sides", "weak": "reader", "strong-ceiling": "ceiling"}
        student = f"{who_labels(name.split('-')[1])} student"
        return next((kind for start, kind in starts.items() if name.startswith(start)), student)
    return f"{who_labels(folder)} labels" if stage.folder.parts[-3] == "weak_labels" else name


def who_labels(method: str) -> str:
    return {"finetune": "naive", "no_argument": "sides"}.get(method, "read")


def closed(kinds: set[str], seen: set[str]) -> set[str]:
    """With all that is made from them, by what is made from what."""
    for kind in MADE_FROM:  # in an order that can run
        kinds = kinds | ({kind} if MADE_FROM[kind] & kinds else set())
    return kinds & seen


def pretended(stage: Stage) -> Stage:
    """The stage with files of the right names and shapes that hold a digest of what it asks for."""

    def make(out: Path) -> dict:
        what = hashlib.sha256(json.dumps([stage.wanted(), str(stage.folder.name)]).encode()).hexdigest()
        rows = [{"id": "a", "text": what, "probs": [0.5, 0.5], "sides": [0] * 6, "turns": [what] * 6}]
        names = [*PARTS, "test", "train_b.gold"]
        if stage.folder.parent.name == "transcripts":
            names = [f"seed{k}/{part}" for k in stage.minimum for part in PARTS]
        for name in names:
            write_jsonl(out / f"{name}.jsonl", rows)
        if stage.minimum.get("kept models"):
            write_jsonl(out / "model/config.json", rows)
        return {}

    return dataclasses.replace(stage, make=make)


def experiment(out: Path, **changes) -> Experiment:
    config = Config.of(
        "sciq",
        preset="smoke",
        tasks=("sciq",),
        seeds=(0, 1),
        methods=METHODS,
        limit_train=16,
        limit_test=8,
        out=str(out),
    )
    return Experiment(dataclasses.replace(config, **changes), "sciq")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("stale") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "provenance", dict)
        for stage in experiment(out).stages():
            assert pretended(stage).run()
    return out


def test_the_table_knows_every_kind_of_stage_and_every_field(done):
    assert {kind_of(s) for s in experiment(done).stages()} == {"data", *MADE_FROM}
    others = {"preset", "tasks", "data_dir", "out", "kernels", "engine", "keep_models", "head_only", "head_epochs"}
    others |= {"tensorboard", "gpus", "gpu", "show_config"}
    assert {f.name for f in dataclasses.fields(Config)} == READ_BY.keys() | others


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(fields=st.sets(st.sampled_from(sorted(READ_BY)), min_size=1, max_size=3))
def test_exactly_what_depends_on_a_change_is_stale_and_made_again(done, tmp_path, monkeypatch, capsys, fields):
    monkeypatch.setattr(stages_module, "provenance", dict)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(done, out)
    before = {s.folder for s in experiment(out).stages()}
    after = experiment(out, **{f: READ_BY[f][0] for f in fields})
    stages = [s for s in after.stages() if s.folder in before]
    read = set().union(*(READ_BY[f][1] for f in fields))
    states = {row["stage"]: row["state"] for row in w2s.states([after])}
    for stage in stages:
        expected = "stale" if kind_of(stage) in read else "done"
        assert states[stage.folder.relative_to(out).as_posix()] == expected, (fields, stage.folder.name)
    made = {s.folder: kind_of(s) for s in after.stages() if pretended(s).run()}
    again = closed(read, {kind_of(s) for s in stages})
    for stage in stages:
        assert (stage.folder in made) == (kind_of(stage) in again), (fields, stage.folder.name)
    assert {row["state"] for row in w2s.states([after])} == {"done"}
