"""report.py and page.py: every number leads to its rows, and nothing that a transcript says can act on the page."""

import html.parser
import json
import re
import shutil
import time

import numpy as np
import pytest

import page
import report
import stats
import w2s
from common import read_jsonl, write_jsonl, write_text

NASTY = {
    "script": "<script>window.acted = 1</script>", "image": '<img src=x onerror="window.acted = 1">',
    "closing": "</bdi></details></table><h1>out</h1>", "quote": '" onmouseover="window.acted = 1', "jinja": "{{ 7 * 7 }}",
    "right to left": "\u202egnp.exe \u202b\u2067", "NUL": "a\x00b\x1b[31mc\x7f", "long": "W" * 100_000,
    "entity": "&lt;b&gt; &#x3c;", "emoji": "\U0001f468\u200d\U0001f469",
}  # fmt: skip
METHODS = ("weak_floor", "strong_ceiling", "finetune", "ours", "naive_ensemble", "ensemble_3")
LABELS = w2s.REFERENCE_RUNS | w2s.ZERO_SHOT | {n: m.label for n, m in w2s.METHODS.items()}
SHOWN = {n: m.shown for n, m in w2s.METHODS.items()}


def probabilities(rng, labels: np.ndarray, accuracy: float) -> list[list[float]]:
    """Where right with a confidence of 0.5 to 1."""
    says = np.where(rng.random(len(labels)) < accuracy, labels, 1 - labels)
    p = np.clip(rng.uniform(0.5, 1, len(labels)), 0.501, 1)
    return [[1 - q, q] if s else [q, 1 - q] for s, q in zip(says, p.round(6).tolist(), strict=True)]


def fake_run(out, n: int = 40, seeds=(0, 1), texts=("What is it?",), debate_seeds=(0, 1), gap: float = 0.3):
    """A folder as a run leaves it, with made-up predictions; returns the report of it."""
    rng, task = np.random.default_rng(0), out / "sciq"
    ids = [f"s{i}" for i in range(n)]
    gold = rng.integers(0, 2, n)
    rows = [{"id": i, "text": texts[k % len(texts)]} for k, i in enumerate(ids)]
    write_jsonl(task / "data/train_b.jsonl", rows)
    write_jsonl(task / "data/train_b.gold.jsonl", [{"id": i, "label": int(y)} for i, y in zip(ids, gold, strict=True)])
    write_jsonl(task / "data/test.jsonl", [r | {"label": int(y)} for r, y in zip(rows, gold, strict=True)])

    def run(name: str, accuracy: float, seconds: float):
        folder = task / "predictions" / name
        for part in ("test", "train_b"):
            probs = probabilities(rng, gold, accuracy)
            write_jsonl(folder / f"{part}.jsonl", [{"id": i, "probs": p} for i, p in zip(ids, probs, strict=True)])
        write_jsonl(folder / "steps.jsonl", [{"step": k, "loss": 0.7 / (k + 1)} for k in range(250)])
        manifest = {"config": {"loss": "xent", "name": name}, "inputs": {}, "commit": "abc", "device": "cpu"}
        write_text(folder / "manifest.json", json.dumps(manifest | {"seconds": seconds, "train_tokens": 100 * n}))
        return folder

    results, readings = [], []
    for seed in seeds:
        for k, method in enumerate(METHODS):
            low = {"weak_floor": 0.6, "strong_ceiling": 0.6 + gap}.get(method, 0.6 + gap / 2)
            name = {"weak_floor": f"weak-naive-f0-s{seed}"}.get(method, f"strong-{method}-s{seed}")
            supervisor = task / f"weak_labels/{method}/seed{seed}" if k > 1 else None
            if supervisor:
                probs = probabilities(rng, gold, 0.65)
                weak = [{"id": i, "probs": p} for i, p in zip(ids, probs, strict=True)]
                write_jsonl(supervisor / "train_b.jsonl", weak)
            row = report.result_row("sciq", method, seed, task, run(name, low, 10.5 + k), supervisor)
            results.append(row | ({"supervision_seconds": 5.25, "supervision_tokens": 7000} if supervisor else {}))
        for k in debate_seeds:
            folder = run(f"weak-debate-d{k}-t3-f0-s{seed}", 0.65, 3.0)
            said = task / f"transcripts/debate/seed{k}/train_b.jsonl"
            if not said.exists():
                turns = [texts[(i + k) % len(texts)] for i in range(n)]
                write_jsonl(said, [
                    {"id": i, "sides": [1, 0, 1, 0], "turns": [t, t[::-1], "third", "fourth"], "n_tokens": [len(t), 3, 1, 1]}
                    for i, t in zip(ids, turns, strict=True)
                ])  # fmt: skip
            readings.append({
                "task": "sciq", "protocol": "debate", "turns": 3, "debate_seed": k, "finetune_seed": 0, "seed": seed,
                "sides": ["incorrect", "correct"], **report.origin(json.loads((folder / "manifest.json").read_text())),
                "transcripts": str(said.relative_to(out)), "before": f"sciq/predictions/weak-naive-f0-s{seed}/train_b.jsonl",
                "predictions": str((folder / "train_b.jsonl").relative_to(out)),
            })  # fmt: skip
    return report.collect(out, results, readings, LABELS, SHOWN)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    made = fake_run(out)
    report.write(made, out)
    return out, made, page.build(made, out, out)


class Numbers(html.parser.HTMLParser):
    """The numbers of a page that lead to rows: (text, attributes); and the cells of tables that do not, with their column."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers, self.others, self.inside, self.row, self.head = [], [], None, [], []
        self.cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "a" and attrs.get("class") == "n":
            self.inside = attrs
        elif tag == "tr":
            self.column = -1
        elif tag in ("td", "th"):
            self.column += 1
            self.cell = tag
            if tag == "th" and self.column == 0:
                self.head = []

    def handle_endtag(self, tag):
        if tag == "a":
            self.inside = None
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.inside is not None:
            self.numbers.append((data, self.inside))
        elif self.cell == "th":
            self.head.append(data)
        elif self.cell == "td" and data.strip() and self.head[0] != "row":
            self.others.append((self.head[self.column] if self.column else "", data))


def test_every_number_is_found_again_by_its_digest(small):
    out, made, text = small
    rows = {r["digest"]: r for name in ("results", "debates") for r in read_jsonl(out / f"{name}.jsonl")}
    assert len(rows) == len(made.rows) + len(made.debates) == 16
    found = Numbers(text)
    assert len(found.numbers) > 60 and all(f'id="r-{digest}"' in text for digest in rows)
    assert {head for head, x in found.others if re.search(r"\d", x)} <= {"", "paper"}  # "": the names of the lines
    for shown, said in found.numbers:
        digests = said["data-rows"].split()
        of = [rows[d] for d in digests]
        assert said["href"] == f"#r-{digests[0]}" and of[0]["config"] in said["title"] and "commit abc" in said["title"]
        number, field = float(shown.split(" ")[0].replace(",", "")), said["data-field"]
        mean = {m: np.mean([r["accuracy"] for r in of if r.get("method") == m] or [0]) for m in METHODS}
        own = [r for r in of if r.get("method") == of[0].get("method")]
        if field == "p_holm":
            continue
        if field == "lead":
            want = 100 * (mean[of[0]["method"]] - mean["finetune"])
        elif field in ("gap", "pgr"):
            student = "strong_ceiling" if field == "gap" else of[0]["method"]
            want = 100 * (mean[student] - mean["weak_floor"])
            want /= mean["strong_ceiling"] - mean["weak_floor"] if field == "pgr" else 1
        else:
            want = np.mean([sum(r[f] for f in field.split("+")) for r in own])
            want *= 1 if re.search("seconds|tokens|brier", field) else 100
        assert number == pytest.approx(want, abs=0.51 if abs(want) > 1000 or "[" in shown or field == "pgr" else 0.5), (
            field
        )


def test_a_row_says_how_good_it_is_and_what_it_imitates(tmp_path):
    folder, run, labels = tmp_path / "sciq", tmp_path / "sciq/predictions/x", tmp_path / "sciq/labels"
    gold = [1, 1, 0, 0]
    write_jsonl(folder / "data/test.jsonl", [{"id": str(i), "label": y} for i, y in enumerate(gold)])
    write_jsonl(folder / "data/train_b.gold.jsonl", [{"id": str(i), "label": y} for i, y in enumerate(gold)])

    def write(path, ones):
        write_jsonl(path, [{"id": str(i), "probs": [1 - p, p]} for i, p in enumerate(ones)])

    write(labels / "train_b.jsonl", [0.75, 0.25, 0.25, 0.75])  # right, wrong, right, wrong
    write(run / "train_b.jsonl", [0.75, 0.25, 0.75, 0.75])  # agrees, agrees, does not, agrees
    write(run / "test.jsonl", [0.75] * 4)
    manifest = {"config": {"loss": "xent"}, "inputs": {}, "commit": "c", "device": "cpu", "seconds": 1.0}
    write_text(run / "manifest.json", json.dumps(manifest))
    row = report.result_row("sciq", "ours", 0, folder, run, labels)
    wanted = {
        "accuracy": 0.5, "correct": 2, "n": 4, "brier": (0.0625 + 0.5625) / 2, "ece": 0.25, "share_of_1": 1,
        "weak_label_accuracy": 0.5, "weak_label_share_of_1": 0.5, "error_inheritance": 1.0, "correction": 0.0, "new_errors": 0.5,
    }  # fmt: skip
    assert {k: row[k] for k in wanted} == pytest.approx(wanted)


def test_what_debates_did_is_counted_right(small):
    out, made, _ = small
    row = made.debates[0]
    gold = [r["label"] for r in read_jsonl(out / "sciq/data/train_b.gold.jsonl")]
    before, after = ([p["probs"][1] > 0.5 for p in read_jsonl(out / row[n])] for n in ("before", "predictions"))
    n = len(gold)
    assert row["honest_wins"] == sum(a == y for a, y in zip(after, gold, strict=True)) / n
    assert row["first_speaker_wins"] == sum(after) / n  # side 1 begins throughout
    assert row["changed"] == sum(a != b for a, b in zip(after, before, strict=True)) / n > 0
    assert row["to_right"] == sum(a == y != b for a, b, y in zip(after, before, gold, strict=True)) / n
    assert row["changed"] == pytest.approx(row["to_right"] + row["to_wrong"])
    quarters = [row[f"accuracy_quarter_{q}"] for q in (1, 2, 3, 4)]
    assert np.mean(quarters) == pytest.approx(row["honest_wins"])
    assert row["mean_tokens"] == len("What is it?") + 3 + 1  # three turns of the four


def test_longer_transcripts_are_in_later_quarters(tmp_path):
    texts = ["a" * k for k in range(1, 41)]
    made = fake_run(tmp_path, texts=texts, debate_seeds=(0,), seeds=(0,))
    row = made.debates[0]
    gold = [r["label"] for r in read_jsonl(tmp_path / "sciq/data/train_b.gold.jsonl")]
    right = [(p["probs"][1] > 0.5) == y for p, y in zip(read_jsonl(tmp_path / row["predictions"]), gold, strict=True)]
    assert [row[f"accuracy_quarter_{q}"] for q in (1, 2, 3, 4)] == [np.mean(right[i : i + 10]) for i in (0, 10, 20, 30)]


def test_answers_that_never_change_are_flagged(tmp_path):
    made = fake_run(tmp_path)
    assert "The same answer" not in "".join(map(report.markdown, made.tables))
    path = tmp_path / "sciq/predictions/strong-ours-s1"
    write_jsonl(path / "test.jsonl", [r | {"probs": [0.4, 0.6]} for r in read_jsonl(path / "test.jsonl")])
    task = tmp_path / "sciq"
    flat = report.result_row("sciq", "ours", 1, task, path, task / "weak_labels/ours/seed1")
    rows = [flat if (r["method"], r["seed"]) == ("ours", 1) else r for r in made.rows]
    again = report.collect(tmp_path, rows, [], LABELS, SHOWN)
    assert "in at least one seed: ours (debate ensembles)." in report.markdown(again.tables[0])


def test_the_same_rows_give_the_same_bytes(small, tmp_path):
    out, made, text = small
    assert page.build(made, out, out) == text
    shutil.copytree(out, tmp_path / "copy")
    again = page.build(fake_run(tmp_path / "copy"), tmp_path / "copy", tmp_path / "copy")
    assert again == text and str(out) not in text


def test_the_page_asks_for_nothing_and_can_be_read_without_a_script(small):
    text = small[2]
    assert not re.findall(r'(?:src|data)=["\']?(?:http|//|file)|@import|url\((?!#)', text)
    assert text.count("<script") == 1 and "default-src 'none'" in text
    assert text.count('<details class="debate"') == 2 * 40
    for title in report.TABLES.values():
        assert title in text


def test_the_reader_holds_so_much_and_links_the_rest(tmp_path, monkeypatch):
    made = fake_run(tmp_path)
    monkeypatch.setitem(page.READER, "debates", 31)
    text = page.build(made, tmp_path, tmp_path / "heads")
    assert text.count('<details class="debate"') == 31 and "49 more transcripts" in text
    assert 'href="../sciq/transcripts/debate/seed1/train_b.jsonl"' in text
    monkeypatch.setitem(page.READER, "bytes", 7000)
    assert 0 < page.build(made, tmp_path, tmp_path).count('<details class="debate"') < 31


@pytest.mark.parametrize(
    "text, shown", [("a\x00b", "a␀b"), ("\x1b[0m\x7f", "␛[0m␡"), ("a\nb\tc", "a\nb\tc"), ("x\ud800y", "x?y")]
)
def test_control_characters_are_shown(text, shown):
    assert page.visible(text) == shown


def test_statistics_of_the_summary_are_those_of_the_rows(small):
    out, made, _ = small
    cell = made.summary["sciq"]["ours"]
    correct = {}
    for m in METHODS:
        of = [r for r in made.rows if r["method"] == m]
        answers = [report.scored(out / r["predictions"], out / "sciq/data/test.jsonl") for r in of]
        correct[m] = np.stack([p.argmax(1) == y for p, y in answers])
    want = stats.cells(correct)["ours"]
    assert {k: cell[k] for k in want} == want and cell["pgr"] is not None


def test_a_row_that_is_a_point_too_makes_no_figure_alone(small):
    _, made, _ = small
    assert made.figure_only >= {"ensemble_3"} and not made.figure_only & {"ours", "single"}
    cells = {"sciq": dict.fromkeys(("single", "ours"), {})}
    assert report.points_of("figure2", SHOWN, cells, made.figure_only) == {}
    cells["sciq"]["ensemble_3"] = {}
    assert report.points_of("figure2", SHOWN, cells, made.figure_only) == {
        "sciq": {1: "single", 3: "ensemble_3", 4: "ours"}
    }


def test_the_verdict_is_what_the_interval_says():
    def cells(low, high, pgr=None):
        ours = {
            "accuracy": 0.6,
            "rows": ("a",),
            "lead": (low + high) / 2,
            "lead_ci": (low, high),
            "lead_rows": ("a", "b"),
        }
        ours |= {"pgr": pgr, "pgr_ci": (0.2, 0.8), "pgr_rows": ("a",), "seeds": 2, "n": 99}
        ceiling = {"gap": 0.02, "gap_ci": (-0.01, 0.05), "gap_rows": ("c",), "rows": ("c",)}
        return {"ours": ours, "strong_ceiling": ceiling}

    summary = {
        "a": cells(0.01, 0.11, 0.5), "b": cells(-0.01, 0.1), "c": cells(-0.2, -0.1), "d": {"finetune": {}},
    }  # fmt: skip
    a, b, c, d = ("".join(map(str, parts)) for parts in report.verdicts(summary))
    assert a.startswith("a: yes. ") and "+6.0 [+1.0, +11.0]" in a and "PGR is 50 [20, 80] %" in a and "2 seeds, 99" in a
    assert b.startswith("b: not shown") and "+2.0 [-1.0, +5.0], is not clear of zero" in b
    assert c.startswith("c: no, it hurt. ") and d.startswith("d: not asked")


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
    wrong, url = [], path.as_uri() + fragment
    tab.on("console", lambda m: wrong.append(m.text))
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("request", lambda r: wrong.append(r.url) if r.url.split("#")[0] != path.as_uri() else None)
    tab.goto(url)
    return tab, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_cut_off(browser, small, tmp_path, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(small[2])
    tab, wrong = opened(browser, file, width, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    cut = """[...document.querySelectorAll('svg text, .said, p, h1, h2, h3, select')].filter(e => {
        const r = e.getBoundingClientRect(); return r.width && (r.left < -1 || r.right > innerWidth + 1)}).length"""
    assert tab.evaluate(cut) == 0
    ink, paper = tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", c)[:3])) / 3 for c in (ink, paper)]
    assert abs(light[0] - light[1]) > 150 and (light[1] > 127) == (scheme == "light")
    assert tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == ink
    assert not wrong


def test_nasty_texts_are_shown_and_do_nothing(browser, tmp_path):
    made = fake_run(tmp_path, n=len(NASTY), texts=list(NASTY.values()), debate_seeds=(0,), seeds=(0,))
    file = tmp_path / "report.html"
    file.write_text(page.build(made, tmp_path, tmp_path), encoding="utf-8")
    tab, wrong = opened(browser, file, 390)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = tab.eval_on_selector_all(".said", "all => all.map(e => e.textContent)")
    assert len(shown) == 4 * len(NASTY)  # a question and three turns
    for text in NASTY.values():
        assert page.visible(text) in shown and page.visible(text[::-1]) in shown
    assert tab.evaluate("window.acted") is None and tab.locator("h1").count() == 1 and tab.locator("img").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert not wrong


def test_five_thousand_debates_are_filtered_without_lag(browser, tmp_path):
    words = [" ".join(f"word{(i * k) % 97}" for k in range(28)) for i in range(50)]
    made = fake_run(tmp_path, n=2500, texts=words)
    file = tmp_path / "report.html"
    file.write_text(page.build(made, tmp_path, tmp_path))
    assert 3e6 < file.stat().st_size < 10e6
    tab, wrong = opened(browser, file)
    assert tab.locator("output").text_content() == "5000 of 5000"
    start = time.perf_counter()
    tab.select_option("select[data-key=seed]", "1")
    tab.select_option("select[data-key=verdict]", "wrong")
    tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    took = time.perf_counter() - start
    labels = [r["label"] for r in read_jsonl(tmp_path / "sciq/data/train_b.gold.jsonl")]
    said = read_jsonl(tmp_path / "sciq/predictions/weak-debate-d1-t3-f0-s0/train_b.jsonl")
    wanted = sum((r["probs"][1] > 0.5) != y for r, y in zip(said, labels, strict=True))
    assert tab.locator("output").text_content() == f"{wanted} of 5000"
    assert tab.locator("details.debate:visible").count() == wanted
    assert took < 2 and not wrong
    again, _ = opened(browser, file, fragment=tab.evaluate("location.hash"))  # the address keeps the choice
    assert again.locator("output").text_content() == f"{wanted} of 5000"
    print(f"{took:.2f} s")


def test_a_number_leads_to_its_row(browser, small, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(small[2])
    tab, _ = opened(browser, file)
    link = tab.locator("a.n").first
    link.click()
    assert tab.locator("tr:target").get_attribute("id") == link.get_attribute("href")[1:]
