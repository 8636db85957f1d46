"""Tables and figures from predictions on disk: no model is loaded and nothing is trained.

A row of results.jsonl is one finished run with its digest; every number of the tables is the mean of such rows, with the
intervals and tests of stats.py. PGR is blank where the ceiling's lead over the floor is not clear of zero.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import plots
import stats
from common import ROOT, InputError, align_by_id, read_jsonl, write_jsonl, write_text
from stages import read_manifest

OVERVIEW = ("weak_floor", "finetune", "naive_ensemble", "no_argument", "ours", "evidence", "strong_ceiling")
TABLES = {"table2": "Table 2. Main result", "table4": "Table 4. Oversight protocols", "table5": "Table 5. Ensembles"}
FIGURES = {"figure2": "ensemble size", "figure3": "debate turns"}


def result_row(task: str, method: str, seed: int, folder: Path, run: Path, supervisor: Path | None) -> dict:
    """How a finished run does on the test split, and what it cost. One of the readers of train_b's gold labels.

    Of a student also how good its weak labels were, and on train_b how often it is wrong where its label was wrong (error
    inheritance), right there (correction), and wrong where its label was right (new errors).
    """
    manifest = read_manifest(run)
    probs, labels = scored(run / "test.jsonl", folder / "data/test.jsonl")
    row = {
        "task": task, "method": method, "seed": seed, **quality(probs, labels),
        "correct": int((probs.argmax(1) == labels).sum()), "n": len(labels), "loss": manifest["config"]["loss"],
    }  # fmt: skip
    if supervisor:
        gold = folder / "data/train_b.gold.jsonl"
        weak, labels = scored(supervisor / "train_b.jsonl", gold)
        student, _ = scored(run / "train_b.jsonl", gold)
        wrong, right_label = student.argmax(1) != labels, weak.argmax(1) == labels
        row |= {f"weak_label_{k}": v for k, v in quality(weak, labels).items()}
        for name, what, where in (
            ("error_inheritance", wrong, ~right_label), ("correction", ~wrong, ~right_label), ("new_errors", wrong, right_label),
        ):  # fmt: skip
            row[name] = round(float(what[where].mean()), 6) if where.any() else None
    tokens, predictions = manifest.get("train_tokens", 0), str(run.relative_to(folder.parent) / "test.jsonl")
    return row | origin(manifest) | {"tokens": tokens, "predictions": predictions}


def origin(manifest: dict) -> dict:
    """What a row says of where it comes from."""
    digests = {part: digest_of(manifest[part]) for part in ("config", "inputs")}
    return digests | {k: manifest[k] for k in ("commit", "device", "seconds")}


def quality(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, calibration, and how often class 1 is predicted: 0 or 1 is a constant prediction."""
    what = {
        "accuracy": (probs.argmax(1) == labels).mean(), "brier": stats.brier(probs, labels),
        "ece": stats.ece(probs, labels), "share_of_1": probs.argmax(1).mean(),
    }  # fmt: skip
    return {name: round(float(x), 6) for name, x in what.items()}


def digest_of(thing: dict) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def name_of(row: dict) -> str:
    """What numbers refer to a row by: the digest of all that it says but how long it took."""
    return digest_of({k: v for k, v in row.items() if "seconds" not in k})


def scored(predictions: Path, gold: Path) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, K] and labels [N], in the order of the gold file."""
    labels = read_jsonl(gold)
    rows = align_by_id(read_jsonl(predictions), [r["id"] for r in labels], str(predictions))
    if not all(isinstance(r.get("probs"), list) and r["probs"] for r in rows) or any("label" not in g for g in labels):
        raise InputError(
            f"{predictions} with {gold}: not probabilities and labels; `python w2s.py status` says what is stale"
        )
    return np.array([r["probs"] for r in rows]), np.array([r["label"] for r in labels])


def debate_row(reading: dict, out: Path) -> dict:
    """How the debates of train_b went by the verdict of one weak model that reads them, and what they changed.

    Lengths are in tokens of the debater; the quarters are of equal size, the shortest transcripts first.
    """
    said, turns = read_jsonl(out / reading["transcripts"]), reading["turns"]
    gold = out / reading["task"] / "data/train_b.gold.jsonl"
    (before, labels), (after, _) = scored(out / reading["before"], gold), scored(out / reading["predictions"], gold)
    said = align_by_id(said, [r["id"] for r in read_jsonl(gold)], reading["transcripts"])
    length = np.array([sum(r["n_tokens"][:turns]) for r in said])
    first = np.array([r["sides"][0] for r in said])
    was, verdict = before.argmax(1), after.argmax(1)
    right = verdict == labels
    shares = {
        "honest_wins": right, "first_speaker_wins": verdict == first, "changed": was != verdict,
        "to_right": (was != verdict) & right, "to_wrong": (was != verdict) & ~right,
    }  # fmt: skip
    for n, quarter in enumerate(np.array_split(np.argsort(length, kind="stable"), 4), 1):
        shares[f"accuracy_quarter_{n}"] = right[quarter]
    row = {name: round(float(x.mean()), 6) if len(x) else None for name, x in shares.items()}
    return reading | {"n": len(labels), **row, "mean_tokens": round(float(length.mean()), 3)}


# ---- tables ----


class Number(NamedTuple):
    """A number as it is shown: its text, the field of the rows that it is the mean of, and the digests of these rows."""

    text: str
    field: str
    rows: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


class Part(NamedTuple):
    """A part of a table, of one task: the heads of the columns, lines of text or Number, and what is said below."""

    head: list[str]
    lines: list[list]
    foot: list = []


class Table(NamedTuple):
    """Written as tables/<name>.md and into report.html."""

    name: str
    title: str
    parts: list[Part]
    note: str


def markdown(table: Table) -> str:
    lines = [f"### {table.title}", ""]
    for part in table.parts:
        lines += ["| " + " | ".join(part.head) + " |", "|---" * len(part.head) + "|"]
        lines += ["| " + " | ".join(map(str, line)) + " |" for line in part.lines]
        lines += ["", "".join(map(str, part.foot)), ""] if part.foot else [""]
    return "\n".join([*lines, table.note]) + "\n"


def table_of_methods(name: str, title: str, methods: dict[str, str], summary: dict[str, dict]) -> Table:
    """One of the paper's tables: a part a task, a row a method; ours with its interval, beside the paper's."""
    paper, parts = json.loads((ROOT / "data/paper.json").read_text()), []
    head = ["accuracy %", "paper", "PGR %", "paper", "minus finetune", "p", "weak labels %"]
    for task, cells in summary.items():
        lines = []
        for method, label in methods.items():
            c, theirs = cells.get(method, {}), (None, None)
            if task in paper["tasks"] and method in paper:
                theirs = paper[method][paper["tasks"].index(task)]
            if not c and theirs == (None, None):
                continue  # neither run nor in the paper
            paper_accuracy, paper_pgr = ("" if x is None else f"{x:.1f}" for x in theirs)
            lines.append([label, percent(c, "accuracy"), paper_accuracy, percent(c, "pgr", 0), paper_pgr])
            p = Number(f"{c['p_holm']:.2g}", "p_holm", c["lead_rows"]) if "p_holm" in c else ""
            lines[-1] += [percent(c, "lead"), p, percent(c, "weak_label_accuracy")]
        ceiling, foot = cells.get("strong_ceiling", {}), []
        if "gap" in ceiling:
            blank = "." if ceiling["gap_ci"][0] > 0 else ": not clear of zero, so PGR is blank."
            foot = [f"Seeds: {ceiling['seeds']}. Ceiling minus floor ", percent(ceiling, "gap"), blank]
        flat = [methods[m] for m in methods if cells.get(m, {}).get("constant")]
        if flat:
            foot += [f" The same answer to every test item, in at least one seed: {', '.join(flat)}."]
        parts.append(Part([task, *head], lines, foot))
    note = (
        "Accuracy on the test split, PGR and the difference from finetune: ours [95% interval over seeds and items], then "
        "the paper's. p: exact sign-flip test of that difference on these seeds, adjusted by Holm for all methods of the "
        "task. Weak labels: their accuracy on train_b."
    )
    return Table(name, title, parts, note)


def percent(cell: dict, what: str, digits: int = 1) -> Number | str:
    if cell.get(what) is None:
        return ""
    sign = "+" if what in ("lead", "gap") else ""
    text = f"{100 * cell[what]:{sign}.{digits}f}"
    if f"{what}_ci" in cell:
        text += " [{}, {}]".format(*(f"{100 * x:{sign}.{digits}f}" for x in cell[f"{what}_ci"]))
    return Number(text, what, cell.get(f"{what}_rows", cell["rows"]))


def mean_of(rows: list[dict], field: str, form: str = "{:.1f}", scale: float = 100) -> Number | str:
    """The mean over rows of a field; empty where a row has none."""
    values = [r.get(field) for r in rows]
    if None in values:
        return ""
    return Number(form.format(scale * sum(values) / len(values)), field, tuple(r["digest"] for r in rows))


def table_of_means(name: str, title: str, groups: dict, columns: dict[str, tuple], note: str) -> Table:
    """`groups`: task -> name of the line -> rows; `columns`: head -> arguments of `mean_of`."""
    parts = [
        Part(
            [task, *columns], [[line, *(mean_of(rows, *how) for how in columns.values())] for line, rows in of.items()]
        )
        for task, of in groups.items()
    ]
    return Table(name, title, parts, note)


COST = {
    "seconds, student": ("seconds", "{:.0f}", 1), "seconds, supervision": ("supervision_seconds", "{:.0f}", 1),
    "tokens trained": ("tokens", "{:,.0f}", 1), "tokens, supervision": ("supervision_tokens", "{:,.0f}", 1),
}  # fmt: skip
CALIBRATION = {
    "Brier": ("brier", "{:.3f}", 1), "ECE %": ("ece",), "says 1, %": ("share_of_1",),
    "weak labels: Brier": ("weak_label_brier", "{:.3f}", 1), "ECE % ": ("weak_label_ece",),
    "says 1, % ": ("weak_label_share_of_1",), "error inheritance %": ("error_inheritance",),
    "correction %": ("correction",), "new errors %": ("new_errors",),
}  # fmt: skip
DEBATES = {
    "honest side wins %": ("honest_wins",), "first speaker wins %": ("first_speaker_wins",),
    "verdict changed %": ("changed",), "to right %": ("to_right",), "to wrong %": ("to_wrong",),
    "shortest quarter %": ("accuracy_quarter_1",), "second %": ("accuracy_quarter_2",),
    "third %": ("accuracy_quarter_3",), "longest %": ("accuracy_quarter_4",), "tokens": ("mean_tokens", "{:.0f}", 1),
}  # fmt: skip


def grouped(rows: list[dict], line: Callable[[dict], str]) -> dict[str, dict[str, list[dict]]]:
    """task -> name of the line -> rows."""
    groups: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        groups.setdefault(row["task"], {}).setdefault(line(row), []).append(row)
    return groups


def tables(rows: list[dict], debates: list[dict], summary: dict, labels: dict, shown: dict) -> list[Table]:
    """The paper's tables, then cost, calibration, and what the debates did."""
    out = []
    for name, title in TABLES.items():
        methods = [m for m, places in shown.items() if name in places]
        if name == "table2":
            methods = [*stats.ZERO_SHOT, "weak_floor", *methods, "strong_ceiling"]
        out.append(table_of_methods(name, title, {m: labels[m] for m in methods}, summary))
    of = grouped(rows, lambda r: labels[r["method"]])
    note = "Means over seeds, as if the method were run alone; supervision is its weak models and its share of the debates."
    out.append(table_of_means("cost", "Cost of one seed", of, COST, note))
    note = (
        "Means over seeds. Brier and ECE of the probabilities on the test split and, of the weak labels, on train_b. There "
        "also: error inheritance, how often the student is wrong where its label was wrong; correction, right there; new "
        "errors, wrong where its label was right."
    )
    out.append(table_of_means("calibration", "Calibration, and what students inherit", of, CALIBRATION, note))
    if debates:
        of = grouped(debates, lambda r: f"{r['protocol'].replace('_', '-')}, {r['turns']} turns")
        note = (
            "Means over the weak models that read them, on train_b. The honest side wins where the verdict is the truth; "
            "changed: from the verdict of the weak model that reads no transcript. Then the share of right verdicts by "
            "length of the transcript, and its mean length."
        )
        out.append(table_of_means("debates", "What the debates did", of, DEBATES, note))
    return out


# ---- files ----


def summarize(out: Path, rows: list[dict]) -> dict[str, dict]:
    """task -> method -> cell, of every method that has all seeds: stats.cells, its weak labels, and its rows' digests."""
    seeds, summary = {row["seed"] for row in rows}, {}
    for task, runs in grouped(rows, lambda r: r["method"]).items():
        runs = {m: sorted(r, key=lambda x: x["seed"]) for m, r in runs.items() if {x["seed"] for x in r} == seeds}
        correct = {}
        for m, of in runs.items():
            answers = [scored(out / r["predictions"], out / task / "data/test.jsonl") for r in of]
            correct[m] = np.stack([probs.argmax(1) == labels for probs, labels in answers])
        if not runs:
            continue
        summary[task] = cells = stats.cells(correct)
        digests = {m: tuple(r["digest"] for r in of) for m, of in runs.items()}
        bounds = [digests.get(b, ()) for b in stats.BOUNDS]
        for m, of in runs.items():
            cells[m] |= {"rows": digests[m], "lead_rows": digests[m] + digests.get("finetune", ())}
            cells[m] |= {"pgr_rows": digests[m] + sum(bounds, ()), "gap_rows": sum(bounds, ())}
            cells[m]["n"] = correct[m].shape[1]
            cells[m]["constant"] = any(r["share_of_1"] in (0, 1) for r in of)
            if "weak_label_accuracy" in of[0]:
                cells[m]["weak_label_accuracy"] = float(np.mean([r["weak_label_accuracy"] for r in of]))
    return summary


class Report(NamedTuple):
    """All that is shown. `points`: figure -> task -> x -> method; `labels`: method -> the name of its row; `figure_only`:
    methods that are points of a figure and no row of a table."""

    rows: list[dict]
    debates: list[dict]
    summary: dict[str, dict]
    tables: list[Table]
    points: dict[str, dict]
    labels: dict[str, str]
    figure_only: set[str]


def collect(
    out: Path, rows: list[dict], readings: list[dict], labels: dict[str, str], shown: dict[str, tuple]
) -> Report:
    """From the rows of `result_row`, the weak models that read debates (Experiment.readings), and the predictions in `out`.

    `shown`: method -> its places, "table2" or "figure2:3".
    """
    rows, debates = (
        [row | {"digest": name_of(row)} for row in of] for of in (rows, [debate_row(r, out) for r in readings])
    )
    summary = summarize(out, rows)
    figure_only = {m for m, places in shown.items() if not set(places) & TABLES.keys()}
    points = {name: points_of(name, shown, summary, figure_only) for name in FIGURES}
    return Report(rows, debates, summary, tables(rows, debates, summary, labels, shown), points, labels, figure_only)


def write(made: Report, into: Path) -> list[Path]:
    """results.jsonl, debates.jsonl, summary.json, tables and figures in `into`; returns the paths."""
    paths = [into / name for name in ("results.jsonl", "debates.jsonl", "summary.json", "verdict.md")]
    write_jsonl(paths[0], made.rows)
    write_jsonl(paths[1], made.debates)
    write_text(paths[2], json.dumps(made.summary, indent=1) + "\n")
    write_text(paths[3], "".join(f"{''.join(map(str, v))}\n" for v in verdicts(made.summary)))
    paths += overview(into / "figures", made)
    for table in made.tables:
        paths.append(into / f"tables/{table.name}.md")
        write_text(paths[-1], markdown(table))
    for name, axis in FIGURES.items():
        paths += figure(into / "figures", name, axis, made.points[name], made.labels, made.summary)
    return paths


CARD = """---
configs:
- config_name: predictions
  data_files:
  - {split: test, path: "*/predictions/*/test.jsonl"}
  - {split: train_b, path: "*/predictions/*/train_b.jsonl"}
- config_name: weak_labels
  data_files: "*/weak_labels/*/*/train_b.jsonl"
- config_name: transcripts
  data_files:
  - {split: train_a, path: "*/transcripts/*/*/train_a.jsonl"}
  - {split: train_b, path: "*/transcripts/*/*/train_b.jsonl"}
- config_name: samples
  data_files:
  - {split: train_a, path: "*/data/train_a.jsonl"}
  - {split: test, path: "*/data/test.jsonl"}
- config_name: results
  data_files: results.jsonl
- config_name: debates
  data_files: debates.jsonl
---
# A run of *Debate Helps Weak-to-Strong Generalization*

"""


def card(made: Report) -> str:
    """README.md of the results: what is in which file, and how `datasets` reads it."""
    tasks = {r["task"]: r["n"] for r in made.rows}
    return (
        CARD + f"Tasks (test items): {', '.join(f'{t} ({n:,})' for t, n in tasks.items())}. Commits: "
        f"{', '.join(sorted({r['commit'] for r in made.rows}))}. Open report.html first.\n\n"
        '`datasets.load_dataset(FOLDER, "predictions")` reads all of one kind, `load_dataset("json", data_files=FILE)` one file: '
        "`samples` (id, text, label), `transcripts` (id, the side and text of each turn, n_tokens), `weak_labels` and "
        "`predictions` (id, probs). A file's folder says the task, the protocol and debate seed, or the run. Beside each run's "
        "predictions steps.jsonl has the metrics of every step and manifest.json its settings. Transcripts are what a language "
        "model said for a side that it was given: half of them argue for what is false. The samples keep their sources' licences.\n"
    )


def write_tensorboard(made: Report, out: Path, into: Path) -> None:
    """The steps of every run that is not there yet."""
    from torch.utils.tensorboard import SummaryWriter

    for row in made.rows:
        run = (out / row["predictions"]).parent
        folder = into / row["task"] / f"{run.name}-{row['digest']}"
        if (run / "steps.jsonl").exists() and not folder.exists():
            with SummaryWriter(folder) as writer:
                for step in read_jsonl(run / "steps.jsonl"):
                    for name in step.keys() - {"step"}:
                        writer.add_scalar(name, step[name], step["step"])


def points_of(name: str, shown: dict, summary: dict, figure_only: set[str]) -> dict[str, dict[int, str]]:
    """task -> x -> method: the points of a figure, where there are others than the tables' rows."""
    points = {int(p.split(":")[1]): m for m, places in shown.items() for p in places if p.startswith(f"{name}:")}
    found = {t: {x: m for x, m in sorted(points.items()) if m in cells} for t, cells in summary.items()}
    return {t: of for t, of in found.items() if set(of.values()) & figure_only}


def verdicts(summary: dict) -> list[list]:
    """Did debate help? A sentence per task, decided by the interval of ours minus finetune; parts are text or Number."""
    said = []
    for task, cells in summary.items():
        c = cells.get("ours", {})
        if "lead" not in c:
            said.append([f"{task}: not asked; ours and finetune were not both run."])
            continue
        low, high = c["lead_ci"]
        answer = "yes" if low > 0 else "no, it hurt" if high < 0 else "not shown, the interval holds zero"
        parts = [f"{task}: {answer}. Ours minus finetune is ", percent(c, "lead"), " points of test accuracy"]
        if c["pgr"] is not None:
            parts += ["; PGR is ", percent(c, "pgr", 0), " %"]
        elif "gap" in cells.get("strong_ceiling", {}):
            gap = percent(cells["strong_ceiling"], "gap")
            parts += ["; PGR is blank, because the ceiling's lead over the floor, ", gap, ", is not clear of zero"]
        said.append([*parts, f" ({c['seeds']} seeds, {c['n']} test items)."])
    return said


def overview_methods(cells: dict) -> list[str]:
    return [m for m in OVERVIEW if m in cells]


def overview(folder: Path, made: "Report") -> list[Path]:
    """One picture: accuracy of floor, finetune, controls, ours, bound and ceiling, a panel per task."""
    if not made.summary:
        return []
    fig = Figure(figsize=(1.6 + 3.4 * len(made.summary), 2.6), layout="constrained")
    axes = fig.subplots(1, len(made.summary), squeeze=False)[0]
    for ax, (task, cells) in zip(axes, made.summary.items(), strict=True):
        plots.dots(ax, "accuracy", "accuracy %", overview_methods(cells), cells, made.labels)
        ax.set_title(task)
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / "overview.png", dpi=130, metadata={"Software": None})
    return [folder / "overview.png"]


def figure(folder: Path, name: str, axis: str, points: dict, labels: dict, summary: dict) -> list[Path]:
    """Accuracy against `axis`, a panel a task: a CSV and a PNG. Nothing without points."""
    if not points:
        return []
    text = io.StringIO()
    csv_rows = csv.writer(text, lineterminator="\n")
    csv_rows.writerow(["task", axis.replace(" ", "_"), "method", "accuracy", "low", "high", "seeds"])
    fig = Figure(figsize=(4.5 * len(points), 3.4), layout="constrained")
    for ax, (task, of) in zip(fig.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        cells = summary[task]
        for x, m in of.items():
            numbers = (cells[m]["accuracy"], *cells[m]["accuracy_ci"])
            csv_rows.writerow([task, x, m, *(f"{v:.6f}" for v in numbers), cells[m]["seeds"]])
        plots.points(ax, axis, of, cells, labels)
        ax.set_title(task, pad=30)  # above the legend
    write_text(folder / f"{name}.csv", text.getvalue())
    fig.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
    return [folder / f"{name}.csv", folder / f"{name}.png"]
