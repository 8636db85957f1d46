"""What the figures and report.html draw, a function a panel: each draws into one matplotlib axis."""

import io
import re
from collections.abc import Callable

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = COLORS = ("#3b82c4", "#d97f1e", "#3a9a5c", "#c9514c", "#888888")
INK = "#010203"  # replaced by the page's own text colour
STYLE = {
    "svg.hashsalt": "w2s", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
} | {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}  # fmt: skip


def svg(name: str, draw: Callable, height: float = 2.9) -> str:
    """A panel as inline SVG: the same bytes for the same numbers, in the page's text colour, ids of its own."""
    with rc_context(STYLE):
        fig = Figure(figsize=(4.4, height), layout="constrained")
        draw(fig.subplots())
        file = io.StringIO()
        fig.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", text)
    return re.sub(r'<svg (.*?)width="[^"]*"', rf'<svg role="img" aria-label="{name}" \1', text, count=1, flags=re.S)


def whiskers(values: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Lengths [2, N] below and above, from values [N] and intervals [N, 2]."""
    return np.maximum([values - intervals[:, 0], intervals[:, 1] - values], 0)


def legend_above(ax) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, frameon=False, fontsize=8)


def points(ax, axis: str, of: dict[int, str], cells: dict, labels: dict) -> None:
    """Figures 2 and 3: accuracy against `axis`, floor, plain finetuning and ceiling as lines."""
    y = 100 * np.array([cells[m]["accuracy"] for m in of.values()])
    error = whiskers(y, 100 * np.array([cells[m]["accuracy_ci"] for m in of.values()]))
    ax.errorbar(list(of), y, yerr=error, marker="o", capsize=3, color=BLUE, label="ours")
    for m, style in (("weak_floor", ":"), ("finetune", "--"), ("strong_ceiling", "-.")):
        if m in cells:
            ax.axhline(100 * cells[m]["accuracy"], ls=style, lw=1, color=GREY, label=labels[m])
    ax.set(xlabel=axis, ylabel="accuracy %", xticks=list(of))
    legend_above(ax)


def dots(ax, what: str, xlabel: str, methods: list[str], cells: dict, labels: dict) -> None:
    """A cell's number for each method, with its interval."""
    values = 100 * np.array([cells[m][what] for m in methods])
    error = whiskers(values, 100 * np.array([cells[m][f"{what}_ci"] for m in methods]))
    for n, m in enumerate(methods):
        color = GREY if m in ("weak_floor", "strong_ceiling") else ORANGE if m == "ours" else BLUE
        ax.errorbar(values[n], n, xerr=error[:, n : n + 1], marker="o", capsize=3, color=color)
    ax.set_yticks(range(len(methods)), [labels[m] for m in methods])
    ax.invert_yaxis()
    ax.grid(axis="x", lw=0.4, alpha=0.5)
    ax.set_xlabel(xlabel)


def stacked(ax, xlabel: str, names: list[str], parts: dict[str, list[float]]) -> None:
    """Cost bars: a bar a name, a colour a part."""
    left = np.zeros(len(names))
    for (label, values), color in zip(parts.items(), COLORS, strict=False):
        ax.barh(names, values, left=left, color=color, label=label, height=0.7)
        left += values
    ax.invert_yaxis()
    ax.set_xlabel(xlabel)
    legend_above(ax)


def curves(ax, losses: dict[str, list[float]]) -> None:
    """Training loss by step; long runs as the means of 200 stretches."""
    for (label, values), color in zip(losses.items(), COLORS, strict=False):
        parts = np.array_split(np.array(values), min(len(values), 200))
        steps = np.cumsum([len(p) for p in parts]) - [(len(p) + 1) / 2 for p in parts] + 1
        ax.plot(steps, [p.mean() for p in parts], color=color, lw=1.2, label=label)
    ax.set(xlabel="step", ylabel="training loss")
    legend_above(ax)


def calibration(ax, bins: dict[str, list[tuple[float, float, int]]]) -> None:
    """Accuracy against confidence, from stats.reliability."""
    ax.plot([50, 100], [50, 100], color=GREY, ls=":", lw=1)
    for (label, of), color in zip(bins.items(), COLORS, strict=False):
        confidence, accuracy, count = np.array(of).T
        ax.plot(100 * confidence, 100 * accuracy, color=color, lw=1, label=label)
        ax.scatter(100 * confidence, 100 * accuracy, color=color, s=4 + 60 * count / count.sum())
    ax.set(xlabel="confidence %", ylabel="accuracy %", ylim=(-3, 103))
    legend_above(ax)
