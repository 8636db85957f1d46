"""report/: every number leads to its rows, and nothing that a transcript says can act on the page."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import run
from statsmodels.stats.multitest import multipletests

from common import InputError, read_jsonl, write_jsonl, write_text
from report import page, stats, tables
from report.figures import points_of
from report.rows import Report, Reported, answers, collect, result_row
from stages import Stage
from w2s import LABELS, METHODS, SHOWN

NASTY = {
    "script": "<script>window.acted = 1</script>", "image": '<img src=x onerror="window.acted = 1">',
    "closing": "</bdi></details></table><h1>out</h1>", "quote": '" onmouseover="window.acted = 1', "jinja": "{{ 7 * 7 }}",
    "right to left": "\u202egnp.exe \u202b\u2067", "NUL": "a\x00b\x1b[31mc\x7f", "long": "W" * 100_000,
    "entity": "&lt;b&gt; &#x3c;", "emoji": "\U0001f468\u200d\U0001f469",
}  # fmt: skip
ACCURACY = {
    "weak_floor": 0.55, "strong_ceiling": 0.95, "zero_shot_evidence": 0.5, "finetune": 0.6, "ours": 0.85, "naive_ensemble": 0.65, "ensemble_3": 0.8,
}  # fmt: skip


def write_predictions(file, p_one) -> None:
    write_jsonl(file, [{"id": f"s{i}", "probs": [1 - p, p]} for i, p in enumerate(p_one)])


def finished(folder, seconds: float = 1.0) -> Stage:
    """A stage that counts as done in `folder`."""
    config = {"loss": "xent", "name": folder.name}
    made = {"commit": "abc", "device": "cpu", "seconds": seconds, "train_tokens": 4000}
    write_text(folder / "manifest.json", json.dumps({"config": config, "inputs": {}} | made))
    return Stage(folder, config, {}, lambda out: {})


def fake_runs(out, n: int = 40, seeds=(0, 1), texts=("What is it?",), debate_seeds=(0, 1)) -> list[Reported]:
    """A folder as a run leaves it, with made-up predictions."""
    rng, task = np.random.default_rng(0), out / "sciq"
    gold = rng.integers(0, 2, n)
    rows = [{"id": f"s{i}", "text": texts[i % len(texts)]} for i in range(n)]
    labels = [{"id": f"s{i}", "label": int(y)} for i, y in enumerate(gold)]
    for part in ("train_a", "train_b"):
        write_jsonl(task / f"data/{part}.jsonl", rows)
    write_jsonl(task / "data/train_b.gold.jsonl", labels)
    write_jsonl(task / "data/test.jsonl", [r | y for r, y in zip(rows, labels, strict=True)])

    def predictions(file, accuracy: float) -> None:
        ones = np.where(rng.random(n) < accuracy, gold, 1 - gold)
        confidence = rng.uniform(0.501, 1, n).round(6)
        write_predictions(file, np.where(ones, confidence, 1 - confidence).tolist())

    def run(name: str, accuracy: float, seconds: float) -> Stage:
        folder = task / "predictions" / name
        for part in ("test", "train_b"):
            predictions(folder / f"{part}.jsonl", accuracy)
        write_jsonl(folder / "steps.jsonl", [{"step": k, "loss": 0.7 / (k + 1)} for k in range(250)])
        return finished(folder, seconds)

    for k in debate_seeds:
        turns = [texts[(i + k) % len(texts)] for i in range(n)]
        write_jsonl(task / f"transcripts/debate/seed{k}/train_b.jsonl", [
            {"id": f"s{i}", "sides": [1, 0, 1, 0], "turns": [t, t[::-1], "third", "fourth"], "n_tokens": [len(t), 3, 1, 1]}
            for i, t in enumerate(turns)
        ])  # fmt: skip
    tokens = {str(k): [100, 10, 1, 9] for k in debate_seeds}
    made = {"turns": 8 * n * len(debate_seeds), "tokens": tokens, "seconds": 8.0}
    write_text(task / "transcripts/debate/manifest.json", json.dumps(made))
    runs = []
    for seed in seeds:
        judges = {(k, 0): run(f"weak-debate-d{k}-t3-f0-s{seed}", 0.65, 3.0) for k in debate_seeds}
        for k, (method, accuracy) in enumerate(ACCURACY.items()):
            runs.append(Reported("sciq", method, seed, run(f"{method}-s{seed}", accuracy, 10.5 + k)))
            if method in METHODS:
                labels = task / f"weak_labels/{method}/seed{seed}"
                predictions(labels / "train_b.jsonl", 0.65)
                runs[-1] = Reported(*runs[-1][:4], labels, "debate", 3, judges, ("incorrect", "correct"), "debate")
    return runs


def fake_report(out, **options) -> Report:
    return collect(out, fake_runs(out, **options), LABELS, SHOWN)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    report = fake_report(out, texts=["a" * k for k in range(1, 41)])
    page.write(report, out)
    return out, report, (out / "report.html").read_text()


def correct_answers(out) -> dict[str, np.ndarray]:
    """Method -> [S, N], from the predictions."""
    gold = np.array([r["label"] for r in read_jsonl(out / "sciq/data/test.jsonl")])

    def answers(run: str) -> np.ndarray:
        return np.array([r["probs"][1] > 0.5 for r in read_jsonl(out / f"sciq/predictions/{run}/test.jsonl")])

    return {m: np.stack([answers(f"{m}-s{seed}") == gold for seed in (0, 1)]) for m in ACCURACY}


def test_every_number_is_found_again_from_the_rows_it_names(small):
    out, report, text = small
    rows = {r["digest"]: r for name in ("results", "debates") for r in read_jsonl(out / f"{name}.jsonl")}
    assert len(rows) == len(report.rows) + len(report.debates) == 18
    assert all(f'id="r-{digest}"' in text for digest in rows)
    for table in re.findall(r"<table>(.*?)</table>", text, re.S)[:-1]:  # the last lists the rows
        heads, *lines = (re.findall(r"<t[hd]>(.*?)</t[hd]>", line, re.S) for line in table.split("<tr>")[1:])
        for head, cell in [pair for line in lines for pair in zip(heads[1:], line[1:], strict=True)]:
            assert 'class="n"' in cell or head == "paper" or not re.search(r"\d", cell)
    numbers = re.findall(r'"n" href="#r-(\w+)" data-field="(\w+)" data-rows="([^"]+)" title="([^"]+)">([^<]+)<', text)
    assert len(numbers) == text.count('class="n"') > 60
    correct = correct_answers(out)
    cell, want = report.summary["sciq"]["ours"], stats.cells(correct)["ours"]
    assert {k: cell[k] for k in want} == want and cell["pgr"] is not None
    mean = {m: c.mean() for m, c in correct.items()}
    tested = [m for m in ACCURACY if m not in {*stats.REFERENCES, "finetune"}]
    draws = stats.bootstrap_means(correct)
    ps = [stats.two_sided_p(draws[m] - draws["finetune"]) for m in tested]
    p_holm = dict(zip(tested, multipletests(ps, method="holm")[1], strict=True))
    gap = mean["strong_ceiling"] - mean["weak_floor"]
    expected = {("gap", "strong_ceiling"): gap} | {("p_holm", m): p for m, p in p_holm.items()}
    for other in ("finetune", "ours"):
        expected |= {(f"diff_vs_{other}", m): x - mean[other] for m, x in mean.items()}
    expected |= {("pgr", m): (x - mean["weak_floor"]) / gap for m, x in mean.items()}
    fields = set()
    for target, field, digests, title, shown in numbers:
        digests = digests.split()
        first = rows[digests[0]]
        assert target == digests[0] and all(f"row {d}, config {rows[d]['config']}" in title for d in digests)
        value, method = shown.split(" ")[0].replace(",", ""), first.get("method")
        own = [rows[d][field] for d in digests if rows[d].get("method") == method and field in rows[d]]
        want = expected[field, method] if (field, method) in expected else np.mean(own or math.nan)
        if field == "sets":
            want = len({rows[d]["debate_seed"] for d in digests})
        if field == "p_holm":
            assert float(value) == pytest.approx(want, rel=0.05), method  # two significant digits
        else:
            last_digit = 10.0 ** -len(value.partition(".")[2])
            scale = 1 if re.search("seconds|tokens|brier|sets", field) else 100
            assert float(value) == pytest.approx(scale * want, abs=0.501 * last_digit), field
        fields.add(field)
    assert fields >= {"p_holm", "diff_vs_finetune", "gap", "pgr", "accuracy", "brier", "weak_label_ece", "tokens"}
    assert "diff_vs_ours" in fields
    assert min(p_holm.values()) < 0.1


def test_the_difference_from_ours_is_a_column_where_ours_was_run(small):
    _, report, _ = small
    without = {"sciq": {m: cell for m, cell in report.summary["sciq"].items() if m != "ours"}}
    heads = [tables.table_of_methods(r, "table5").parts[0][0][0] for r in (report, report._replace(summary=without))]
    assert [head.count("minus ours") for head in heads] == [1, 0] and heads[0][:4] == heads[1][:4]


def test_weak_labels_are_compared_with_those_of_ours(small):
    _, report, _ = small
    cells, mean = report.summary["sciq"], {}
    for m in ("finetune", "ours"):
        mean[m] = np.mean([r["weak_label_accuracy"] for r in report.rows if r["method"] == m])
    lead = mean["finetune"] - mean["ours"]
    assert cells["finetune"]["weak_label_diff_vs_ours"] == pytest.approx(lead) and lead != 0
    low, high = cells["finetune"]["weak_label_diff_vs_ours_ci"]
    assert low < lead < high and "weak_label_diff_vs_ours" not in cells["ours"]


def test_a_table_without_rows_is_left_out(small):
    _, report, _ = small
    cells = report.summary["sciq"]
    for task, methods, left_out in (
        ("sciq", cells, set()), ("sciq", {"finetune"}, set()),  # the paper's rows are shown beside nothing too
        ("sciq_evidence", {"finetune"}, {"table4", "table5"}), ("sciq_evidence", {"finetune", "naive_ensemble"}, {"table4"}),
    ):  # fmt: skip
        summary = {task: {m: cells[m] for m in cells if m in {*methods, *stats.REFERENCES}}}
        names = {t.name for t in tables.tables(report._replace(summary=summary))}
        assert {"table2", "table4", "table5"} - names == left_out


def test_a_row_says_how_good_it_is_and_what_it_imitates(tmp_path):
    folder, stage, labels = tmp_path / "sciq", finished(tmp_path / "sciq/predictions/x"), tmp_path / "sciq/labels"
    for name in ("test", "train_b.gold"):
        write_jsonl(folder / f"data/{name}.jsonl", [{"id": f"s{i}", "label": y} for i, y in enumerate([1, 1, 0, 0])])
    write_predictions(labels / "train_b.jsonl", [0.75, 0.25, 0.25, 0.75])  # right, wrong, right, wrong
    write_predictions(stage.folder / "train_b.jsonl", [0.75, 0.25, 0.75, 0.75])  # agrees, agrees, does not, agrees
    write_predictions(stage.folder / "test.jsonl", [0.75] * 4)
    row = result_row(tmp_path, Reported("sciq", "ours", 0, stage, labels))
    wanted = {
        "accuracy": 0.5, "correct": 2, "n": 4, "brier": (0.0625 + 0.5625) / 2, "ece": 0.25, "frac_pred_1": 1,
        "weak_label_accuracy": 0.5, "weak_label_frac_pred_1": 0.5, "error_inheritance": 1.0, "correction": 0.0, "new_errors": 0.5,
    }  # fmt: skip
    assert {k: row[k] for k in wanted} == pytest.approx(wanted)
    assert row["predictions"] == "sciq/predictions/x/test.jsonl"
    assert answers([row]).tolist() == [[True, True, False, False]]
    assert answers([row], "weak_label_").tolist() == [[True, False, True, False]]


def test_what_debates_did_is_counted_right(small):
    out, report, _ = small
    row = report.debates[0]
    gold = np.array([r["label"] for r in read_jsonl(out / "sciq/data/train_b.gold.jsonl")])
    rows = (read_jsonl(out / row[name]) for name in ("before", "predictions"))
    before, after = (np.array([r["probs"][1] > 0.5 for r in of]) for of in rows)
    right, changed = after == gold, after != before
    wanted = {
        "judge_accuracy": right, "first_speaker_wins": after, "changed": changed, "to_right": changed & right,  # side 1 begins
        "to_wrong": changed & ~right,
    } | {f"accuracy_quarter_{q + 1}": right[10 * q : 10 * q + 10] for q in range(4)}  # sample i has i + 1 tokens  # fmt: skip
    assert {k: row[k] for k in wanted} == pytest.approx({k: x.mean() for k, x in wanted.items()}) and changed.any()
    assert row["mean_tokens"] == np.mean(range(1, 41)) + 3 + 1  # three turns of the four
    assert row["repeated"] == 0.5  # the second turn is the first one reversed, which is "aaa" again
    student = report.rows[-1]  # pays for two judges, and for three turns of each debate seed
    assert student["supervision_tokens"] == 2 * 4000 + 2 * (100 + 10 + 1)
    assert student["supervision_seconds"] == 2 * 3.0 + 8.0 * (80 * 3 * 2) / (8 * 40 * 2)


def test_answers_that_never_change_are_flagged(tmp_path):
    runs = fake_runs(tmp_path)
    assert "The same answer" not in tables.tables(collect(tmp_path, runs, LABELS, SHOWN))[0].markdown()
    write_predictions(tmp_path / "sciq/predictions/ours-s1/test.jsonl", [0.6] * 40)
    text = tables.tables(collect(tmp_path, runs, LABELS, SHOWN))[0].markdown()
    assert "in at least one seed: ours (debate ensembles)." in text


def test_runs_that_are_not_finished_are_left_out_and_stale_ones_counted(tmp_path):
    runs = fake_runs(tmp_path)
    (runs[0].stage.folder / "manifest.json").unlink()
    runs[1].stage.config["lr"] = 1
    report = collect(tmp_path, runs, LABELS, SHOWN)
    assert len(report.rows) == 13 and report.stale == 1 and "weak_floor" not in report.summary["sciq"]
    with pytest.raises(InputError, match="nothing is finished"):
        collect(tmp_path, runs[:1], LABELS, SHOWN)
    untrained = next(r for r in runs if r.method == "zero_shot_evidence")
    page.write(collect(tmp_path, [runs[0], untrained], LABELS, SHOWN), tmp_path)  # a figure without points


def test_the_same_rows_give_the_same_bytes(tmp_path):
    texts = []
    for name in ("one", "two"):
        report = fake_report(tmp_path / name)
        texts += [page.build(report, tmp_path / name), page.build(report, tmp_path / name)]
    assert len(set(texts)) == 1 and str(tmp_path) not in texts[0]


def test_tables_and_figures_are_drawn_again_from_the_rows_that_were_kept(smoke, tmp_path):
    for name in ("results.jsonl", "debates.jsonl"):
        shutil.copy(smoke / name, tmp_path)
    assert run("w2s", "redraw", "--out", tmp_path) == 0
    drawn = [p.relative_to(tmp_path) for folder in ("tables", "figures") for p in tmp_path.glob(f"{folder}/*")]
    assert len(drawn) > 6 and all((tmp_path / p).read_bytes() == (smoke / p).read_bytes() for p in drawn)
    assert (tmp_path / "verdict.md").read_text() == (smoke / "verdict.md").read_text()


def test_a_study_is_drawn_across_runs(tmp_path, capsys):
    for name, n in (("three", 40), ("six", 30)):
        page.write(fake_report(tmp_path / name, n=n), tmp_path / name)
        shutil.rmtree(tmp_path / name / "tables")
    points = {"3 blocks": "three/sciq", "6 blocks": "six/sciq"}
    gap = {
        "title": "Gap",
        "note": "On made-up runs.",
        "x": ["strong_ceiling", "gap"],
        "panels": ["diff_vs_finetune", "pgr"],
    }
    leads = {"title": "Leads", "note": "The same.", "panels": ["diff_vs_finetune"]}
    study = {
        name: of | {"methods": ["ours", "single"], "points": points} for name, of in (("gap", gap), ("leads", leads))
    }
    write_text(tmp_path / "study.json", json.dumps(study))
    assert run("w2s", "redraw", "--out", tmp_path) == 0
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in study)
    assert all((tmp_path / name / "tables/table2.md").exists() for name in ("three", "six"))
    cells = json.loads((tmp_path / "six/summary.json").read_text())["sciq"]
    text = (tmp_path / "study.md").read_text()
    assert text.count("| 6 blocks | ours (debate ensembles) |") == 2 and "single" not in text  # which these runs lack
    assert all(tables.cell_number(cells, "ours", field).text in text for field in gap["panels"])
    for wrong in ({"points": {"x": "six/boolq"}}, {"methods": ["mine"]}, {"panels": ["speed"]}):
        write_text(tmp_path / "study.json", json.dumps({"gap": study["gap"] | wrong}))
        assert run("w2s", "redraw", "--out", tmp_path) == 2
        assert "study.json: gap: there is no '" in capsys.readouterr().err
    write_text(tmp_path / "study.json", "{")
    assert run("w2s", "redraw", "--out", tmp_path) == 2 and "study.json: no figures" in capsys.readouterr().err


def test_leads_of_two_runs_are_compared_in_pairs(tmp_path, capsys):
    for name in ("none", "passage", "copy"):
        runs = fake_runs(tmp_path / name)
        for run_ in runs if name == "passage" else ():  # finetune is the same, ours better by three items in each seed
            if run_.method == "ours":
                better(run_.stage.folder / "test.jsonl", tmp_path / name / "sciq/data/test.jsonl", 3)
        page.write(collect(tmp_path / name, runs, LABELS, SHOWN), tmp_path / name)
    figure = {"title": "Who", "note": "", "methods": ["ours", "single"], "panels": ["accuracy"], "against": "none"}
    figure["points"] = {name: f"{name}/sciq" for name in ("passage", "copy", "none")}
    again = figure | {"against": "passage"}  # each figure has its own differences; single was not run
    write_text(tmp_path / "study.json", json.dumps({"who": figure, "again": again}))
    rows = read_jsonl(tmp_path / "none/results.jsonl")
    write_jsonl(tmp_path / "none/results.jsonl", rows[::-1])  # found by their seeds, whatever the order
    assert run("w2s", "redraw", "--out", tmp_path) == 0
    table = [line.split("|")[1:-1] for line in (tmp_path / "study.md").read_text().splitlines() if line.startswith("|")]
    ends = [line[-1].strip() for line in table]
    assert ends[0] == "minus finetune, less that of none" and ends[4] == ends[7] == ""
    assert ends[3] == "+0.0 [+0.0, +0.0]" and re.match(r"\+7\.5 \[\+\d", ends[2])  # 3 of 40 items
    assert re.match(r"-7\.5 \[-\d", ends[8]) and len(ends) == 10
    write_jsonl(tmp_path / "none/results.jsonl", [r | {"items": "others"} for r in rows])
    assert run("w2s", "redraw", "--out", tmp_path) == 2
    assert "passage: other seeds or test items than none" in capsys.readouterr().err


def better(predictions, gold, n: int) -> None:
    """Turn the first `n` wrong answers right."""
    rows, labels = read_jsonl(predictions), [r["label"] for r in read_jsonl(gold)]
    wrong = [r for r, y in zip(rows, labels, strict=True) if (r["probs"][1] > 0.5) != y]
    for r in wrong[:n]:
        r["probs"].reverse()
    write_jsonl(predictions, rows)


def test_the_page_asks_for_nothing_and_can_be_read_without_a_script(small):
    text = small[2]
    assert not re.findall(r'(?:src|data)=["\']?(?:http|//|file)|@import|url\((?!#)', text)
    assert text.count("<script") == 1 and "default-src 'none'" in text
    assert text.count('<details class="debate"') == 2 * 40
    assert all(title in text for title in tables.TABLES.values())


def test_the_page_holds_so_many_debates_and_links_the_rest(tmp_path):
    report = fake_report(tmp_path)
    text = page.build(report, tmp_path / "heads", max_debates=31)
    assert text.count('<details class="debate"') == 31 and "49 more transcripts" in text
    assert 'href="../sciq/transcripts/debate/seed1/train_b.jsonl"' in text
    assert 0 < page.build(report, tmp_path, max_bytes=7000).count('<details class="debate"') < 31


def test_control_characters_are_shown():
    assert page.visible("a\x00b \x1b[0m\x7f a\nb\tc x\ud800y") == "a␀b ␛[0m␡ a\nb\tc x?y"


def test_a_row_that_is_a_point_too_makes_no_figure_alone(small):
    report = small[1]
    assert report.figure_only("ensemble_3") and not report.figure_only("ours") and not report.figure_only("weak_floor")
    cells = {"single": {}, "ours": {}}
    assert points_of(report._replace(summary={"sciq": cells}), "figure2") == {}
    with_3 = report._replace(summary={"sciq": cells | {"ensemble_3": {}}})
    assert points_of(with_3, "figure2") == {"sciq": {1: "single", 3: "ensemble_3", 4: "ours"}}


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, width: int = 1440, scheme: str = "light", fragment: str = ""):
    """The page, and what went wrong on it: messages, errors, requests."""
    tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    wrong = []
    tab.on("console", lambda m: wrong.append(m.text))
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("request", lambda r: wrong.append(r.url) if r.url.split("#")[0] != path.as_uri() else None)
    tab.goto(path.as_uri() + fragment)
    return tab, wrong


def unfold(tab) -> int:
    """Open all that is folded; returns the page's width."""
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    return tab.evaluate("document.documentElement.scrollWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_cut_off_and_a_number_leads_to_its_row(browser, small, width, scheme):
    tab, wrong = opened(browser, small[0] / "report.html", width, scheme)
    assert unfold(tab) == width
    cut = """[...document.querySelectorAll('svg text, .said, p, h1, h2, h3, select')].filter(e => {
        const r = e.getBoundingClientRect(), room = (e.ownerSVGElement ?? document.documentElement).getBoundingClientRect();
        return r.width && (r.left < room.left - 1 || r.right > room.right + 1)}).map(e => e.textContent)"""
    assert tab.evaluate(cut) == []
    colours = tab.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
    ink, paper = (sum(map(int, re.findall(r"\d+", c)[:3])) / 3 for c in colours)
    assert abs(ink - paper) > 150 and (paper > 127) == (scheme == "light")
    assert tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == colours[0]
    link = tab.locator("a.n").first
    link.click()
    assert "#" + tab.locator("tr:target").get_attribute("id") == link.get_attribute("href") and not wrong


def test_nasty_texts_are_shown_and_do_nothing(browser, tmp_path):
    report = fake_report(tmp_path, n=len(NASTY), texts=list(NASTY.values()), debate_seeds=(0,), seeds=(0,))
    (tmp_path / "report.html").write_text(page.build(report, tmp_path), encoding="utf-8")
    tab, wrong = opened(browser, tmp_path / "report.html", 390)
    assert unfold(tab) == 390
    shown = tab.eval_on_selector_all(".said", "all => all.map(e => e.textContent)")
    assert len(shown) == 4 * len(NASTY)  # a question and three turns
    for text in NASTY.values():
        assert page.visible(text) in shown and page.visible(text[::-1]) in shown
    assert tab.evaluate("window.acted") is None and not wrong
    assert tab.locator("h1").count() == 1 and tab.locator("img").count() == 0


def test_five_thousand_debates_are_filtered(browser, tmp_path):
    words = [" ".join(f"word{(i * k) % 97}" for k in range(28)) for i in range(50)]
    file, report = tmp_path / "report.html", fake_report(tmp_path, n=2500, texts=words)
    file.write_text(page.build(report, tmp_path))
    assert 3e6 < file.stat().st_size < 10e6
    tab, wrong = opened(browser, file)
    assert tab.locator("output").text_content() == "5000 of 5000"
    tab.select_option("select[data-key=seed]", "1")
    tab.select_option("select[data-key=verdict]", "wrong")
    labels = [r["label"] for r in read_jsonl(tmp_path / "sciq/data/train_b.gold.jsonl")]
    answers = read_jsonl(tmp_path / "sciq/predictions/weak-debate-d1-t3-f0-s0/train_b.jsonl")
    wanted = sum((r["probs"][1] > 0.5) != y for r, y in zip(answers, labels, strict=True))
    assert tab.locator("output").text_content() == f"{wanted} of 5000"
    assert tab.locator("details.debate:visible").count() == wanted and not wrong
    again, _ = opened(browser, file, fragment=tab.evaluate("location.hash"))  # the address keeps the choice
    assert again.locator("output").text_content() == f"{wanted} of 5000"
