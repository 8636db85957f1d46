"""Figures: the plots of report.html, each drawn into one matplotlib axis, and the PNG and CSV files."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from common import write_text
from report.rows import Report

FIGURES = {"figure2": "ensemble size", "figure3": "debate turns"}
OVERVIEW = ("weak_floor", "finetune", "naive_ensemble", "no_argument", "ours", "evidence", "strong_ceiling")
FIELDS = {  # of a method's cell -> the name on an axis
    "accuracy": "accuracy %", "pgr": "PGR %", "diff_vs_finetune": "minus finetune, points",
    "diff_vs_ours": "minus ours, points", "gap": "minus floor, points", "weak_label_accuracy": "weak labels right %",
    "weak_label_diff_vs_ours": "weak labels minus ours', points",
    "weak_label_diff_vs_finetune": "weak labels minus finetune's, points",
}  # fmt: skip
BLUE, ORANGE, GREEN, RED, GREY = COLORS = ("#3b82c4", "#d97f1e", "#3a9a5c", "#c9514c", "#888888")
PNG = {"dpi": 130, "metadata": {"Software": None}}
INK = "#010203"  # replaced by the page's own text colour
STYLE = {
    "svg.hashsalt": "w2s", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
} | {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}  # fmt: skip


def draw(size: tuple[float, float], panels: dict[str, tuple], sharex: bool = False) -> Figure:
    """A panel per title, from a plot function and its arguments, under one legend; `size` in inches."""
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(1, len(panels), sharex=sharex, squeeze=False)[0]
    for ax, (title, (plot, *args)) in zip(axes, panels.items(), strict=True):
        plot(ax, *args)
        ax.set_title(title)
    handles, labels = fig.axes[0].get_legend_handles_labels()
    if handles:
        fig.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return fig


def svg(name: str, height: float, plot: Callable, *args) -> str:
    """One panel as inline SVG with ids of its own, in the page's text colour; the same bytes for the same numbers."""
    with rc_context(STYLE):
        file, no_date = io.StringIO(), {"Date": None, "Creator": None}
        draw((4.4, height), {"": (plot, *args)}).savefig(file, format="svg", transparent=True, metadata=no_date)
    text = "<svg" + file.getvalue().partition("<svg")[2].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r'<svg (.*?)width="[^"]*"', rf'<svg role="img" aria-label="{name}" \1', text, count=1, flags=re.S)


def with_whiskers(cells: dict, methods: list[str], field: str = "accuracy") -> tuple[np.ndarray, np.ndarray]:
    """A field of the methods in percent [N], and the lengths of the whiskers below and above [2, N]."""
    y, low, high = 100 * np.array([(cells[m][field], *cells[m][f"{field}_ci"]) for m in methods]).reshape(-1, 3).T
    return y, np.maximum([y - low, high - y], 0)


def dots(ax, field: str, methods: list[str], cells: dict, labels: dict) -> None:
    """A field of the cells for each method, with its interval."""
    x, error = with_whiskers(cells, methods, field)
    for n, m in enumerate(methods):
        color = GREY if m in ("weak_floor", "strong_ceiling") else ORANGE if m == "ours" else BLUE
        ax.errorbar(x[n], n, xerr=error[:, n : n + 1], marker="o", capsize=3, color=color)
    ax.set_yticks(range(len(methods)), [labels[m] for m in methods])
    ax.invert_yaxis()
    ax.grid(axis="x", lw=0.4, alpha=0.5)
    ax.set_xlabel(FIELDS[field])
    if field.startswith("diff_vs"):
        ax.axvline(0, color=GREY, lw=0.8)


def against(ax, x: tuple[str, str], field: str, methods: list[str], points: dict[str, dict], labels: dict) -> None:
    """A field of each method over the points, label -> cells, against `x`, a method and its field."""
    for n, (method, color) in enumerate(zip(methods, COLORS, strict=False)):
        found = {label: cells for label, cells in points.items() if cells.get(method, {}).get(field) is not None}
        y, error = with_whiskers({label: cells[method] for label, cells in found.items()}, list(found), field)
        at, error_at = with_whiskers({label: cells[x[0]] for label, cells in found.items()}, list(found), x[1])
        ax.errorbar(at, y, error, error_at, marker="o", capsize=3, ls="", color=color, label=labels[method])
        ends = np.where(np.arange(len(y)) % 2, y + error[1], y - error[0])  # names below and above whiskers, in turn
        for k, (name, *end) in enumerate(zip(found, at, ends, strict=True) if n == 0 else ()):
            beyond, place = ((0, 4), "bottom") if k % 2 else ((0, -4), "top")
            ax.annotate(name, end, beyond, textcoords="offset points", ha="center", va=place, fontsize=8)
    ax.margins(0.12)
    if field.startswith("diff_vs"):
        ax.axhline(0, color=GREY, lw=0.8)
    ax.set_xlabel(f"{labels[x[0]]}, {FIELDS[x[1]]}")


def points(ax, axis: str, methods: dict[int, str], cells: dict, labels: dict) -> None:
    """Figures 2 and 3: accuracy against `axis`; floor, plain finetuning and ceiling as lines."""
    y, error = with_whiskers(cells, list(methods.values()))
    ax.errorbar(list(methods), y, yerr=error, marker="o", capsize=3, color=BLUE, label="ours")
    for m, style in (("weak_floor", ":"), ("finetune", "--"), ("strong_ceiling", "-.")):
        if m in cells:
            ax.axhline(100 * cells[m]["accuracy"], ls=style, lw=1, color=GREY, label=labels[m])
    ax.set(xlabel=axis, ylabel="accuracy %", xticks=list(methods))


def stacked(ax, unit: str, names: list[str], parts: dict[str, list[float]]) -> None:
    """Cost: a bar per name, a colour per part."""
    left = np.zeros(len(names))
    for (label, values), color in zip(parts.items(), COLORS, strict=False):
        ax.barh(names, values, left=left, color=color, label=label, height=0.7)
        left += values
    ax.invert_yaxis()
    ax.set_xlabel(unit)


def curves(ax, losses: dict[str, list[float]]) -> None:
    """Training loss by step; a long run is drawn as 200 means of consecutive steps."""
    for (label, values), color in zip(losses.items(), COLORS, strict=False):
        parts = np.array_split(np.array(values), min(len(values), 200))
        steps = np.cumsum([len(p) for p in parts]) - [(len(p) + 1) / 2 for p in parts] + 1
        ax.plot(steps, [p.mean() for p in parts], color=color, lw=1.2, label=label)
    ax.set(xlabel="step", ylabel="training loss")


def calibration(ax, bins: dict[str, list[tuple[float, float, int]]]) -> None:
    """Accuracy against confidence, from stats.reliability; the larger the dot, the more samples."""
    ax.plot([50, 100], [50, 100], color=GREY, ls=":", lw=1)
    for (label, filled), color in zip(bins.items(), COLORS, strict=False):
        confidence, accuracy, count = np.array(filled).T
        ax.plot(100 * confidence, 100 * accuracy, color=color, lw=1, label=label)
        ax.scatter(100 * confidence, 100 * accuracy, color=color, s=4 + 60 * count / count.sum())
    ax.set(xlabel="confidence %", ylabel="accuracy %", ylim=(-3, 103))


def overview(report: Report, task: str) -> tuple:
    """A panel: the accuracy of floor, finetune, controls, ours, bound and ceiling."""
    cells = report.summary[task]
    return dots, "accuracy", [m for m in OVERVIEW if m in cells], cells, report.labels


def points_of(report: Report, name: str) -> dict[str, dict[int, str]]:
    """task -> x -> method: the points of a figure, for tasks where one of them is no row of a table."""
    places = [(*place.split(":"), m) for m, shown in report.shown.items() for place in shown if ":" in place]
    points = sorted((int(x), m) for figure, x, m in places if figure == name)
    found = {task: {x: m for x, m in points if m in cells} for task, cells in report.summary.items()}
    return {task: methods for task, methods in found.items() if any(map(report.figure_only, methods.values()))}


def write_figures(report: Report, into: Path) -> list[Path]:
    """overview.png, and a PNG and a CSV of each figure that has points, a panel per task."""
    into.mkdir(parents=True, exist_ok=True)
    panels, paths = {task: overview(report, task) for task in report.summary}, []
    if panels:
        paths = [into / "overview.png"]
        draw((1.6 + 3.4 * len(panels), 2.6), panels).savefig(paths[0], **PNG)
    for name, axis in FIGURES.items():
        lines, panels = [f"task,{axis.replace(' ', '_')},method,accuracy,low,high,seeds"], {}
        for task, methods in points_of(report, name).items():
            cells = report.summary[task]
            panels[task] = (points, axis, methods, cells, report.labels)
            for x, m in methods.items():
                accuracy, low, high = cells[m]["accuracy"], *cells[m]["accuracy_ci"]
                lines.append(f"{task},{x},{m},{accuracy:.6f},{low:.6f},{high:.6f},{cells[m]['seeds']}")
        if panels:
            paths += [into / f"{name}.csv", into / f"{name}.png"]
            write_text(paths[-2], "\n".join(lines) + "\n")
            draw((4.5 * len(panels), 3.4), panels).savefig(paths[-1], **PNG)
    return paths
