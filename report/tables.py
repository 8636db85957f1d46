"""Tables, the verdict, and the card of the results. A number knows the rows that it is computed from."""

import json
from typing import NamedTuple

from common import ROOT
from report import stats
from report.rows import Report, by, grouped, judged

TABLES = {"table2": "Table 2. Main result", "table4": "Table 4. Oversight protocols", "table5": "Table 5. Ensembles"}
METHOD_FIELDS = {  # field of a method's cell -> head
    "accuracy": "accuracy %", "pgr": "PGR %", "diff_vs_finetune": "minus finetune", "p_holm": "p",
    "diff_vs_ours": "minus ours", "weak_label_accuracy": "weak labels %",
}  # fmt: skip
METHODS_NOTE = (
    "Accuracy on the test split and PGR: ours [95% interval over seeds and items], then the paper's. Minus finetune, minus "
    "ours: paired differences of accuracy in points. p: of the former, from the same resamples of seeds and items (0.001 at "
    "least), adjusted by Holm for all methods of the task. Weak labels: their accuracy on train_b."
)
MEANS = {  # name -> title, note, and the columns: field of the rows -> head
    "cost": (
        "Cost of one seed",
        "Means over seeds, as if the method were run alone; supervision is its weak models and its share of the debates.",
        {"seconds": "seconds, student", "supervision_seconds": "seconds, supervision", "tokens": "tokens trained",
         "supervision_tokens": "tokens, supervision"},
    ),
    "calibration": (
        "Calibration, and what students inherit",
        "Means over seeds. Brier and ECE of the probabilities on the test split and, of the weak labels, on train_b. There "
        "also: error inheritance, how often the student is wrong where its label was wrong; correction, right there; new "
        "errors, wrong where its label was right.",
        {"brier": "Brier", "ece": "ECE %", "frac_pred_1": "class 1 predicted %", "weak_label_brier": "weak labels: Brier",
         "weak_label_ece": "weak labels: ECE %", "weak_label_frac_pred_1": "weak labels: class 1 predicted %",
         "error_inheritance": "error inheritance %", "correction": "correction %", "new_errors": "new errors %"},
    ),
}  # fmt: skip
DEBATES_NOTE = (
    "Means over sets of debates, of each over the judges that read it, on train_b. Accuracy and, in points, what it is more than "
    "that of judges of debates with as many turns, paired: [95% interval over sets, seeds and samples; one set alone does not "
    "vary]. Changed: other than the answer of the weak floor, which reads no transcript. Quarters: judge accuracy by length of "
    "the transcript, whose mean is in tokens. Repeated: turns after the first that are an earlier one, word for word. "
    "Quote: hold five words in a row of the evidence that the question does not hold."
)
DEBATES = {
    "first_speaker_wins": "first speaker wins %", "changed": "answer changed %", "to_right": "to right %", "to_wrong": "to wrong %",
    "accuracy_quarter_1": "shortest quarter %", "accuracy_quarter_2": "second %", "accuracy_quarter_3": "third %",
    "accuracy_quarter_4": "longest %", "mean_tokens": "tokens", "repeated": "turns repeated %",
    "quoting": "quote the evidence %", "accuracy_quoting": "judge accuracy there %", "accuracy_not_quoting": "elsewhere %",
}  # fmt: skip
FORMATS = {
    "pgr": ".0%", "diff_vs_finetune": "+.1%", "diff_vs_ours": "+.1%", "weak_label_diff_vs_finetune": "+.1%",
    "weak_label_diff_vs_ours": "+.1%", "diff_vs_debate": "+.1%", "lead_beyond": "+.1%", "gap": "+.1%",
    "p_holm": ".2g", "brier": ".3f", "weak_label_brier": ".3f",
    "seconds": ".0f", "supervision_seconds": ".0f", "tokens": ",.0f", "supervision_tokens": ",.0f", "mean_tokens": ".0f",
}  # fmt: skip


class Number(NamedTuple):
    """A number as it is shown, the field that it is, and the digests of the rows that it is computed from."""

    text: str
    field: str
    rows: list[str]

    def __str__(self) -> str:
        return self.text


class Table(NamedTuple):
    """`parts`: of each task the lines, the head first, and a footnote; both hold strings and Numbers."""

    name: str
    title: str
    parts: list[tuple[list[list], list]]
    note: str

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        for part, footnote in self.parts:
            rows = ["| " + " | ".join(map(str, line)) + " |" for line in part]
            lines += [rows[0], "|---" * len(part[0]) + "|", *rows[1:], ""]
            lines += [joined(footnote), ""] if footnote else []
        return "\n".join([*lines, self.note]) + "\n"


def joined(parts: list) -> str:
    return "".join(map(str, parts))


def formatted(field: str, value: float) -> str:
    return format(value, FORMATS.get(field, ".1%")).removesuffix("%")


def with_interval(cell: dict, field: str) -> str:
    text = formatted(field, cell[field])
    if f"{field}_ci" in cell:
        text += " [{}, {}]".format(*(formatted(field, x) for x in cell[f"{field}_ci"]))
    return text


def cell_number(cells: dict, method: str, field: str) -> Number | str:
    """A field of a method's cell with its interval, and the rows of this report behind it; empty where there is none."""
    cell = cells.get(method, {})
    if cell.get(field) is None:
        return ""
    compared = dict.fromkeys(("diff_vs_finetune", "weak_label_diff_vs_finetune", "p_holm", "lead_beyond"), ["finetune"])
    compared |= dict.fromkeys(("diff_vs_ours", "weak_label_diff_vs_ours"), ["ours"])
    compared |= {"pgr": stats.BOUNDS, "gap": ["weak_floor"]}
    rows = [digest for m in (method, *compared.get(field, ())) for digest in cells[m]["rows"]]
    return Number(with_interval(cell, field), field, rows)


def mean_number(rows: list[dict], field: str) -> Number | str:
    """The mean of a field over rows; empty where a row has none. Of rows of judges every set of debates counts once, however
    many judges read it."""
    values = [[r.get(field) for r in of] for of in by(rows, lambda r: r.get("debate_seed")).values()]
    if any(None in of for of in values):
        return ""
    mean = sum(sum(of) / len(of) for of in values) / len(values)
    return Number(formatted(field, mean), field, [r["digest"] for r in rows])


def tables(report: Report) -> list[Table]:
    """The paper's tables, then cost, calibration, and what the debates did."""
    found = [table for name in TABLES if (table := table_of_methods(report, name)).parts]
    methods = grouped(report.rows, lambda r: report.labels[r["method"]])
    for name, (title, note, columns) in MEANS.items():
        parts = []
        for task, named in methods.items():
            lines = [[label, *(mean_number(rows, field) for field in columns)] for label, rows in named.items()]
            parts.append(([[task, *columns.values()], *lines], []))
        if name == "cost":
            note += f" Seconds on {', '.join(sorted({r['device'] for r in report.rows}))}."
        if parts:
            found.append(Table(name, title, parts, note))
    return [*found, *([table_of_debates(report)] if report.debates else [])]


def table_of_debates(report: Report) -> Table:
    """What the debates did: a part per task, a line per protocol and number of turns."""
    parts = []
    for task, of_task in by(report.debates, lambda r: r["task"]).items():
        cells, named = judged(of_task), by(of_task, lambda r: (r["protocol"], r["turns"]))
        digests = {name: [r["digest"] for r in rows] for name, rows in named.items()}
        fields = [f for f in DEBATES if any(f in r for r in of_task)]  # rows of before `repeated` was counted lack it
        lines = [[task, "sets", "judge accuracy %", "minus debate", *map(DEBATES.get, fields)]]
        for name, rows in named.items():
            (protocol, turns), cell = name, cells.get(name, {})
            sets = Number(str(len({r["debate_seed"] for r in rows})), "sets", digests[name])
            accuracy, minus = mean_number(rows, "judge_accuracy"), ""
            if "accuracy" in cell:
                accuracy = Number(with_interval(cell, "accuracy"), "judge_accuracy", digests[name])
            if "diff_vs_debate" in cell:
                both = digests[name] + digests["debate", turns]
                minus = Number(with_interval(cell, "diff_vs_debate"), "diff_vs_debate", both)
            others = [mean_number(rows, field) for field in fields]
            lines.append([f"{protocol.replace('_', '-')}, {turns} turns", sets, accuracy, minus, *others])
        parts.append((lines, []))
    return Table("debates", "What the debates did", parts, DEBATES_NOTE)


def table_of_methods(report: Report, name: str) -> Table:
    """One of the paper's tables: a part per task, a line per method, accuracy and PGR beside the paper's."""
    paper, parts = json.loads((ROOT / "data/paper.json").read_text()), []
    methods = [m for m, places in report.shown.items() if name in places]
    if name == "table2":
        methods = [*stats.ZERO_SHOT, "weak_floor", *methods, "strong_ceiling"]
    for task, cells in report.summary.items():
        fields = [f for f in METHOD_FIELDS if f != "diff_vs_ours" or "ours" in cells]
        accuracy, pgr, *others = (METHOD_FIELDS[f] for f in fields)
        lines, footnote = [[task, accuracy, "paper", pgr, "paper", *others]], []
        for m in methods:
            in_paper = m in paper and task in paper["tasks"]
            theirs = paper[m][paper["tasks"].index(task)] if in_paper else (None, None)
            paper_accuracy, paper_pgr = ("" if x is None else f"{x:.1f}" for x in theirs)
            accuracy, pgr, *others = (cell_number(cells, m, field) for field in fields)
            if m in cells or in_paper:
                lines.append([report.labels[m], accuracy, paper_accuracy, pgr, paper_pgr, *others])
        if gap := cell_number(cells, "strong_ceiling", "gap"):
            ceiling = cells["strong_ceiling"]
            end = "." if ceiling["gap_ci"][0] > 0 else ": not clear of zero, so PGR is blank."
            footnote = [f"Seeds: {ceiling['seeds']}. Ceiling minus floor ", gap, end]
        if constant := [report.labels[m] for m in methods if cells.get(m, {}).get("constant")]:
            footnote.append(f" The same answer to every test item, in at least one seed: {', '.join(constant)}.")
        if lines[1:]:
            parts.append((lines, footnote))
    return Table(name, TABLES[name], parts, METHODS_NOTE)


CONTROLS = ("naive_ensemble", "no_argument")  # four weak models as well, but nobody argues


def verdict(task: str, cells: dict, labels: dict) -> list:
    """Did debate help? A sentence of text and Numbers, decided by the interval of ours minus finetune, or of a single judge's;
    where that is above zero, by those of the controls too, which ours must lead."""
    debate = next((m for m in ("ours", "single") if "diff_vs_finetune" in cells.get(m, {})), None)
    if not debate:
        return [f"{task}: no answer, because neither ours nor single was run beside finetune."]
    low, high = cells[debate]["diff_vs_finetune_ci"]
    answer = "yes" if low > 0 else "no, it hurt" if high < 0 else "not shown, the interval holds zero"
    who, difference = (
        {"ours": "Ours", "single": "A single judge"}[debate],
        cell_number(cells, debate, "diff_vs_finetune"),
    )
    not_behind = [m for m in CONTROLS if low > 0 and cells.get(m, {}).get("diff_vs_ours_ci", (0, -1))[1] >= 0]
    if not_behind:
        answer = "not shown, a control without arguments is not behind"
    sentence = [f"{task}: {answer}. {who} minus finetune is ", difference, " points of test accuracy"]
    for m in not_behind:
        sentence += [f"; {labels[m]} minus ours is ", cell_number(cells, m, "diff_vs_ours")]
    if cells[debate]["pgr"] is not None:
        sentence += ["; PGR is ", cell_number(cells, debate, "pgr"), " %"]
    elif gap := cell_number(cells, "strong_ceiling", "gap"):
        sentence += ["; PGR is blank, because the ceiling's lead over the floor, ", gap, ", is not clear of zero"]
    return [*sentence, f" ({cells[debate]['seeds']} seeds, {cells[debate]['n']} test items)."]


def verdicts(report: Report) -> list[list]:
    return [verdict(task, cells, report.labels) for task, cells in report.summary.items()]


CARD = """---
configs:
- {config_name: predictions, data_files: [{split: test, path: "*/predictions/*/test.jsonl"}, {split: train_b, path: "*/predictions/*/train_b.jsonl"}]}
- {config_name: weak_labels, data_files: "*/weak_labels/*/*/train_b.jsonl"}
- {config_name: transcripts, data_files: [{split: train_a, path: "*/transcripts/*/*/train_a.jsonl"}, {split: train_b, path: "*/transcripts/*/*/train_b.jsonl"}]}
- {config_name: samples, data_files: [{split: train_a, path: "*/data/train_a.jsonl"}, {split: test, path: "*/data/test.jsonl"}]}
- {config_name: results, data_files: results.jsonl}
- {config_name: debates, data_files: debates.jsonl}
---
# A run of *Debate Helps Weak-to-Strong Generalization*

Open report.html first. `datasets.load_dataset(FOLDER, "predictions")` reads all of one kind: `samples` (id, text, label),
`transcripts` (id, the side and text of each turn, n_tokens), `weak_labels` and `predictions` (id, probs). The folder of a
file names the task, the protocol and debate seed, or the run. Beside the predictions of a run, steps.jsonl has the metrics
of every step and manifest.json its settings. Transcripts are what a language model said for a side that it was given: half
of them argue for what is false. The samples keep the licences of their sources.
"""


def card(report: Report) -> str:
    """README.md of the results: what is in which file, and how `datasets` reads it."""
    tasks = ", ".join(f"{t} ({n:,})" for t, n in {r["task"]: r["n"] for r in report.rows}.items())
    return f"{CARD}\nTasks (test items): {tasks}. Commits: {', '.join(sorted({r['commit'] for r in report.rows}))}.\n"
