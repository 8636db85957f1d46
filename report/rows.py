"""Result rows: how every finished run and its judges do, counted from the predictions on disk. No model is loaded."""

import hashlib
import json
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, align_by_id, read_jsonl
from report import stats
from stages import Stage, State, read_manifest

ORIGIN = ("commit", "device", "seconds")  # of a manifest


class Reported(NamedTuple):
    """A run to report: floor, ceiling, zero-shot or a student's. A student has weak labels, the mean of its judges'."""

    task: str
    method: str
    seed: int
    stage: Stage
    weak_labels: Path | None = None
    reads: str = ""  # what the judges read: a protocol's debates, or something else (Method in config.py)
    turns: int = 0
    judges: dict[tuple[int, int], Stage] = {}  # by debate seed and finetuning seed
    sides: tuple[str, ...] = ()  # the names of the task's two sides
    protocol: str = ""  # whose debates were held for it, where the judges read debates


class Report(NamedTuple):
    out: Path
    rows: list[dict]
    debates: list[dict]
    summary: dict[str, dict]  # task -> method -> stats.cells
    labels: dict[str, str]  # method -> its name in tables
    shown: dict[str, tuple[str, ...]]  # method -> its places, "table2" or "figure2:3"
    stale: int  # how many runs were made with other settings or inputs

    def figure_only(self, method: str) -> bool:
        """Whether a method is a point of a figure and no row of a table."""
        return all(place.startswith("figure") for place in self.shown.get(method, ["table2"]))


def collect(out: Path, runs: list[Reported], labels: dict[str, str], shown: dict[str, tuple[str, ...]]) -> Report:
    """The report of those of `runs` that are finished, from the files in `out`. Raises InputError where none is."""
    stale = {run.stage.folder: is_stale(run.stage) for run in runs}
    rows = [result_row(out, run) for run in runs if stale[run.stage.folder] is not None]
    if not rows:
        raise InputError(f"--out {out}: nothing is finished there yet; start with `python w2s.py run`")
    floors, debates = {(r.task, r.seed): r.stage.folder for r in runs if r.method == "weak_floor"}, []
    for run in runs:
        floor = floors[run.task, run.seed] / "train_b.jsonl"
        for (debate_seed, finetune_seed), judge in run.judges.items():
            transcripts = out / run.task / f"transcripts/{run.reads}/seed{debate_seed}/train_b.jsonl"
            if judge.folder not in stale and transcripts.exists() and floor.exists():
                stale[judge.folder] = is_stale(judge)
                if stale[judge.folder] is not None:
                    seeds = {"debate_seed": debate_seed, "finetune_seed": finetune_seed, "seed": run.seed}
                    debates.append(debate_row(out, run, seeds, transcripts, floor, judge.folder / "train_b.jsonl"))
    return Report(out, rows, debates, summarize(rows), labels, shown, sum(map(bool, stale.values())))


def saved(out: Path, labels: dict[str, str], shown: dict[str, tuple[str, ...]]) -> Report:
    """The report of the rows that `page.write` left in a folder. Raises InputError where none are."""
    if not (out / "results.jsonl").exists():
        raise InputError(f"--out {out}: no results.jsonl there; `python w2s.py report` writes it")
    rows, debates = (read_jsonl(out / f"{name}.jsonl") for name in ("results", "debates"))
    if any("right" not in r for r in rows):
        raise InputError(f"{out / 'results.jsonl'}: rows that do not say which answers are right, of before 2026-11-28")
    return Report(out, rows, debates, summarize(rows), labels, shown, 0)


def is_stale(stage: Stage) -> bool | None:
    """Whether a finished stage has other settings than these; None: not finished. Raises InputError on changed files."""
    have = read_manifest(stage.folder)
    if have is None:
        return None
    if changed := stage.changed_outputs(have):
        raise InputError(f"{stage.folder}: {changed[0]}; `run` makes it again")
    if not have.keys() >= {"config", "inputs", *ORIGIN}:
        raise InputError(f"{stage.folder}: manifest.json lacks what a stage writes; `run` makes it again")
    return stage.state()[0] is State.STALE


def result_row(out: Path, run: Reported) -> dict:
    """How a run does on the test split, and what it cost. Reads train_b's gold labels.

    For a student also how good its weak labels were, and on train_b how often it is wrong where its label was wrong (error
    inheritance), right there (correction), and wrong where its label was right (new errors). `right` says which test
    items it gets right, `weak_label_right` which labels of train_b are (see `answers`), so that rows can be compared in pairs.
    """
    data, manifest = out / run.task / "data", read_manifest(run.stage.folder)
    probs, labels = scored(run.stage.folder / "test.jsonl", data / "test.jsonl")
    row = {
        "task": run.task, "method": run.method, "seed": run.seed, **quality(probs, labels),
        "correct": int((probs.argmax(1) == labels).sum()), "loss": manifest["config"]["loss"],
        "items": digest({"ids": [r["id"] for r in read_jsonl(data / "test.jsonl")]}),
    }  # fmt: skip
    if run.weak_labels:
        weak, labels = scored(run.weak_labels / "train_b.jsonl", data / "train_b.gold.jsonl")
        student, _ = scored(run.stage.folder / "train_b.jsonl", data / "train_b.gold.jsonl")
        row |= {f"weak_label_{k}": v for k, v in quality(weak, labels).items()} | supervision_cost(out, run)
        wrong, label_wrong = student.argmax(1) != labels, weak.argmax(1) != labels
        row |= {"error_inheritance": mean(wrong[label_wrong]), "correction": mean(~wrong[label_wrong])}
        row["new_errors"] = mean(wrong[~label_wrong])
    row |= origin(manifest) | {"tokens": manifest.get("train_tokens", 0)}
    row["predictions"] = str((run.stage.folder / "test.jsonl").relative_to(out))
    return row | {"digest": digest(row)}


def supervision_cost(out: Path, run: Reported) -> dict:
    """Seconds and tokens of the weak labels if made for this run alone: its judges and its share of the debates."""
    judges = [read_manifest(judge.folder) or {} for judge in run.judges.values()]
    seconds, tokens = (sum(m.get(key, 0) for m in judges) for key in ("seconds", "train_tokens"))
    debates = read_manifest(out / run.task / "transcripts" / run.protocol) if run.protocol else None
    if debates:
        seeds = {str(debate_seed) for debate_seed, _ in run.judges}
        if not debates["turns"] or not seeds <= debates["tokens"].keys():
            return {}  # the record of a killed run, or of other sets of debates
        samples = sum(len(read_jsonl(out / run.task / f"data/{part}.jsonl")) for part in ("train_a", "train_b"))
        seconds += samples * run.turns * len(seeds) / debates["turns"] * debates["seconds"]
        tokens += sum(sum(debates["tokens"][k][: run.turns]) for k in seeds)
    return {"supervision_seconds": round(seconds, 3), "supervision_tokens": tokens}


def debate_row(out: Path, run: Reported, seeds: dict, transcripts: Path, floor: Path, predictions: Path) -> dict:
    """How often a judge is right about the debates of train_b, and how it differs from the weak floor, which reads none.

    Lengths are in tokens of the debater; the quarters are of equal size, the shortest transcripts first. `right` says which
    samples it gets right; `repeated`, how many of the turns after the first are an earlier turn of the debate, word for word;
    `quoting`, where debaters hold evidence, how many debates quote it (`quotes`), and how often the judge is right there.
    """
    data = out / run.task / "data"
    gold = data / "train_b.gold.jsonl"
    paths = {"transcripts": transcripts, "before": floor, "predictions": predictions}
    (before, labels), (after, _) = scored(floor, gold), scored(predictions, gold)
    ids = [r["id"] for r in read_jsonl(gold)]
    debates = align_by_id(read_jsonl(transcripts), ids, str(transcripts))
    length = np.array([sum(r["n_tokens"][: run.turns]) for r in debates])
    again = [text in r["turns"][:t] for r in debates for t, text in enumerate(r["turns"][: run.turns]) if t]
    first = np.array([r["sides"][0] for r in debates])
    answer, right, changed = after.argmax(1), after.argmax(1) == labels, after.argmax(1) != before.argmax(1)
    row = {
        "task": run.task, "protocol": run.reads, "turns": run.turns, **seeds, "sides": run.sides,
        **origin(read_manifest(predictions.parent)), **{name: str(p.relative_to(out)) for name, p in paths.items()},
        "n": len(labels), "right": packed(right), "judge_accuracy": mean(right), "first_speaker_wins": mean(answer == first),
        "changed": mean(changed), "to_right": mean(changed & right), "to_wrong": mean(changed & ~right),
    }  # fmt: skip
    for n, quarter in enumerate(np.array_split(np.argsort(length, kind="stable"), 4), 1):
        row[f"accuracy_quarter_{n}"] = mean(right[quarter])
    row |= {"mean_tokens": round(float(length.mean()), 3), "repeated": mean(np.array(again))}
    if (evidence := data / "train_b.evidence.jsonl").exists():
        held = (align_by_id(read_jsonl(path), ids, str(path)) for path in (evidence, data / "train_b.jsonl"))
        told = zip(debates, *held, strict=True)
        quoting = np.array([quotes(r["turns"][: run.turns], e["evidence"], s["text"]) for r, e, s in told])
        accuracy = {"accuracy_quoting": mean(right[quoting]), "accuracy_not_quoting": mean(right[~quoting])}
        row |= {"quoting": mean(quoting)} | accuracy
    return row | {"digest": digest(row)}


def quotes(turns: list[str], evidence: str, question: str) -> bool:
    """Whether a turn holds five words in a row of the evidence that the question does not hold."""
    new = word_runs(evidence) - word_runs(question)
    return any(word_runs(text) & new for text in turns)


def word_runs(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


def scored(predictions: Path, gold: Path) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, K] and labels [N], in the order of the gold file."""
    labels = read_jsonl(gold)
    advice = "`python w2s.py status` says what is stale, `run` makes it again"
    try:
        rows = align_by_id(read_jsonl(predictions), [r["id"] for r in labels], str(predictions))
    except InputError as e:
        raise InputError(f"{e}; {advice}") from None
    if not all(isinstance(r.get("probs"), list) and r["probs"] for r in rows) or any("label" not in g for g in labels):
        raise InputError(f"{predictions} with {gold}: not probabilities and labels; {advice}")
    return np.array([r["probs"] for r in rows]), np.array([r["label"] for r in labels])


def quality(probs: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracy, calibration, how often class 1 is predicted (0 or 1 is a constant prediction), and which answers are right."""
    right = probs.argmax(1) == labels
    return {
        "accuracy": mean(right), "brier": round(stats.brier(probs, labels), 6), "ece": round(stats.ece(probs, labels), 6),
        "frac_pred_1": mean(probs.argmax(1)), "n": len(labels), "right": packed(right),
    }  # fmt: skip


def packed(right: np.ndarray) -> str:
    """Booleans as hexadecimal digits; `answers` reads them."""
    return np.packbits(right).tobytes().hex()


def answers(rows: list[dict], part: str = "") -> np.ndarray:
    """Which test items the runs of `rows` get right [S, N], in the order of seeds; part "weak_label_": which labels are."""

    def right(row: dict) -> np.ndarray:
        bits = np.frombuffer(bytes.fromhex(row[f"{part}right"]), np.uint8)
        return np.unpackbits(bits, count=row[f"{part}n"]).astype(bool)

    return np.stack([right(row) for row in sorted(rows, key=lambda r: r["seed"])])


def mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


def origin(manifest: dict) -> dict:
    return {part: digest(manifest[part]) for part in ("config", "inputs")} | {k: manifest[k] for k in ORIGIN}


def digest(row: dict) -> str:
    """Of everything but the seconds, so that the same run has the same digest whatever the clock says."""
    text = json.dumps({k: v for k, v in row.items() if "seconds" not in k}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def by(rows: list[dict], name: Callable[[dict], Hashable]) -> dict[Hashable, list[dict]]:
    """name -> rows."""
    groups: dict[Hashable, list[dict]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def grouped(rows: list[dict], name: Callable[[dict], Hashable]) -> dict[str, dict[Hashable, list[dict]]]:
    """task -> name -> rows."""
    return {task: by(of, name) for task, of in by(rows, lambda r: r["task"]).items()}


def summarize(rows: list[dict]) -> dict[str, dict]:
    """task -> method -> stats.cells of every method that has all seeds, with its weak labels and its rows' digests."""
    seeds, summary = sorted({row["seed"] for row in rows}), {}
    for task, methods in grouped(sorted(rows, key=lambda r: r["seed"]), lambda r: r["method"]).items():
        methods = {m: of for m, of in methods.items() if [r["seed"] for r in of] == seeds}
        if methods:
            summary[task] = stats.cells({m: answers(of) for m, of in methods.items()})
        for m, of in methods.items():
            constant = any(r["frac_pred_1"] in (0, 1) for r in of)
            summary[task][m] |= {"n": of[0]["n"], "rows": [r["digest"] for r in of], "constant": constant}
        weak = {m: answers(of, "weak_label_") for m, of in methods.items() if "weak_label_right" in of[0]}
        for m, cell in stats.compared(weak, stats.bootstrap_means(weak)).items() if weak else ():
            summary[task][m] |= {f"weak_label_{field}": value for field, value in cell.items()}
    return summary


def judged(rows: list[dict]) -> dict[tuple[str, int], dict]:
    """(protocol, turns) -> stats.judges' cell, from a task's rows of judges; none for rows of before `right` was written, and
    where a set of debates lacks a seed."""
    correct, every = {}, sorted({r["seed"] for r in rows})
    for (protocol, turns), of in by(rows, lambda r: (r["protocol"], r["turns"])).items():
        sets = by(of, lambda r: r["debate_seed"]).values()
        seeds = [by(of_set, lambda r: r["seed"]) for of_set in sets]
        if all("right" in r for r in of) and all(sorted(s) == every for s in seeds):
            # where several judges differ in the finetuning alone, the share of them that is right
            correct[protocol, turns] = np.array([[answers(s[k]).mean(0) for k in every] for s in seeds])
    return stats.judges(correct) if correct else {}
