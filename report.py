"""Statistics, tables and figures from predictions on disk: no model is loaded and nothing is trained.

PGR, the performance gap recovered = (weak-to-strong - weak) / (ceiling - weak), is the ratio of means over seeds. Every
interval is a 95% percentile bootstrap over seeds, then test items, in which all methods, the floor and the ceiling
are resampled together. PGR is left blank where the ceiling's lead over the floor is not above zero in that sense.
"""

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np

from common import ROOT, InputError, by_id, read_jsonl, write_jsonl, write_text

TABLES = {"table2": "Table 2. Main result", "table4": "Table 4. Oversight protocols", "table5": "Table 5. Ensembles"}
FIGURES = {"figure2": "ensemble size", "figure3": "debate turns"}
RESAMPLES = 2000


def result_row(task: str, method: str, seed: int, folder: Path, run: Path, supervisor: Path | None) -> dict:
    """Accuracy of a finished run on the test split, and what it cost. One of the two readers of train_b's gold labels."""
    manifest = json.loads((run / "manifest.json").read_text())
    correct = scored(run / "test.jsonl", folder / "data/test.jsonl")
    row = {
        "task": task, "method": method, "seed": seed, "accuracy": round(float(correct.mean()), 6),
        "correct": int(correct.sum()), "n": len(correct), "loss": manifest["config"]["loss"],
    }  # fmt: skip
    if supervisor:
        labels = scored(supervisor / "train_b.jsonl", folder / "data/train_b.gold.jsonl")
        row["weak_label_accuracy"] = round(float(labels.mean()), 6)
    return row | {
        "config": digest_of(manifest["config"]), "inputs": digest_of(manifest["inputs"]), "commit": manifest["commit"],
        "device": manifest["device"], "seconds": manifest["seconds"], "tokens": manifest.get("train_tokens", 0),
        "predictions": str(run.relative_to(folder.parent) / "test.jsonl"),
    }  # fmt: skip


def digest_of(thing: dict) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def scored(predictions: Path, gold: Path) -> np.ndarray:
    """Which predictions [N] (the likelier class) equal the label, in the order of the gold file."""
    labels = read_jsonl(gold)
    rows = by_id(read_jsonl(predictions), [r["id"] for r in labels], str(predictions))
    if not all(isinstance(r.get("probs"), list) and r["probs"] for r in rows) or any("label" not in g for g in labels):
        raise InputError(
            f"{predictions} with {gold}: not probabilities and labels; `python w2s.py status` says what is stale"
        )
    return np.array([int(np.argmax(p["probs"])) == g["label"] for p, g in zip(rows, labels, strict=True)])


# ---- statistics ----


def bootstrap_means(correct: dict[str, np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """Resampled accuracies [resamples] of each method from its correct answers [seeds, items].

    Seeds and items are drawn with replacement, the same draw for every method: differences and ratios are paired.
    """
    S, N = next(iter(correct.values())).shape
    rng = np.random.default_rng(seed)
    items = rng.multinomial(N, np.full(N, 1 / N), size=resamples).astype(np.float32) / N  # [R, N]
    seeds = rng.multinomial(S, np.full(S, 1 / S), size=resamples) / S  # [R, S]
    return {name: ((items @ c.astype(np.float32).T) * seeds).sum(1) for name, c in correct.items()}


def interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def pgr(weak: float, student: float, ceiling: float) -> float:
    """Performance gap recovered: 0 at the weak floor, 1 at the strong ceiling. Not clipped."""
    return (student - weak) / (ceiling - weak)


def cells(correct: dict[str, np.ndarray]) -> dict[str, dict]:
    """For each method: accuracy and PGR (None where blank), each with its interval, and the number of seeds."""
    draws = bootstrap_means(correct)
    out = {}
    for name, c in correct.items():
        out[name] = {"accuracy": float(c.mean()), "accuracy_ci": interval(draws[name]), "seeds": len(c), "pgr": None}
        if "finetune" in correct and name != "finetune":
            lead = float(c.mean() - correct["finetune"].mean())
            out[name] |= {"lead": lead, "lead_ci": interval(draws[name] - draws["finetune"])}
    if "weak_floor" in correct and "strong_ceiling" in correct:
        weak, ceiling = draws["weak_floor"], draws["strong_ceiling"]
        gap = interval(ceiling - weak)
        out["strong_ceiling"] |= {
            "gap": out["strong_ceiling"]["accuracy"] - out["weak_floor"]["accuracy"],
            "gap_ci": gap,
        }
        if gap[0] > 0:
            for name in correct.keys() - {"weak_floor", "strong_ceiling"}:
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratio = pgr(weak, draws[name], ceiling)
                accuracy = [out[n]["accuracy"] for n in ("weak_floor", name, "strong_ceiling")]
                out[name] |= {"pgr": pgr(*accuracy), "pgr_ci": interval(ratio[np.isfinite(ratio)])}
    return out


# ---- files ----


def write(
    out: Path, into: Path, rows: list[dict], labels: dict[str, str], shown: dict[str, tuple[str, ...]]
) -> list[Path]:
    """results.jsonl, summary.json, tables and figures in `into` from what is in `out`; returns the paths.

    `labels`: method -> the name of its row; `shown`: method -> its places, "table2" or "figure2:3".
    """
    write_jsonl(into / "results.jsonl", rows)
    seeds = {row["seed"] for row in rows}
    summary: dict[str, dict] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        gold = out / task / "data/test.jsonl"
        runs: dict[str, dict[int, dict]] = {}
        for row in rows:
            if row["task"] == task:
                runs.setdefault(row["method"], {})[row["seed"]] = row
        complete = {m: r for m, r in runs.items() if r.keys() == seeds}
        if complete:
            correct = {
                m: np.stack([scored(out / r[s]["predictions"], gold) for s in sorted(r)]) for m, r in complete.items()
            }
            summary[task] = cells(correct)
            for m, r in complete.items():
                if "weak_label_accuracy" in r[min(r)]:
                    summary[task][m]["weak_label_accuracy"] = float(
                        np.mean([x["weak_label_accuracy"] for x in r.values()])
                    )
    write_text(into / "summary.json", json.dumps(summary, indent=1) + "\n")
    paths = [into / "results.jsonl", into / "summary.json"]
    for name, title in TABLES.items():
        methods = [m for m, places in shown.items() if name in places]
        if name == "table2":
            methods = ["weak_floor", *methods, "strong_ceiling"]
        paths.append(into / f"tables/{name}.md")
        write_text(paths[-1], table(title, {m: labels[m] for m in methods}, summary))
    paths.append(into / "cost.md")
    write_text(paths[-1], cost(rows, labels))
    for name, axis in FIGURES.items():
        points = {int(p.split(":")[1]): m for m, places in shown.items() for p in places if p.startswith(f"{name}:")}
        paths += figure(into / "figures", name, axis, dict(sorted(points.items())), labels, summary)
    return paths


def table(title: str, methods: dict[str, str], summary: dict[str, dict]) -> str:
    """Markdown: a part a task, a row a method; ours with its 95% interval, beside the paper's where it has one."""
    paper = json.loads((ROOT / "data/paper.json").read_text())
    lines = [f"### {title}", ""]
    for task, cell in summary.items():
        lines += [
            f"| {task} | accuracy % | paper | PGR % | paper | minus finetune | weak labels % |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, label in methods.items():
            c, theirs = cell.get(method), (None, None)
            if task in paper["tasks"] and method in paper:
                theirs = paper[method][paper["tasks"].index(task)]
            paper_accuracy, paper_pgr = ("" if x is None else f"{x:.1f}" for x in theirs)
            row = [label, percent(c, "accuracy"), paper_accuracy, percent(c, "pgr", 0), paper_pgr]
            row.append(percent(c, "lead"))
            row.append(f"{100 * c['weak_label_accuracy']:.1f}" if c and "weak_label_accuracy" in c else "")
            lines.append("| " + " | ".join(row) + " |")
        gap = cell.get("strong_ceiling", {}).get("gap_ci")
        if gap:
            blank = "." if gap[0] > 0 else ": not clear of zero, so PGR is blank."
            lead = 100 * cell["strong_ceiling"]["gap"]
            seeds = cell["strong_ceiling"]["seeds"]
            lines += [
                "",
                f"Seeds: {seeds}. Ceiling minus floor {lead:+.1f} [{100 * gap[0]:+.1f}, {100 * gap[1]:+.1f}]{blank}",
            ]
        lines.append("")
    note = (
        "Accuracy on the test split, PGR and the difference from finetune: ours [95% interval over seeds and items], then "
        "the paper's. Weak labels: their accuracy on train_b."
    )
    return "\n".join([*lines, note]) + "\n"


def cost(rows: list[dict], labels: dict[str, str]) -> str:
    """Markdown: what each method cost in the mean over seeds, if it were run alone."""
    lines = ["### Cost of one seed, from debates to predictions", ""]
    lines += [
        "| task | method | seconds, student | seconds, supervision | tokens trained or generated |",
        "|---|---|---|---|---|",
    ]
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in rows):
        of = [r for r in rows if (r["task"], r["method"]) == (task, method)]
        student, labelling = (sum(r.get(k, 0) for r in of) / len(of) for k in ("seconds", "supervision_seconds"))
        tokens = sum(r["tokens"] + r.get("supervision_tokens", 0) for r in of) / len(of)
        lines.append(f"| {task} | {labels[method]} | {student:.0f} | {labelling:.0f} | {tokens:,.0f} |")
    return "\n".join(lines) + "\n"


def percent(cell: dict | None, what: str, digits: int = 1) -> str:
    if not cell or cell.get(what) is None:
        return ""
    low, high = cell[f"{what}_ci"]
    sign = "+" if what == "lead" else ""
    return f"{100 * cell[what]:{sign}.{digits}f} [{100 * low:{sign}.{digits}f}, {100 * high:{sign}.{digits}f}]"


def figure(folder: Path, name: str, axis: str, points: dict[int, str], labels: dict, summary: dict) -> list[Path]:
    """Accuracy against `axis`, a panel a task, floor and ceiling as lines: a CSV and a PNG. Nothing without points."""
    tasks = [t for t, cell in summary.items() if any(m in cell for m in points.values() if m != "ours")]
    if not tasks:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["task", axis.replace(" ", "_"), "method", "accuracy", "low", "high", "seeds"])
    fig, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.4), squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], tasks, strict=True):
        cell = summary[task]
        found = [(x, m, cell[m]) for x, m in points.items() if m in cell]
        for x, m, c in found:
            rows.writerow([task, x, m, *(f"{v:.6f}" for v in (c["accuracy"], *c["accuracy_ci"])), c["seeds"]])
        x, y = [f[0] for f in found], np.array([100 * f[2]["accuracy"] for f in found])
        ci = 100 * np.array([f[2]["accuracy_ci"] for f in found]).T
        ax.errorbar(
            x, y, yerr=np.maximum([y - ci[0], ci[1] - y], 0), marker="o", capsize=3, color="#2b6cb0", label="ours"
        )
        for m, style in (("weak_floor", ":"), ("finetune", "--"), ("strong_ceiling", "-.")):
            if m in cell:
                ax.axhline(100 * cell[m]["accuracy"], ls=style, lw=1, color="#777777", label=labels[m])
        ax.set(title=task, xlabel=axis, ylabel="accuracy %", xticks=x)
        ax.legend(fontsize=7)
    write_text(folder / f"{name}.csv", text.getvalue())
    fig.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
    plt.close(fig)
    return [folder / f"{name}.csv", folder / f"{name}.png"]
