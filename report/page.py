"""report.html: one file with every table, figure and debate, that needs no network and no script to be read."""

import base64
import hashlib
import os
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import plots
import report
import stats
from common import ROOT, align_by_id, read_jsonl

READER = {"debates": 5000, "bytes": 6_000_000}  # what the debate reader holds at most; the rest is linked
CONTROLS = {n: chr(0x2400 + n) for n in range(32) if chr(n) not in "\n\t"} | {127: "\u2421"}
CURVES = ("weak_floor", "finetune", "ours", "strong_ceiling")


def build(made: report.Report, out: Path, into: Path) -> str:
    """The page as text, for `into`, from the files of a run in `out`: the same bytes from the same rows and files."""
    text = (ROOT / "page.html").read_text()
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["visible"] = visible
    script = text.split("<script>")[1].split("</script>")[0]
    by_digest = {r["digest"]: r for r in [*made.rows, *made.debates]}
    entries, left_out = reader(out, made.debates)
    return env.from_string(text).render(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        made=made, verdicts=report.verdicts(made.summary), overviews=overviews(made), panels=panels(made, out), entries=entries,
        left_out=left_out, provenance=lambda number: "\n".join(said_of(by_digest[d]) for d in number.rows),
        is_number=lambda x: isinstance(x, report.Number), link=lambda path: os.path.relpath(out / path, into),
        transcripts=sorted({r["transcripts"] for r in made.debates}),
        choices={key: sorted({str(e[key]) for e in entries}) for key in ("task", "protocol", "seed", "label", "verdict")},
    )  # fmt: skip


def said_of(row: dict) -> str:
    name = row.get("method") or f"debates read by {Path(row['predictions']).parent.name}"
    return (
        f"{row['task']}, {name}, seed {row['seed']}: row {row['digest']}, config {row['config']}, inputs {row['inputs']}, "
        f"commit {row['commit']}, {row['seconds']} s"
    )


def visible(text: str) -> str:
    """Text with its control characters as signs and what is no character replaced, so that nothing in it acts."""
    return text.encode("utf-8", "replace").decode().translate(CONTROLS)


def panels(made: report.Report, out: Path) -> dict[str, list[tuple[str, Markup]]]:
    """task -> (title, SVG) of each panel that there is something to draw for."""
    drawn: dict[str, list] = {}
    points, labels = made.points, made.labels
    for task, cells in made.summary.items():
        of = [r for r in made.rows if r["task"] == task and r["method"] in cells]
        methods = [m for m in dict.fromkeys(r["method"] for r in of) if m not in made.figure_only]

        def add(title: str, draw, *args, height: float = 2.9, task: str = task) -> None:
            name = f"{task}-{len(drawn.setdefault(task, []))}"
            drawn[task].append((title, Markup(plots.svg(name, lambda ax: draw(ax, *args), height))))

        tall = 0.9 + 0.22 * len(methods)
        add("Accuracy", plots.dots, "accuracy", "accuracy %", methods, cells, labels, height=tall)
        with_pgr = [m for m in methods if cells[m]["pgr"] is not None]
        if with_pgr:
            add("Performance gap recovered", plots.dots, "pgr", "PGR %", with_pgr, cells, labels, height=tall)
        for (name, axis), number in zip(report.FIGURES.items(), (2, 3), strict=True):
            if task in points[name]:
                add(f"Figure {number}. By {axis}", plots.points, axis, points[name][task], cells, labels)
        cost = {m: [r for r in of if r["method"] == m] for m in methods}
        for title, unit in (("Seconds a seed", "seconds"), ("Tokens a seed", "tokens")):
            parts = {
                who: [sum(r.get(field, 0) for r in cost[m]) / len(cost[m]) for m in methods]
                for who, field in (("student", unit), ("supervision", f"supervision_{unit}"))
            }
            add(title, plots.stacked, unit, [labels[m] for m in methods], parts, height=tall)
        losses = {labels[m]: steps(out / cost[m][0]["predictions"]) for m in CURVES if m in cost}
        if any(losses.values()):
            add("Training loss, first seed", plots.curves, {m: x for m, x in losses.items() if x})
        bins = {labels[m]: reliability(out, cost[m]) for m in CURVES if m in cost}
        add("Calibration on the test split, first seed", plots.calibration, bins)
    return drawn


def overviews(made: report.Report) -> list[tuple[str, Markup]]:
    """The opening picture: (task, SVG of floor, finetune, controls, ours, bound and ceiling)."""
    drawn = []
    for task, cells in made.summary.items():
        methods = report.overview_methods(cells)

        def draw(ax, methods=methods, cells=cells) -> None:
            plots.dots(ax, "accuracy", "accuracy %", methods, cells, made.labels)

        drawn.append((task, Markup(plots.svg(f"overview-{task}", draw, 0.9 + 0.22 * len(methods)))))
    return drawn


def steps(predictions: Path) -> list[float]:
    """The training losses of a run; none where heads were trained by the hundred."""
    file = predictions.with_name("steps.jsonl")
    return [r["loss"] for r in read_jsonl(file)] if file.exists() else []


def reliability(out: Path, rows: list[dict]) -> list[tuple[float, float, int]]:
    gold = out / rows[0]["task"] / "data/test.jsonl"
    return stats.reliability(*report.scored(out / rows[0]["predictions"], gold))


def reader(out: Path, debates: list[dict]) -> tuple[list[dict], int]:
    """The debates to read, sample by sample, each with the weak model's belief before and after; how many are left out.

    Of every protocol and debate seed the weak model of the first replicate that reads it.
    """
    sources, first = [], {}
    for row in debates:
        first.setdefault(row["transcripts"], row)
    for row in sorted(first.values(), key=lambda r: r["protocol"] != "debate"):
        gold = read_jsonl(out / row["task"] / "data/train_b.gold.jsonl")
        ids, names = [r["id"] for r in gold], ("transcripts", "before", "predictions")
        files = [out / row["task"] / "data/train_b.jsonl", *(out / row[n] for n in names)]
        sources.append((row, list(zip(gold, *(align_by_id(read_jsonl(f), ids, str(f)) for f in files), strict=True))))
    entries, size, total = [], 0, sum(len(samples) for _, samples in sources)
    for n in range(max((len(samples) for _, samples in sources), default=0)):
        for row, samples in sources:
            if n < len(samples):
                gold, sample, said, before, after = samples[n]
                turns = list(zip(said["sides"], said["turns"], strict=True))[: row["turns"]]
                size += (
                    sum(len(text.encode("utf-8", "replace")) for text in (sample["text"], *(t for _, t in turns))) + 600
                )
                if size > READER["bytes"] or len(entries) == READER["debates"]:
                    return entries, total - len(entries)
                right = (after["probs"][1] > after["probs"][0]) == gold["label"]
                entries.append({
                    "task": row["task"], "protocol": row["protocol"], "seed": row["debate_seed"], "id": gold["id"],
                    "label": row["sides"][gold["label"]], "verdict": "right" if right else "wrong", "text": sample["text"],
                    "turns": turns, "sides": row["sides"], "before": before["probs"][1], "after": after["probs"][1],
                })  # fmt: skip
    return entries, 0
