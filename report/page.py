"""report.html, one file that needs no network and no script to be read, and the files beside it."""

import base64
import hashlib
import json
import os
from itertools import accumulate, zip_longest
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from common import align_by_id, dump_row, print0, read_jsonl, write_text
from report import figures, stats, tables
from report.rows import Report, scored

CONTROLS = {n: chr(0x2400 + n) for n in range(32) if chr(n) not in "\n\t"} | {127: "\u2421"}
CURVES = ("weak_floor", "finetune", "ours", "strong_ceiling")


def write(report: Report, into: Path) -> None:
    """Write all files of a report; print the tables and what was written."""
    rows = {"results": report.rows, "debates": report.debates}
    files = {f"{name}.jsonl": "".join(map(dump_row, of)) for name, of in rows.items()}
    files |= {"summary.json": json.dumps(report.summary, indent=1) + "\n", "README.md": tables.card(report)}
    files["report.html"] = build(report, into)
    for name, text in files.items():
        write_text(into / name, text)
        print0(f"wrote {into / name}")
    redraw(report, into)


def redraw(report: Report, into: Path) -> None:
    """Write and print the verdict and the tables, and draw the figures: from the rows alone."""
    files = {"verdict.md": "".join(f"{tables.joined(sentence)}\n" for sentence in tables.verdicts(report))}
    files |= {f"tables/{table.name}.md": table.markdown() for table in tables.tables(report)}
    for name, text in files.items():
        write_text(into / name, text)
        print0(text)
    for path in [*(into / name for name in files), *figures.write_figures(report, into / "figures")]:
        print0(f"wrote {path}")


def build(report: Report, into: Path, max_debates: int = 5000, max_bytes: int = 6_000_000) -> str:
    """The page as text, for the folder `into`: the same bytes from the same rows and files.

    Holds at most `max_debates` debates and `max_bytes` of their text, and links the files with the others.
    """
    text = Path(__file__).with_name("page.html").read_text()
    script = text.split("<script>")[1].split("</script>")[0]
    debates = debates_to_read(report)
    sizes = accumulate(d["bytes"] for d in debates[:max_debates])
    shown = debates[: sum(size <= max_bytes for size in sizes)]
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["visible"] = visible
    return env.from_string(text).render(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), report=report,
        verdicts=tables.verdicts(report),
        panels={task: panels(report, task) for task in report.summary},
        overviews={t: Markup(figures.svg(f"overview-{t}", 2.44, *figures.overview(report, t))) for t in report.summary},
        tables=tables.tables(report), debates=shown, left_out=len(debates) - len(shown),
        transcripts=sorted({r["transcripts"] for r in report.debates}),
        choices={key: sorted({str(d[key]) for d in shown}) for key in ("task", "protocol", "seed", "label", "verdict")},
        link=lambda path: os.path.relpath(report.out / path, into),
        by_digest={row["digest"]: row for row in [*report.rows, *report.debates]},
    )  # fmt: skip


def visible(text: str) -> str:
    """Text with its control characters as signs and what is not Unicode replaced, so that nothing in it acts."""
    return text.encode("utf-8", "replace").decode().translate(CONTROLS)


def panels(report: Report, task: str) -> list[tuple[str, Markup]]:
    """(title, SVG) of each panel of a task."""
    cells, labels, drawn = report.summary[task], report.labels, []
    rows = {m: [r for r in report.rows if (r["task"], r["method"]) == (task, m)] for m in cells}
    methods = [m for m in cells if not report.figure_only(m)]

    def add(title: str, lines: int, plot, *args) -> None:
        drawn.append((title, Markup(figures.svg(f"{task}-{len(drawn)}", 0.9 + 0.22 * lines, plot, *args))))

    add("Accuracy", len(methods), figures.dots, "accuracy", methods, cells, labels)
    if with_pgr := [m for m in methods if cells[m]["pgr"] is not None]:
        add("Performance gap recovered", len(methods), figures.dots, "pgr", with_pgr, cells, labels)
    for name, axis in figures.FIGURES.items():
        if points := figures.points_of(report, name).get(task):
            add(f"Figure {name[-1]}. By {axis}", 9, figures.points, axis, points, cells, labels)
    for unit in ("seconds", "tokens"):
        parts = {"student": unit, "supervision": f"supervision_{unit}"}
        means = {part: [np.mean([r.get(f, 0) for r in rows[m]]) for m in methods] for part, f in parts.items()}
        add(f"{unit.capitalize()} per seed", len(methods), figures.stacked, unit, [labels[m] for m in methods], means)
    losses, bins = {}, {}
    for m in [m for m in CURVES if m in cells]:
        predictions = report.out / rows[m][0]["predictions"]
        bins[labels[m]] = stats.reliability(*scored(predictions, report.out / task / "data/test.jsonl"))
        if (steps := predictions.with_name("steps.jsonl")).exists():  # --head-only writes none
            losses[labels[m]] = [r["loss"] for r in read_jsonl(steps)]
    if losses:
        add("Training loss, first seed", 9, figures.curves, losses)
    add("Calibration on the test split, first seed", 9, figures.calibration, bins)
    return drawn


def debates_to_read(report: Report) -> list[dict]:
    """The debates of train_b sample by sample, each as the first of its judges reads it; those of debate first."""
    first, files = {}, []
    for row in sorted(report.debates, key=lambda r: r["protocol"] != "debate"):
        first.setdefault(row["transcripts"], row)
    for row in first.values():
        data = report.out / row["task"] / "data"
        gold = read_jsonl(data / "train_b.gold.jsonl")
        paths = [data / "train_b.jsonl", *(report.out / row[k] for k in ("transcripts", "before", "predictions"))]
        columns = [align_by_id(read_jsonl(path), [r["id"] for r in gold], str(path)) for path in paths]
        files.append([debate_of(row, *samples) for samples in zip(gold, *columns, strict=True)])
    return [debate for same_sample in zip_longest(*files) for debate in same_sample if debate]


def debate_of(row: dict, gold: dict, sample: dict, transcript: dict, before: dict, after: dict) -> dict:
    """A debate with the judge's belief in side 1 without and with the transcript."""
    turns = list(zip(transcript["sides"], transcript["turns"], strict=True))[: row["turns"]]
    right = (after["probs"][1] > after["probs"][0]) == gold["label"]
    texts = [sample["text"], *(text for _, text in turns)]
    return {
        "task": row["task"], "protocol": row["protocol"], "seed": row["debate_seed"], "id": gold["id"],
        "label": row["sides"][gold["label"]], "verdict": "right" if right else "wrong", "text": sample["text"],
        "turns": turns, "sides": row["sides"], "before": before["probs"][1], "after": after["probs"][1],
        "bytes": 600 + sum(len(text.encode("utf-8", "replace")) for text in texts),  # 600: its frame in the page
    }  # fmt: skip
