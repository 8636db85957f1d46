"""w2s.py: what is compared, what a run writes, what reads what, and that nothing is done twice."""

import fcntl
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import METHODS, ROOT, SMOKE, products, record, run

import debate
import steps
import train
import w2s
from common import ALONE, read_jsonl, write_jsonl
from model import Classifier, ModelSpec
from report import stats
from train import TrainConfig

PAPER = json.loads((ROOT / "data/paper.json").read_text())
REFERENCES = ("weak_floor", "strong_ceiling")

# ---- the tables and figures of the paper (paper.md) ----

ONE, FOUR = [(0, 0)], [(k, 0) for k in range(4)]  # debate seed, finetuning seed
OURS = ("debate", FOUR, "xent")  # what the judges read, the members, the student's loss
TABLE2 = {"finetune": ("nothing", ONE, "xent"), "ours": OURS}
TABLE2 |= {"finetune_aux": ("nothing", ONE, "logconf"), "finetune_pro": ("nothing", ONE, "product")}
TABLE4 = {p: (p, FOUR, "xent") for p in ("consultancy", "market_making")} | {"ours": OURS}
TABLE5 = {"single": ("debate", ONE, "xent"), "ours": OURS}
TABLE5 |= {"finetune_ensembles": ("debate", [(0, j) for j in range(4)], "xent")}
ROWS = {"table2": TABLE2, "table4": TABLE4, "table5": TABLE5}
POINTS = {f"figure2:{n}": (3, [(k, 0) for k in range(n)]) for n in (1, 3, 4, 5, 6)}  # turns, members
POINTS |= {f"figure3:{n}": (n, FOUR) for n in (3, 4, 5, 6)}


def shown_in(place: str) -> dict:
    return {name: m for name, m in w2s.METHODS.items() if place in m.shown}


def test_the_papers_rows_and_points_are_among_the_methods():
    for table, rows in ROWS.items():
        for name, row in rows.items():
            m = shown_in(table)[name]
            assert (m.reads, list(m.members), m.loss, m.turns) == (*row, 3)
    for place, point in POINTS.items():
        [m] = shown_in(place).values()
        assert (m.turns, list(m.members), m.reads, m.loss) == (*point, "debate", "xent")


def test_the_papers_numbers_are_copied_right():
    assert PAPER.keys() - {"source", "tasks"} == set().union(*ROWS.values()) | set(REFERENCES)
    assert PAPER["ours"] == [[92.6, 76.5], [88.7, 69.2], [88.8, 56.5], [50.2, 70.0]]
    assert [cell[0] for cell in PAPER["weak_floor"]] == [90.0, 86.0, 87.5, 48.8]
    for name in PAPER.keys() - {"source", "tasks", *REFERENCES}:
        for i, (accuracy, pgr) in enumerate(PAPER[name]):  # PGR follows from the accuracies, to their rounding
            weak, ceiling = (PAPER[bound][i][0] for bound in REFERENCES)
            assert 100 * stats.pgr(weak, accuracy, ceiling) == pytest.approx(pgr, abs=0.06)


# ---- which stages there are ----


def test_methods_share_all_that_they_can(status, tmp_path):
    """One folder of debates and one judge per seed, turns and replicate serve every row and point."""
    methods = {name for place in (*ROWS, *POINTS) for name in shown_in(place) if w2s.METHODS[name].reads != "evidence"}
    names = status(tmp_path / "out", "--methods", *methods, "--seeds", 0, 1).keys()
    protocols = {n for n in names if "/transcripts/" in n}
    assert protocols == {f"sciq/transcripts/{p}" for p in debate.PROTOCOLS}
    judges = [n for n in names if "/weak-debate-" in n]
    # six debates at three turns, four at each other number, three more finetunings, and the single judge's of one turn
    assert len(judges) == 2 * (6 + 3 * 4 + 3 + 1)
    students = {n for n in names if "/strong-" in n}
    assert students == {f"sciq/predictions/strong-{m}-s{seed}" for m in (*methods, "ceiling") for seed in (0, 1)}


# ---- what is done once ----


def test_a_second_run_makes_nothing(smoke, status, capsys):
    n = len(status(smoke))
    printed = (smoke.parent / "printed.txt").read_text()
    assert f"{n} of {n} stages made" in printed and "### Table 2" in printed
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("manifest.json")}
    assert run("w2s", *SMOKE, smoke) == 0 and f"\n0 of {n} stages made" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in smoke.rglob("manifest.json")} == before
    for path in before:
        parts = {"config", "inputs", "outputs", "commit", "device", "versions", "seconds"}
        assert parts <= json.loads(path.read_text()).keys()
    run("w2s", "status", *SMOKE[1:], smoke)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"{n} done, 0 running, 0 stale, 0 missing" and len(shown) == n + 2


def test_status_tells_what_runs_and_what_is_left(copied, status):
    student = copied / "sciq/predictions/strong-ours-s0"
    manifest = json.loads((student / "manifest.json").read_text())
    (student / "started.json").write_text(json.dumps({part: manifest[part] for part in ("config", "inputs", "code")}))
    (student / "manifest.json").unlink()

    def left() -> tuple:
        [row] = [row for row in status(copied).values() if row["state"] != "done"]
        return row["stage"], row["state"], row["expected"] > 0

    assert left() == ("sciq/predictions/strong-ours-s0", "missing", True)
    with open(copied / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert left() == ("sciq/predictions/strong-ours-s0", "running", True)


def test_a_longer_and_larger_debate_leaves_the_rest_alone(copied, status, capsys):
    before = products(copied)
    added = ("ensemble_5", "turns_4")
    for names in (added[:1], added[1:], added):
        assert run("w2s", *SMOKE, copied, "--methods", *METHODS, *names) == 0
    made = set(re.findall(r"^\[.*\] (\S+): ", capsys.readouterr().out, re.MULTILINE))
    wanted = {f"predictions/weak-debate-d{k}-t4-f0-s0" for k in range(4)}
    wanted |= {"transcripts/debate", "predictions/weak-debate-d4-t3-f0-s0"}
    wanted |= {f"weak_labels/{name}/seed0" for name in added} | {f"predictions/strong-{name}-s0" for name in added}
    assert made == {f"sciq/{name}" for name in wanted} and not list(copied.rglob("stale"))
    after = products(copied)
    cost = json.loads((copied / "sciq/transcripts/debate/manifest.json").read_text())
    assert sorted(cost["tokens"]) == list("01234")  # also of the sets that were not continued this time
    longer = {name for name in before if name.startswith("sciq/") and before[name] != after[name]}
    files = {f"sciq/transcripts/debate/seed{k}/{part}.jsonl" for k in range(4) for part in ("train_a", "train_b")}
    assert longer == files | {"sciq/transcripts/debate/manifest.json"}
    for name in files:
        old, now = (list(map(json.loads, x[name].splitlines())) for x in (before, after))
        assert [{**r, **{k: r[k][:3] for k in ("sides", "turns", "n_tokens")}} for r in now] == old
    points = "".join((copied / f"figures/figure{n}.csv").read_text() for n in (2, 3))
    found = [line.split(",")[1:3] for line in points.splitlines() if line.startswith("sciq")]
    assert found == [["1", "single"], ["4", "ours"], ["5", "ensemble_5"], ["3", "ours"], ["4", "turns_4"]]
    assert {row["state"] for row in status(copied).values()} == {"done"}  # debates may hold more than is asked for


def test_points_that_the_paper_does_not_draw_are_run_where_they_are_named():
    def chosen(**given) -> set[str]:
        return set(w2s.Experiment(w2s.Config.of("boolq", preset="smoke", **given), "boolq").methods())

    assert "ours" in chosen() and not chosen() & {"turns_4", "ensemble_5", "evidence"}
    assert chosen(methods=("turns_4",)) == {"turns_4"}


READ_BY = [
    ("weak_labels/ours/seed0/train_b.jsonl", "strong-ours-s0"),
    ("predictions/weak-debate-d2-t3-f0-s0/train_b.jsonl", "weak_labels/ours/seed0"),
    ("transcripts/debate/seed1/train_a.jsonl", "weak-debate-d1-t3-f0-s0"),
    ("data/train_b.gold.jsonl", "strong-ceiling-s0"),
]


@pytest.mark.parametrize("file, stage", READ_BY)
@pytest.mark.parametrize("change", [lambda rows: rows[1:], lambda rows: [rows[0] | {"id": "another"}, *rows[1:]]])
def test_rows_that_do_not_match_the_samples_end_the_run(copied, file, stage, change, capsys):
    write_jsonl(copied / "sciq" / file, change(read_jsonl(copied / "sciq" / file)))
    record(copied / "sciq" / file)
    assert run("w2s", *SMOKE, copied) == 2
    assert f"{file}: ids do not match" in capsys.readouterr().err
    [begun] = [p.parent.as_posix() for p in copied.rglob("started.json")]
    assert begun.endswith(stage)


def test_what_two_tasks_have_in_common_is_computed_once(tmp_path):
    def runs(out: Path, *tasks: str) -> dict[str, tuple[bytes, bool]]:
        """Predictions of the last task, and whether they are a copy."""
        flags = ["--limit-train", 40, "--methods", "finetune", "single", "--tasks", *tasks]
        assert run("w2s", *SMOKE, out, *flags) == 0
        files = (out / tasks[-1]).glob("predictions/*/t*.jsonl")
        copied = {f: "copied_from" in f.with_name("manifest.json").read_text() for f in files}
        return {f.parent.name: (f.read_bytes(), copy) for f, copy in copied.items()}

    both, alone = runs(tmp_path / "both", "places_evidence", "places"), runs(tmp_path / "alone", "places")
    assert {name: rows for name, (rows, _) in both.items()} == {name: rows for name, (rows, _) in alone.items()}
    shared = {"weak-naive-f0-s0", "strong-ceiling-s0", "strong-finetune-s0", "zero-shot-weak", "zero-shot-strong"}
    assert {name for name, (_, copy) in both.items() if copy} == shared


# ---- a task file ----

OWN = [x for x in SMOKE if x not in ("--tasks", "sciq")]


def own_rows(evidence: str = "it ends in {}") -> list[dict]:
    """Sixty statements with evidence."""
    return [{"text": f"{n} is even", "label": 1 - n % 2, "evidence": evidence.format(n % 10)} for n in range(60)]


def test_a_task_file_is_a_task_like_the_others(copied, tmp_path, capsys):
    """Beside a finished run of another task, which stays as it is."""
    file, before = tmp_path / "1st-task.jsonl", products(copied / "sciq")
    write_jsonl(file, [{"wording": {"sides": ["odd", "even"]}}, *own_rows()])
    flags = [*OWN[1:], copied, "--task-file", file, "--methods", "finetune", "ours"]

    def not_done() -> set[str]:
        capsys.readouterr()
        assert run("w2s", "status", "--json", *flags, "--tasks", "sciq") == 0
        rows = json.loads(capsys.readouterr().out)
        return {row["stage"].removeprefix("1st-task/") for row in rows if row["state"] != "done"}

    assert run("w2s", "plan", *flags) == 0 and "1st-task" in capsys.readouterr().out
    assert run("w2s", "run", *flags) == 0 and not not_done()
    assert run("w2s", "run", *flags) == 0 and "\n0 of " in capsys.readouterr().out
    results, debates = (read_jsonl(copied / f"{name}.jsonl") for name in ("results", "debates"))
    assert {(r["task"], r["n"]) for r in results} == {("1st-task", 8)}
    assert {tuple(r["sides"]) for r in debates} == {("odd", "even")}
    assert "| 1st-task |" in (copied / "tables/table2.md").read_text()
    assert (copied / "verdict.md").read_text().startswith("1st-task: ")
    assert "Debater A (even)" in debate.transcript_text("1st-task", "debate", [1], ["x"])
    write_jsonl(file, own_rows())
    asked = {"transcripts/debate", *(f"predictions/zero-shot-{who}" for who in ("weak", "strong", "evidence"))}
    assert not_done() == {"data", *asked, *(f"predictions/weak-debate-d{k}-t3-f0-s0" for k in range(4))}
    assert products(copied / "sciq") == before


# ---- what a run writes ----


def test_tables_are_the_same_bytes_whatever_the_clock_says(smoke, copied):
    for path in copied.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"seconds": manifest["seconds"] + 100}))
    shutil.rmtree(copied / "tables")
    assert run("w2s", "report", *SMOKE[1:], copied) == 0
    assert products(copied) == products(smoke)
    tables = {"table2.md", "table4.md", "table5.md", "calibration.md", "debates.md", "cost.md"}
    assert {p.name for p in copied.glob("tables/*.md")} == tables


def test_the_tables_have_the_papers_rows_and_numbers(smoke):
    labels = dict(zip(REFERENCES, ("weak performance", "strong ceiling"), strict=True))
    labels |= {name: m.label for name, m in w2s.METHODS.items()}
    for table, methods in ROWS.items():
        text = (smoke / f"tables/{table}.md").read_text()
        rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
        for method in (*methods, *(REFERENCES if table == "table2" else ())):
            (accuracy, pgr), row = PAPER[method][0], rows[labels[method]]
            assert row[2] == f"{accuracy:.1f}" and row[4].strip() == ("" if pgr is None else f"{pgr:.1f}")
            assert ("[" in row[1]) == (method in (*METHODS, *REFERENCES))


def test_datasets_and_pandas_read_what_a_run_writes(smoke, tmp_path):
    from datasets import load_dataset

    shown = {}
    for name in ("predictions", "weak_labels", "transcripts", "samples", "results", "debates"):
        loaded = load_dataset(str(smoke), name, cache_dir=str(tmp_path))
        shown[name] = {split: (len(rows), set(rows.column_names)) for split, rows in loaded.items()}
    runs = len(list(smoke.glob("sciq/predictions/*/test.jsonl")))
    assert shown["predictions"]["test"] == (8 * runs, {"id", "probs"})
    assert shown["weak_labels"]["train"] == (9 * len(METHODS), {"id", "probs"})
    assert shown["transcripts"]["train_b"][1] == {"id", "sides", "turns", "n_tokens"}
    assert shown["samples"]["test"] == (8, {"id", "text", "label"})
    assert shown["results"]["train"][0] == len(METHODS) + 4 and shown["debates"]["train"][0] > 0
    steps = pandas.read_json(next(smoke.glob("sciq/predictions/strong-*/steps.jsonl")), lines=True)
    assert list(steps.step) == [0, 1] and steps.loss.notna().all()


def test_tensorboard_shows_every_step(copied):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for method in METHODS:
        shutil.rmtree(copied / f"sciq/predictions/strong-{method}-s0")
    assert run("w2s", *SMOKE, copied, "--tensorboard") == 0
    for method in METHODS:
        folder = copied / f"tensorboard/sciq/strong-{method}-s0"
        events = EventAccumulator(str(folder)).Reload()
        steps = read_jsonl(copied / f"sciq/predictions/strong-{method}-s0/steps.jsonl")
        assert [e.value for e in events.Scalars("loss")] == pytest.approx([s["loss"] for s in steps])


def test_predictions_changed_by_hand_are_not_reported(copied, capsys):
    for flags, told in ((["--lr", 0.5], True), ([], False)):
        assert run("w2s", "report", *SMOKE[1:], copied, *flags) == 0
        assert ("were made with other settings or inputs" in capsys.readouterr().out) == told
    path = copied / "sciq/predictions/strong-ours-s0/test.jsonl"
    write_jsonl(path, [r | {"probs": [0.0, 1.0]} for r in read_jsonl(path)])
    assert run("w2s", "report", *SMOKE[1:], copied) == 2
    assert "strong-ours-s0: output test.jsonl was changed" in capsys.readouterr().err


def test_heads_alone_give_the_same_rows_on_the_same_debates(copied):
    before = products(copied)
    assert run("w2s", *SMOKE, copied, "--head-only", "--seeds", 0, 1, 2) == 0
    after = products(copied)
    assert {name: after[name] for name in before} == before
    rows, full = read_jsonl(copied / "heads/results.jsonl"), read_jsonl(copied / "results.jsonl")
    assert {(r["method"], r["seed"]) for r in rows} == {(r["method"], seed) for r in full for seed in (0, 1, 2)}
    tables = {p.name: p.read_text().count("| ours") for p in copied.glob("heads/tables/table*.md")}
    assert tables == {"table2.md": 1, "table4.md": 1, "table5.md": 1}
    trained = {p.read_bytes() for p in copied.glob("heads/sciq/predictions/strong-*-s0/test.jsonl")}
    assert len(trained) == len(METHODS) + 1  # losses and weak labels matter


def test_heads_alone_learn_on_the_pretrained_model_whatever_was_finetuned_before(tmp_path, monkeypatch):
    files, held, learned_on = steps.Files(tmp_path, "sciq"), steps.Held(), []
    write_jsonl(files.samples("train_a"), [{"id": str(i), "text": f"Q {i}", "label": i % 2} for i in range(4)])
    settings = TrainConfig(dtype="float32", kernels="reference", lr=1e-2, epochs=4, batch_size=2)
    run = steps.Run("x", ModelSpec.parse("random-small"), settings, part="train_a", predicts=(), heads=True)
    finetuned = held.classifier(run.model, settings, ALONE)
    train.finetune(finetuned, ["Q 1", "Q 2"], torch.eye(2), settings)
    monkeypatch.setattr(
        "heads.finetune_and_predict",
        lambda classifier, *_: [learned_on.append(classifier.features([[1]]))],
    )
    steps.make_head(files, run, steps.read_nothing, lambda: [run], tmp_path, ALONE, held)
    pretrained = Classifier(run.model, 2, torch.float32, "reference")
    assert torch.equal(learned_on[0], pretrained.features([[1]]))


def test_heads_alone_of_one_task_are_not_those_of_another(tmp_path):
    flags = ["run", "--preset", "smoke", "--head-only", "--seeds", 0, "--limit-train", 18, "--limit-test", 8]
    for out, tasks in {"both": ["sciq", "boolq"], "alone": ["boolq"]}.items():
        assert run("w2s", *flags, "--methods", "finetune", "--tasks", *tasks, "--out", tmp_path / out) == 0
    both, alone = (
        {p.parent.name: p.read_bytes() for p in tmp_path.glob(f"{x}/heads/boolq/predictions/*/test.jsonl")}
        for x in ("both", "alone")
    )
    assert both == alone and len(alone) == 3  # floor, ceiling, student


def test_names_that_the_readme_gives_are_in_the_code():
    code = "".join(p.read_text() for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(p.relative_to(ROOT).parts))
    names = set(re.findall(r"`([A-Za-z_][\w.]*)`", (ROOT / "README.md").read_text()))
    missing = {n for n in names if n.rpartition(".")[2] not in code and not (ROOT / n).exists()}
    assert len(names) > 40 and not missing


# ---- who reads what ----


def test_weak_labels_are_the_mean_of_the_members(smoke):
    members = [read_jsonl(smoke / f"sciq/predictions/weak-debate-d{k}-t3-f0-s0/train_b.jsonl") for k in range(4)]
    labels = read_jsonl(smoke / "sciq/weak_labels/ours/seed0/train_b.jsonl")
    assert len(labels) == 9 and len({json.dumps(m) for m in members}) == 4
    for i, row in enumerate(labels):
        assert [m[i]["id"] for m in members] == [row["id"]] * 4
        assert row["probs"] == pytest.approx(np.mean([m[i]["probs"] for m in members], axis=0))


def test_the_debate_of_another_question_costs_what_ones_own_does(smoke):
    cost = {
        r["method"]: r["supervision_tokens"] for r in read_jsonl(smoke / "results.jsonl") if "supervision_tokens" in r
    }
    assert cost["other_debate"] == pytest.approx(cost["ours"], rel=0.05) and cost["no_argument"] < 0.8 * cost["ours"]


def test_market_making_argues_against_the_weak_floor(smoke):
    floor = {r["id"]: r["probs"] for r in read_jsonl(smoke / "sciq/predictions/weak-naive-f0-s0/train_b.jsonl")}
    rows = read_jsonl(smoke / "sciq/transcripts/market_making/seed0/train_b.jsonl")
    assert [r["sides"][0] for r in rows] == [1 - int(np.argmax(floor[r["id"]])) for r in rows]


def test_the_debate_of_another_question_is_that_of_the_next_sample(smoke):
    files, about = steps.Files(smoke / "sciq", "sciq"), {"debate_seed": 1, "turns": 2}
    of = {r: steps.READ[r](steps.Run("", None, None, r, **about), files, "train_b") for r in ("debate", "other_debate")}
    questions = [r["text"] for r in read_jsonl(files.samples("train_b"))]
    said = [r["text"].removesuffix(q) for r, q in zip(of["debate"], questions, strict=True)]
    wanted = [s + q for s, q in zip(said[1:] + said[:1], questions, strict=True)]
    assert [r["text"] for r in of["other_debate"]] == wanted
    assert len(set(said)) == len(said)


STUDENTS = [
    ("ceiling", "data/train_b.gold.jsonl", "xent"),
    ("ours", "weak_labels/ours/seed0/train_b.jsonl", "xent"),
    ("finetune_aux", "weak_labels/finetune_aux/seed0/train_b.jsonl", "logconf"),
]


@pytest.mark.parametrize("student, labels, loss", STUDENTS)
def test_a_student_is_what_train_py_makes_of_plain_questions_and_its_labels(smoke, student, labels, loss, tmp_path):
    labels = {r["id"]: r for r in read_jsonl(smoke / "sciq" / labels)}
    write_jsonl(tmp_path / "train.jsonl", [r | labels[r["id"]] for r in read_jsonl(smoke / "sciq/data/train_b.jsonl")])
    files = ["--train", tmp_path / "train.jsonl", "--test", smoke / "sciq/data/test.jsonl", "--out", tmp_path / "out"]
    settings = ["--model", "random-large", "--loss", loss, "--lr", 0.003, "--batch-size", 8, "--epochs", 1]
    assert run("train", *files, *settings) == 0
    predictions = smoke / f"sciq/predictions/strong-{student}-s0/test.jsonl"
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == predictions.read_bytes()


def test_the_gold_labels_of_train_b_and_test_change_nothing_but_the_ceiling(smoke, tmp_path):
    """All the rest is the same to the byte, by another process and in another place."""
    shutil.copytree(smoke / "sciq/data", tmp_path / "sciq/data")
    for path in (tmp_path / "sciq/data/train_b.gold.jsonl", tmp_path / "sciq/data/test.jsonl"):
        write_jsonl(path, [r | {"label": 1 - r["label"]} for r in read_jsonl(path)])
        record(path)
    assert run("w2s", *SMOKE, tmp_path) == 0
    old, new = ({n: f for n, f in products(out).items() if n.endswith(".jsonl")} for out in (smoke, tmp_path))
    assert old.keys() == new.keys()
    differ = {"data/train_b.gold.jsonl", "data/test.jsonl", "predictions/strong-ceiling-s0/test.jsonl"}
    assert {n for n in old if old[n] != new[n]} == {f"sciq/{n}" for n in differ}


READS_EVIDENCE = ("transcripts", "evidence.jsonl", "weak-debate", "weak-evidence", "labels/ours", "labels/evidence",
                  "strong-ours", "strong-evidence", "zero-shot-evidence")  # fmt: skip


@pytest.mark.parametrize("flags", ["--tasks sciq_evidence --data-dir data", "--task-file own.jsonl"])
def test_evidence_reaches_those_who_debate_and_the_bound_alone(flags, tmp_path, monkeypatch):
    """With other passages for all samples, nothing else changes by a byte."""
    monkeypatch.chdir(tmp_path)
    made = []
    for shift, passage in enumerate(("it ends in {}", "THE LAST OF ITS DIGITS IS {}, AS ALL CAN SEE")):
        write_jsonl(Path("own.jsonl"), own_rows(passage))
        for split in ("train", "test"):
            rows = [r for r in read_jsonl(ROOT / f"data/tiny/sciq/{split}.jsonl") if r["support"]]
            exchanged = [r | {"support": rows[i - shift]["support"]} for i, r in enumerate(rows)]
            write_jsonl(Path(f"data/sciq/{split}.jsonl"), exchanged)
        methods = ("finetune", "no_argument", "ours", "evidence")
        assert run("w2s", *OWN, f"out{shift}", *flags.split(), "--methods", *methods) == 0
        made.append({n: f for n, f in products(Path(f"out{shift}")).items() if n.endswith(".jsonl")})
    one, two = made
    assert one.keys() == two.keys()
    assert {n for n in one if one[n] != two[n]} == {n for n in one if any(word in n for word in READS_EVIDENCE)}
