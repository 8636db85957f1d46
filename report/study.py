"""A study: tables and figures across several runs, drawn again from the rows that were kept of them."""

from pathlib import Path

from common import InputError, print0, read_json, write_text
from report import figures, stats
from report.figures import FIELDS
from report.page import redraw
from report.rows import answers, grouped, saved
from report.tables import Table, cell_number


def redraw_study(folder: Path, labels: dict[str, str], shown: dict[str, tuple[str, ...]]) -> None:
    """Redraw every run that study.json in `folder` names, then the study's own tables and figures.

    study.json maps a figure's name to `title`, `note`, `points` (label -> "RUN/TASK", a task of the run kept in the folder
    RUN), `methods`, `panels` (fields of a method's cell) and `x`, the method and field on the horizontal axis; without `x`
    there is a panel per point, a line per method. With `against`, a point, the table also says by how much the leads over
    plain finetuning differ from those of that point. Raises InputError where a run or a task is not there.
    """
    file, reports, texts = folder / "study.json", {}, []
    if not (study := read_json(file)):
        raise InputError(f"{file}: no figures there, or not JSON")
    for name, figure in study.items():
        points, rows = {}, {}
        try:
            for label, where in figure["points"].items():
                run, _, task = where.partition("/")
                if run not in reports:
                    reports[run] = saved(folder / run, labels, shown)
                    redraw(reports[run], folder / run)
                points[label] = {method: {**cell} for method, cell in reports[run].summary[task].items()}
                rows[label] = grouped(reports[run].rows, lambda r: r["method"])[task]
            if "against" in figure:
                compare(figure, points, rows)
            texts.append(table(figure, points, labels).markdown())
            figures.draw(*panels(figure, points, labels), sharex=True).savefig(folder / f"{name}.png", **figures.PNG)
        except KeyError as e:
            raise InputError(f"{file}: {name}: there is no {e}") from None
        print0(f"wrote {folder / name}.png")
    write_text(folder / "study.md", "\n".join(texts))
    print0("\n".join([*texts, f"wrote {folder / 'study.md'}"]))


def compare(figure: dict, points: dict[str, dict], rows: dict[str, dict[str, list[dict]]]) -> None:
    """Add to the cells of each point how its leads differ from those of the point `against`, where both have the method."""
    reference = figure["against"]
    for label, method in [(p, m) for p in points if p != reference for m in figure["methods"]]:
        runs = [{m: rows[p][m] for m in ("finetune", method)} for p in (label, reference) if method in points[p]]
        if len(runs) < 2:
            continue
        tested = [{(r["seed"], r["items"]) for of in run.values() for r in of} for run in runs]
        if tested[0] != tested[1]:
            raise InputError(f"{label}: other seeds or test items than {reference}, so no paired difference")
        correct = [{m: answers(of) for m, of in run.items()} for run in runs]
        points[label][method] |= stats.difference_in_differences(*correct, method)


def panels(
    figure: dict, points: dict[str, dict], labels: dict[str, str]
) -> tuple[tuple[float, float], dict[str, tuple]]:
    """A size in inches and what to draw: a panel per field against x, or a panel per point."""
    methods, fields = figure["methods"], figure["panels"]
    if "x" in figure:
        return (4.4 * len(fields), 3.6), {
            FIELDS[field]: (figures.against, figure["x"], field, methods, points, labels) for field in fields
        }
    drawn = {label: [m for m in methods if fields[0] in cells.get(m, {})] for label, cells in points.items()}
    width = 0.07 * max((len(labels[m]) for found in drawn.values() for m in found), default=0)
    return (width + 3.2 * len(points), 0.9 + 0.22 * len(methods)), {
        label: (figures.dots, fields[0], found, points[label], labels) for label, found in drawn.items()
    }


def table(figure: dict, points: dict[str, dict], labels: dict[str, str]) -> Table:
    """A line per point and method: x, then the method's fields with their intervals."""
    columns = [*([figure["x"]] if "x" in figure else []), *((None, field) for field in figure["panels"])]
    heads = ["", "", *(f"{labels[m]}, {FIELDS[field]}" if m else FIELDS[field] for m, field in columns)]
    if "against" in figure:
        columns.append((None, "lead_beyond"))
        heads.append(f"minus finetune, less that of {figure['against']}")
    names = {method: labels[method] for method in figure["methods"]}
    lines = [
        [label, name, *(cell_number(cells, m or method, field) for m, field in columns)]
        for label, cells in points.items() for method, name in names.items() if method in cells
    ]  # fmt: skip
    return Table("study", figure["title"], [([heads, *lines], [])], figure["note"])
