"""w2s.py, report/ and the stages of common.py: what is compared, what is read, and that nothing is done twice."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import ROOT

import w2s
from common import InputError, align_by_id, read_jsonl, write_jsonl
from report import figures, stats
from report import tables as report_tables
from report.rows import Report
from stages import Stage, locked
from w2s import METHODS, Experiment

PAPER = json.loads((ROOT / "data/paper.json").read_text())

# ---- the tables and figures of the paper (paper.md) ----

ROWS = {
    "table2": {"weak_floor", "finetune", "finetune_aux", "finetune_pro", "ours", "strong_ceiling"},
    "table4": {"consultancy", "market_making", "ours"},
    "table5": {"single", "finetune_ensembles", "ours"},
}


def shown_in(place: str) -> set[str]:
    return {name for name, m in METHODS.items() if place in m.shown}


def test_every_row_of_the_papers_tables_is_there():
    assert PAPER.keys() - {"source", "tasks"} == set.union(*ROWS.values())
    ours_alone = {"naive_ensemble", "no_argument", "evidence"}
    assert shown_in("table2") | w2s.REFERENCE_RUNS.keys() == ROWS["table2"]
    assert shown_in("table4") == ROWS["table4"]
    assert shown_in("table5") == ROWS["table5"] | ours_alone
    assert set(report_tables.TABLES) == set(ROWS)
    for name, rows in PAPER.items():
        if name not in ("source", "tasks"):
            assert len(rows) == len(PAPER["tasks"]) == 4 and (rows[0][1] is None) == (name in w2s.REFERENCE_RUNS)


def test_methods_are_what_the_paper_says():
    debate_seeds = {name: [k for k, _ in m.members] for name, m in METHODS.items()}
    finetune_seeds = {name: [j for _, j in m.members] for name, m in METHODS.items()}
    for name in ("ours", "consultancy", "market_making"):
        assert (debate_seeds[name], finetune_seeds[name]) == ([0, 1, 2, 3], [0] * 4)
    for name in ("finetune_ensembles", "naive_ensemble", "no_argument"):
        assert (debate_seeds[name], finetune_seeds[name]) == ([0] * 4, [0, 1, 2, 3])
    for name in ("finetune", "finetune_aux", "finetune_pro", "single"):
        assert METHODS[name].members == ((0, 0),)
    losses = {name: m.loss for name, m in METHODS.items() if m.loss != "xent"}
    assert losses == {"finetune_aux": "logconf", "finetune_pro": "product"}
    read = {name: m.reads for name, m in METHODS.items() if m.reads != "debate"}
    assert read == {
        "finetune": "nothing", "finetune_aux": "nothing", "finetune_pro": "nothing", "naive_ensemble": "nothing",
        "consultancy": "consultancy", "market_making": "market_making", "no_argument": "sides", "evidence": "evidence",
    }  # fmt: skip


def test_every_point_of_the_papers_figures_is_there():
    assert set(figures.FIGURES) == {"figure2", "figure3"}
    for x in (3, 4, 5, 6):
        [by_size], [by_turns] = shown_in(f"figure2:{x}"), shown_in(f"figure3:{x}")
        assert METHODS[by_size].members == tuple((k, 0) for k in range(x)) and METHODS[by_size].turns == 3
        assert METHODS[by_turns].members == tuple((k, 0) for k in range(4)) and METHODS[by_turns].turns == x
    places = {place for m in METHODS.values() for place in m.shown}
    assert places == set(ROWS) | {f"figure{n}:{x}" for n in (2, 3) for x in range(1, 7)}


def test_the_papers_numbers_are_copied_right():
    assert PAPER["ours"] == [[92.6, 76.5], [88.7, 69.2], [88.8, 56.5], [50.2, 70.0]]
    assert [cell[0] for cell in PAPER["weak_floor"]] == [90.0, 86.0, 87.5, 48.8]
    for name, row in PAPER.items():  # the PGR of every cell follows from its accuracies, to their rounding
        if name not in ("source", "tasks", *w2s.REFERENCE_RUNS):
            for i, (accuracy, pgr) in enumerate(row):
                weak, ceiling = PAPER["weak_floor"][i][0], PAPER["strong_ceiling"][i][0]
                assert 100 * stats.pgr(weak, accuracy, ceiling) == pytest.approx(pgr, abs=0.06)


# ---- stages ----


def counting_stage(folder, calls, config, inputs=None, minimum=None, fail=False):
    def make(out):
        calls.append(config)
        (out / "half.txt").write_text("half")
        if fail:
            raise RuntimeError("killed")
        (out / "result.txt").write_text(str(config))
        return {"tokens": 5}

    return Stage(folder, config, inputs or {}, make, minimum or {})


@pytest.fixture
def made(tmp_path):
    """A finished stage: its folder, an input, and the calls of make so far."""
    calls, source = [], tmp_path / "source.txt"
    source.write_text("one")
    assert counting_stage(tmp_path / "stage", calls, {"lr": 1}, {"source": source}).run()
    return tmp_path / "stage", source, calls


def test_a_finished_stage_is_not_made_again(made):
    folder, source, calls = made
    manifest = (folder / "manifest.json").read_bytes()
    assert not counting_stage(folder, calls, {"lr": 1}, {"source": source}).run()
    assert len(calls) == 1 and (folder / "manifest.json").read_bytes() == manifest
    recorded = json.loads(manifest)
    assert recorded["config"] == {"lr": 1} and recorded["tokens"] == 5
    assert {"commit", "device", "versions", "seconds", "inputs", "outputs"} <= recorded.keys()


def spoil(folder, source, how):
    if how == "input":
        source.write_text("another")
    if how == "output":
        (folder / "result.txt").write_text("by hand")
    if how == "lost output":
        (folder / "result.txt").unlink()
    if how == "manifest":
        (folder / "manifest.json").write_text('{"config": ')


@pytest.mark.parametrize(
    "how, told",
    [
        ("config", "config.lr: 1 -> 2"),
        ("input", "inputs.source: "),
        ("output", "output result.txt was changed after it was written"),
        ("lost output", "output result.txt is missing"),
        ("manifest", "manifest.json is not readable"),
    ],
)
def test_a_stale_stage_says_what_differs_and_keeps_the_old_files(made, how, told, capsys):
    folder, source, calls = made
    spoil(folder, source, how)
    old = {f.name: f.read_bytes() for f in folder.iterdir()}
    stage = counting_stage(folder, calls, {"lr": 2 if how == "config" else 1}, {"source": source})
    assert len(stage.difference()) == 1 and told in stage.difference()[0]
    assert stage.run() and len(calls) == 2
    assert told in capsys.readouterr().out
    kept = folder.with_name("stage.stale1")
    assert {f.name: f.read_bytes() for f in kept.iterdir()} == old
    assert (folder / "result.txt").exists() and stage.difference() == []


def test_two_stale_folders_are_both_kept(made):
    folder, _, calls = made
    for lr in (2, 3):
        counting_stage(folder, calls, {"lr": lr}).run()
    texts = [(folder.with_name(name) / "result.txt").read_text() for name in ("stage.stale1", "stage.stale2", "stage")]
    assert texts == ["{'lr': 1}", "{'lr': 2}", "{'lr': 3}"]


def test_a_killed_stage_is_continued_by_the_same_work_only(tmp_path):
    folder, calls = tmp_path / "stage", []
    with pytest.raises(RuntimeError):
        counting_stage(folder, calls, {"lr": 1}, fail=True).run()
    assert counting_stage(folder, calls, {"lr": 1}).difference() is None
    (folder / "part.txt").write_text("so far")
    assert counting_stage(folder, calls, {"lr": 1}).run()
    assert (folder / "part.txt").exists() and not folder.with_name("stage.stale1").exists()
    with pytest.raises(RuntimeError):
        counting_stage(folder, calls, {"lr": 2}, fail=True).run()
    (folder / "part.txt").write_text("for lr 2")
    assert counting_stage(folder, calls, {"lr": 3}).run()
    assert not (folder / "part.txt").exists()
    assert (folder.with_name("stage.stale2") / "part.txt").read_text() == "for lr 2"


def test_a_stage_that_holds_more_is_done_and_one_that_holds_less_is_continued(tmp_path):
    folder, calls = tmp_path / "stage", []
    assert counting_stage(folder, calls, {"lr": 1}, minimum={"0": 3, "1": 3}).run()
    (folder / "begun.txt").write_text("3 turns")
    assert not counting_stage(folder, calls, {"lr": 1}, minimum={"0": 2}).run()
    more = counting_stage(folder, calls, {"lr": 1}, minimum={"0": 6, "2": 3})
    assert more.difference() == ["0: 3 -> 6", "2: 0 -> 3"] and more.run()
    assert (folder / "begun.txt").exists()
    assert json.loads((folder / "manifest.json").read_text())["minimum"] == {"0": 6, "1": 3, "2": 3}


def test_rows_are_matched_by_id():
    rows = [{"id": "a", "v": 1}, {"id": "b", "v": 2}]
    assert align_by_id(rows, ["b", "a"], "f") == rows[::-1]
    for bad in (rows[:1], [*rows, {"id": "c"}], [*rows, rows[0]], [rows[0], {"id": "c"}]):
        with pytest.raises(ValueError, match="f: ids do not match"):
            align_by_id(bad, ["a", "b"], "f")


# ---- which stages there are ----


def small_experiment(out: Path, **settings) -> Experiment:
    given = {"preset": "smoke", "tasks": ("sciq",), "seeds": (0,), "limit_train": 16, "limit_test": 8, "out": str(out)}
    return Experiment(w2s.Config.of("sciq", **(given | settings)), "sciq")


def changed(e: Experiment, **settings) -> Experiment:
    return Experiment(dataclasses.replace(e.config, **settings), e.task)


def names_of(e: Experiment) -> list[str]:
    return [s.folder.relative_to(e.folder).as_posix() for s in e.stages()]


def test_one_debate_serves_all_points_of_both_figures(tmp_path):
    figures = tuple(
        n for n, m in METHODS.items() if any(s.startswith("figure") and int(s.split(":")[1]) >= 3 for s in m.shown)
    )
    experiment = small_experiment(tmp_path, methods=figures, seeds=(0, 1))
    names = names_of(experiment)
    assert len(figures) == 7 and [n for n in names if n.startswith("transcripts/")] == ["transcripts/debate"]
    [debates] = [s for s in experiment.stages() if s.folder.parent.name == "transcripts"]
    assert debates.minimum == {"0": 6, "1": 6, "2": 6, "3": 6, "4": 3, "5": 3}
    members = [n for n in names if n.startswith("predictions/weak-debate")]
    assert len(members) == 2 * (6 + 3 * 4)  # six seeds at three turns; four at four, five and six turns


def test_no_stage_is_there_twice_and_all_methods_share_what_they_can(tmp_path):
    names = names_of(small_experiment(tmp_path, seeds=(0, 1)))
    assert len(names) == len(set(names))
    for seed in (0, 1):
        assert (
            names.count(f"predictions/weak-naive-f0-s{seed}") == names.count(f"predictions/strong-ceiling-s{seed}") == 1
        )
        assert all(f"predictions/strong-{m}-s{seed}" in names for m in METHODS if m != "evidence")
    assert {n for n in names if n.startswith("transcripts/")} == {
        f"transcripts/{protocol}" for protocol in ("debate", "consultancy", "market_making")
    }


# ---- whole runs of one task: `done` is run stage by stage, with every file that it opens on record ----

opened: list[str] | None = None


def hook(event, args):
    if opened is not None and event == "open":
        opened.append(str(args[0]))


sys.addaudithook(hook)
RUN_METHODS = ("finetune", "finetune_aux", "single", "ours", "market_making", "no_argument")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, and which files each of its stages opened."""
    global opened
    experiment = small_experiment(tmp_path_factory.mktemp("done") / "out", methods=RUN_METHODS)
    files: dict[str, set[str]] = {}
    for stage in experiment.stages():
        opened = []
        assert stage.run()
        files[stage.folder.relative_to(experiment.folder).as_posix()], opened = set(opened), None
    w2s.write_report([experiment])
    return experiment, files


@pytest.fixture
def copied(done, tmp_path):
    """A copy of that run, to be spoiled."""
    shutil.copytree(done[0].config.out, tmp_path / "out")
    return changed(done[0], out=str(tmp_path / "out"))


def products(folder: Path) -> dict[str, bytes]:
    """Data, transcripts, predictions and weak labels by their path."""
    files = [p for p in folder.rglob("*.jsonl") if p.name != "steps.jsonl"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def tables(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in (folder.parent / "tables").glob("*.md") if p.name != "cost.md"}


@pytest.fixture(scope="module")
def again(done, tmp_path_factory):
    """The folder of the same run in another process and place, and what was printed."""
    out = tmp_path_factory.mktemp("again") / "out"
    flags = ["--preset", "smoke", "--tasks", "sciq", "--seeds", "0", "--limit-train", "16", "--limit-test", "8"]
    flags += ["--methods", *RUN_METHODS, "--out", out]
    end = subprocess.run([sys.executable, ROOT / "w2s.py", "run", *flags], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    return out / "sciq", end.stdout


def test_two_runs_give_the_same_bytes(done, again):
    first, second = products(done[0].folder), products(again[0])
    assert first.keys() == second.keys() and [name for name in first if first[name] != second[name]] == []
    kinds = {name.split("/")[0] for name in first}
    assert kinds == {"data", "transcripts", "predictions", "weak_labels"} and len(first) > 30
    n = len(done[1])
    assert f"{n} of {n} stages made" in again[1] and "### Table 2" in again[1]


def test_tables_are_the_same_bytes_whatever_the_clock_says(done, again, copied):
    for path in copied.folder.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"seconds": manifest["seconds"] + 100}))
    w2s.write_report([copied])
    assert tables(done[0].folder) == tables(again[0]) == tables(copied.folder)
    assert set(tables(again[0])) == {"table2.md", "table4.md", "table5.md", "calibration.md", "debates.md"}


def test_a_second_run_makes_nothing(done, capsys):
    before = {p: p.stat().st_mtime_ns for p in done[0].folder.rglob("manifest.json")}
    w2s.run([done[0]])
    assert f"\n0 of {len(done[1])} stages made" in "\n" + capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in done[0].folder.rglob("manifest.json")} == before
    w2s.status([done[0]])
    assert f"{len(done[1])} done, 0 running, 0 stale, 0 missing" in capsys.readouterr().out


def test_the_tables_have_the_papers_rows_and_numbers(done):
    for name in ROWS:
        text = tables(done[0].folder)[f"{name}.md"]
        rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
        labels = w2s.REFERENCE_RUNS | {m: METHODS[m].label for m in METHODS}
        for method in ROWS[name]:
            accuracy, pgr = PAPER[method][0]
            row = rows[labels[method]]
            assert row[2] == f"{accuracy:.1f}" and row[4].strip() == ("" if pgr is None else f"{pgr:.1f}")
            assert ("[" in row[1]) == (method in (*RUN_METHODS, *w2s.REFERENCE_RUNS))


def test_evidence_reaches_those_who_debate_and_the_bound_alone(tmp_path):
    """With the passages of all samples exchanged, nothing else changes by a byte."""
    rows, there = {}, {}
    for split in ("train", "test"):
        rows[split] = [r for r in read_jsonl(ROOT / f"data/tiny/sciq/{split}.jsonl") if r["support"]]
    methods = ("finetune", "naive_ensemble", "no_argument", "ours", "evidence")
    for name, shift in (("own", 0), ("exchanged", 1)):
        for split, of in rows.items():
            support = [r["support"] for r in of]
            support = support[shift:] + support[:shift]
            write_jsonl(
                tmp_path / f"{name}/sciq/{split}.jsonl",
                [r | {"support": s} for r, s in zip(of, support, strict=True)],
            )
        config = w2s.Config.of(
            "sciq_evidence", preset="smoke", tasks=("sciq_evidence",), seeds=(0,), methods=methods, limit_train=16, limit_test=8,
            data_dir=str(tmp_path / name), out=str(tmp_path / f"out-{name}"),
        )  # fmt: skip
        for stage in w2s.Experiment(config, "sciq_evidence").stages():
            assert stage.run()
        there[name] = {
            f.relative_to(tmp_path / f"out-{name}/sciq_evidence").as_posix(): f.read_bytes()
            for f in (tmp_path / f"out-{name}").rglob("*.jsonl") if f.name != "steps.jsonl"
        }  # fmt: skip
    assert there["own"].keys() == there["exchanged"].keys()
    changed = {f for f, content in there["own"].items() if content != there["exchanged"][f]}
    reads_it = ("transcripts", "evidence.jsonl", "weak-debate", "weak-evidence", "labels/ours", "labels/evidence",
                "strong-ours", "strong-evidence", "zero-shot-evidence")  # fmt: skip
    assert changed == {f for f in there["own"] if any(word in f for word in reads_it)}


def test_what_two_tasks_have_in_common_is_computed_once(tmp_path):
    def run(out, tasks):
        given = dict(
            preset="smoke", tasks=tasks, seeds=(0,), methods=("finetune", "single"), limit_train=40, limit_test=8,
            out=str(tmp_path / out),
        )  # fmt: skip
        for task in tasks:
            for stage in w2s.Experiment(w2s.Config.of(task, **given), task).stages():
                stage.run()
        return {
            f.parent.name: json.loads((f.parent / "manifest.json").read_text()) | {"bytes": f.read_bytes()}
            for f in (tmp_path / out / tasks[-1]).glob("predictions/*/t*.jsonl")
        }

    both, alone = run("both", ("places_evidence", "places")), run("alone", ("places",))
    assert {name: m["bytes"] for name, m in both.items()} == {name: m["bytes"] for name, m in alone.items()}
    copied = {name for name, m in both.items() if "copied_from" in m}
    zero_shot = {"zero-shot-weak", "zero-shot-strong"}
    assert copied == {"weak-naive-f0-s0", "strong-ceiling-s0", "strong-finetune-s0"} | zero_shot


def test_results_are_counted_from_the_predictions(done):
    out = done[0].folder.parent
    gold = {r["id"]: r["label"] for r in read_jsonl(out / "sciq/data/test.jsonl")}
    rows = read_jsonl(out / "results.jsonl")
    references = ["zero_shot_weak", "zero_shot_strong", "weak_floor", "strong_ceiling"]
    assert [r["method"] for r in rows] == [*references, *(m for m in METHODS if m in RUN_METHODS)]
    for row in rows:
        said = {r["id"]: r["probs"].index(max(r["probs"])) for r in read_jsonl(out / row["predictions"])}
        assert said.keys() == gold.keys() and row["n"] == 8
        assert row["correct"] == sum(said[i] == gold[i] for i in gold)
        assert row["accuracy"] == row["correct"] / 8


def test_datasets_and_pandas_read_what_a_run_writes(done, tmp_path):
    from datasets import load_dataset

    out = done[0].folder.parent
    shown = {}
    for name in ("predictions", "weak_labels", "transcripts", "samples", "results", "debates"):
        loaded = load_dataset(str(out), name, cache_dir=str(tmp_path))
        shown[name] = {split: (len(rows), set(rows.column_names)) for split, rows in loaded.items()}
    runs = len(list(out.glob("sciq/predictions/*/test.jsonl")))
    assert shown["predictions"]["test"] == (8 * runs, {"id", "probs"})
    assert shown["weak_labels"]["train"] == (8 * len(RUN_METHODS), {"id", "probs"})
    assert shown["transcripts"]["train_b"][1] == {"id", "sides", "turns", "n_tokens"}
    assert shown["samples"]["test"] == (8, {"id", "text", "label"})
    assert shown["results"]["train"][0] == len(RUN_METHODS) + 4 and shown["debates"]["train"][0] > 0
    alone = load_dataset(
        "json", data_files=str(next(out.glob("sciq/transcripts/*/*/*.jsonl"))), cache_dir=str(tmp_path)
    )
    assert len(alone["train"]) == 8
    steps = pandas.read_json(next(out.glob("sciq/predictions/strong-*/steps.jsonl")), lines=True)
    assert list(steps.step) == list(range(len(steps))) and steps.loss.notna().all() and len(steps) > 0


def test_tensorboard_shows_every_step(done, tmp_path):
    out = done[0].folder.parent
    made = Report(out, read_jsonl(out / "results.jsonl")[:1], [], {}, {}, {}, 0)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # the second time nothing is written
        figures.write_tensorboard(made, tmp_path)
    [folder] = (tmp_path / "sciq").iterdir()
    [_] = folder.iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    steps = read_jsonl((out / made.rows[0]["predictions"]).with_name("steps.jsonl"))
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([s["loss"] for s in steps])


def test_predictions_changed_by_hand_are_not_reported(copied, capsys):
    w2s.write_report([changed(copied, lr=0.5)])
    assert "were made with other settings or inputs" in capsys.readouterr().out
    w2s.write_report([copied])
    assert "were made with other" not in capsys.readouterr().out
    path = copied.folder / "predictions/strong-ours-s0/test.jsonl"
    write_jsonl(path, [r | {"probs": [0.0, 1.0]} for r in read_jsonl(path)])
    with pytest.raises(InputError, match="strong-ours-s0: output test.jsonl was changed"):
        w2s.write_report([copied])


def test_weak_labels_are_the_mean_of_the_members(done):
    folder = done[0].folder
    members = [read_jsonl(folder / f"predictions/weak-debate-d{k}-t3-f0-s0/train_b.jsonl") for k in range(4)]
    labels = read_jsonl(folder / "weak_labels/ours/seed0/train_b.jsonl")
    assert len(labels) == 8 and len({json.dumps(m) for m in members}) == 4
    for i, row in enumerate(labels):
        assert [m[i]["id"] for m in members] == [row["id"]] * 4
        assert row["probs"] == pytest.approx([np.mean([m[i]["probs"][c] for m in members]) for c in (0, 1)])


def test_market_making_argues_against_the_weak_floor(done):
    folder = done[0].folder
    floor = {r["id"]: r["probs"] for r in read_jsonl(folder / "predictions/weak-naive-f0-s0/train_b.jsonl")}
    rows = read_jsonl(folder / "transcripts/market_making/seed0/train_b.jsonl")
    assert [r["sides"][0] for r in rows] == [1 - int(np.argmax(floor[r["id"]])) for r in rows]


# ---- what the student may know ----


def gold_readers(files: dict[str, set[str]]) -> set[str]:
    return {name for name, paths in files.items() if any(p.endswith("train_b.gold.jsonl") for p in paths)}


def test_only_the_ceiling_opens_the_gold_labels_of_train_b(done):
    experiment, files = done
    students = {f"predictions/strong-{m}-s0" for m in RUN_METHODS}
    assert students < files.keys()
    for name in students:  # the hook sees what they do open
        assert str(experiment.file("train_b.jsonl")) in files[name]
        assert f"{experiment.folder}/weak_labels/{name[19:-3]}/seed0/train_b.jsonl" in files[name]
        assert not any("/transcripts/" in p for p in files[name])
    assert gold_readers(files) - {"data"} == {"predictions/strong-ceiling-s0"}  # "data" writes it


def test_the_gold_labels_of_train_b_change_nothing_but_the_ceiling(done, tmp_path):
    other = changed(done[0], out=str(tmp_path / "out"))
    data = other.folder / "data"
    shutil.copytree(done[0].folder / "data", data)
    gold = read_jsonl(data / "train_b.gold.jsonl")
    write_jsonl(data / "train_b.gold.jsonl", [g | {"label": 1 - g["label"]} for g in gold])
    for stage in other.stages():
        assert stage.folder == data or stage.run()
    before, after = products(done[0].folder), products(other.folder)
    differing = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert differing == {"data/train_b.gold.jsonl", "predictions/strong-ceiling-s0/test.jsonl"}


# ---- changes ----


def test_status_says_what_a_changed_flag_makes_stale(done, capsys):
    rows = {r["stage"]: r for r in w2s.states([changed(done[0], lr=0.02)])}
    for name, row in rows.items():
        stale = "/strong-" in name  # weak models have a learning rate of their own
        assert row["state"] == ("stale" if stale else "done") and row["why"] == ["config.lr: 0.01 -> 0.02"] * stale
    assert len(rows) == len(done[1])
    w2s.status([changed(done[0], lr=0.02)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "sciq" and len(shown) == len(rows) + 2
    assert all(
        row["stage"] in line and row["state"] in line for row, line in zip(rows.values(), shown[1:], strict=False)
    )


def test_status_tells_what_runs_and_what_is_left(copied, capsys):
    [folder] = [s.folder for s in copied.stages() if s.folder.name == "strong-ours-s0"]
    (folder / "manifest.json").unlink()
    (folder / "started.json").write_text("{}")

    def row():
        [row] = [r for r in w2s.states([copied]) if r["state"] != "done"]
        return row

    assert (row()["stage"], row()["state"]) == ("sciq/predictions/strong-ours-s0", "missing") and row()["expected"] > 0
    with locked(Path(copied.config.out)):
        assert row()["state"] == "running"
        w2s.status([changed(copied, json=True)])
        assert row() in json.loads(capsys.readouterr().out)


def test_a_longer_and_larger_debate_leaves_the_rest_alone(copied, capsys):
    before = products(copied.folder)
    w2s.run([changed(copied, methods=(*RUN_METHODS, "ensemble_5", "turns_4"))])
    after = products(copied.folder)
    made = {line.split()[1].rstrip(":") for line in capsys.readouterr().out.splitlines() if line.startswith("[")}
    new = {f"sciq/predictions/weak-debate-d{k}-t4-f0-s0" for k in range(4)} | {
        "sciq/predictions/weak-debate-d4-t3-f0-s0"
    }
    for name in ("ensemble_5", "turns_4"):
        new |= {f"sciq/weak_labels/{name}/seed0", f"sciq/predictions/strong-{name}-s0"}
    assert made == new | {"sciq/transcripts/debate"}
    assert not list(copied.folder.rglob("*.stale*"))
    longer = {name for name in before if before[name] != after[name]}
    assert longer == {f"transcripts/debate/seed{k}/{part}.jsonl" for k in range(4) for part in ("train_a", "train_b")}
    for name in longer:
        old, now = (list(map(json.loads, x[name].splitlines())) for x in (before, after))
        assert [{**r, **{k: r[k][:3] for k in ("sides", "turns", "n_tokens")}} for r in now] == old
    points = "".join((copied.folder.parent / f"figures/figure{n}.csv").read_text() for n in (2, 3))
    assert [",".join(line.split(",")[:3]) for line in points.splitlines() if line.startswith("sciq")] == [
        "sciq,1,single", "sciq,4,ours", "sciq,5,ensemble_5", "sciq,3,ours", "sciq,4,turns_4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "file, stage",
    [
        ("weak_labels/ours/seed0/train_b.jsonl", "predictions/strong-ours-s0"),
        ("predictions/weak-debate-d2-t3-f0-s0/train_b.jsonl", "weak_labels/ours/seed0"),
        ("transcripts/debate/seed1/train_a.jsonl", "predictions/weak-debate-d1-t3-f0-s0"),
        ("data/train_b.gold.jsonl", "predictions/strong-ceiling-s0"),
    ],
)
@pytest.mark.parametrize("how", ["another id", "one row less"])
def test_rows_that_do_not_match_the_samples_raise(copied, file, stage, how):
    path = copied.folder / file
    rows = read_jsonl(path)
    write_jsonl(path, rows[1:] if how == "one row less" else [rows[0] | {"id": "another"}, *rows[1:]])
    [spoiled] = [s for s in copied.stages() if s.folder == copied.folder / stage]
    with pytest.raises(ValueError, match="ids do not match"):
        spoiled.run()


def test_heads_alone_give_the_same_rows_on_the_same_debates(copied):
    before = products(copied.folder)
    heads = changed(copied, head_only=True, seeds=(0, 1, 2))
    made = [stage.folder for stage in heads.stages() if stage.run()]
    assert all(folder.is_relative_to(heads.runs) for folder in made) and products(copied.folder) == before
    w2s.write_report([heads])
    rows, whole = (read_jsonl(folder / "results.jsonl") for folder in (heads.runs.parent, copied.folder.parent))
    assert {r["method"] for r in rows} == {r["method"] for r in whole} and {r["seed"] for r in rows} == {0, 1, 2}
    assert {p.name: p.read_text().count("| ours") for p in heads.runs.parent.glob("tables/table*.md")} == dict.fromkeys(
        ("table2.md", "table4.md", "table5.md"), 1
    )
    trained = {p.parent.name: p.read_bytes() for p in heads.runs.glob("predictions/*/test.jsonl")}
    assert len(set(trained.values())) >= len(
        {r["method"] for r in rows} - w2s.ZERO_SHOT.keys()
    )  # losses and weak labels matter


def test_plan_starts_nothing(tmp_path, capsys):
    w2s.COMMANDS["plan"]([small_experiment(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and "sciq" in capsys.readouterr().out


# ---- bad flags ----


@pytest.mark.parametrize(  # by commands that compute nothing if a bad value slips through
    "flags, told",
    [
        (["dance"], ["dance", "run", "plan", "status", "report"]),
        (["report", "--preset", "huge"], ["huge", "smoke", "tiny", "small", "paper"]),
        (["status", "--tasks", "sciq", "chess"], ["chess", "sciq", "boolq"]),
        (["status", "--methods", "oracle"], ["oracle", "finetune", "ours"]),
        (["status", "--seed", "0"], ["--seed"]),
        (["status", "--seeds", "0", "-1"], ["--seeds", "-1"]),
        (["status", "--lr", "fast"], ["--lr", "fast"]),
        (["status", "--epochs", "0"], ["--epochs", "0"]),
        (["status", "--top-p", "1.2"], ["--top-p", "1.2"]),
        (["status", "--weak-lr", "0"], ["--weak-lr", "0"]),
        (["plan", "--max-sample-tokens", "0"], ["--max-sample-tokens", "0"]),
        (["status", "--data-dir", "nowhere"], ["--data-dir", "nowhere"]),
        (["run", "--weak", "nowhere"], ["nowhere", "random-small", "smollm2-135m"]),
        (["run", "--strong", "random-large:9"], ["random-large", "9", "2 layers"]),
        (["report"], ["--out", "w2s.py run"]),
    ],
)
def test_bad_flags_end_in_one_line_before_anything_starts(flags, told, tmp_path):
    given = (
        flags if "--preset" in flags or flags == ["dance"] else [*flags, "--preset", "smoke", "--out", tmp_path / "out"]
    )
    end = subprocess.run([sys.executable, ROOT / "w2s.py", *given], capture_output=True, text=True, cwd=tmp_path)
    assert (end.returncode, end.stderr.count("\n")) == (2, 1), end.stderr
    assert end.stderr.startswith("error: ") and all(word in end.stderr for word in told)
    assert list(tmp_path.iterdir()) == []
