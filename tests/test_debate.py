"""debate.py: the paper's prompts, and transcripts that depend on nothing but their keys."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import debate
from common import read_jsonl, stable_hash, write_jsonl
from data.prepare import TASKS
from debate import encode_question, make_transcripts, run_protocol
from generate import ENGINES, DebateConfig, Debater, sample, splitmix64
from model import ModelSpec

# ---- prompts ----

SHOWN = "There is a science knowledge question, followed by an answer."
INTRODUCTION = f"{SHOWN} Debate with another opponent for whether the answer is correct or incorrect."
ASKED = (  # by turn in Table 1 of paper.md; in Table 3 the first in all turns
    "Construct your argument for why the answer is {}.",
    "Construct your argument for why the answer is {} and list out flaws in your opponent's argument.",
    "Construct the counterargument to opponent's argument.",
)


def debate_prompt(task: str, protocol: str, turn: int, side: int) -> str:
    """Introduction and instruction in one, as Tables 1 and 3 print them."""
    return f"{debate.introduction(task, protocol)} {debate.instruction(task, protocol, turn, side)}"


@pytest.mark.parametrize("protocol", debate.PROTOCOLS)
def test_prompts_are_those_of_tables_1_and_3(protocol):
    opening, asked = (INTRODUCTION, (*ASKED, ASKED[2])) if protocol == "debate" else (SHOWN, ASKED[:1] * 4)
    for turn, words in enumerate(asked):
        for side, name in enumerate(("incorrect", "correct")):
            assert debate_prompt("sciq", protocol, turn, side) == f"{opening} {words.format(name)}"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_prompts_in_the_same_form(task):
    names = TASKS[task].wording.sides
    first = [debate_prompt(task, "debate", 0, side) for side in (0, 1)]
    for side in (0, 1):
        assert first[side].startswith("There is a ") and "Debate with another opponent for whether " in first[side]
        assert f"{names[side]}." in first[side] and first[0] != first[1]
        asked = debate_prompt(task, "debate", 1, side).removesuffix(f" {TASKS[task].wording.begin}")
        assert asked.endswith(" and list out flaws in your opponent's argument.")


def test_a_wording_may_say_how_every_turn_begins():
    begin = TASKS["places_evidence"].wording.begin
    assert begin == "Begin with the words of the passage." and not TASKS["places"].wording.begin
    for protocol in debate.PROTOCOLS:
        for turn in range(4):
            with_it, without = (debate.instruction(t, protocol, turn, 0) for t in ("places_evidence", "places"))
            assert with_it == f"{without} {begin}"


def test_sides_are_balanced_and_opposite():
    first = [debate.assign_side(f"id{i}", 0) for i in range(4000)]
    assert abs(sum(first) - 2000) < 4 * math.sqrt(1000)
    for turn in range(1, 6):
        assert [debate.assign_side(f"id{i}", turn) for i in range(4000)] == [(s + turn) % 2 for s in first]


def test_the_judge_reads_turns_and_sides_before_or_after_the_question():
    transcript = debate.transcript_text("boolq", "debate", [1, 0], ["It is.", "It is not."])
    assert transcript == "Debater A (yes): It is.\nDebater B (no): It is not."
    assert debate.judge_input("Question: q", transcript, "first") == f"{transcript}\nQuestion: q"
    assert debate.judge_input("Question: q", transcript, "last") == f"Question: q\n{transcript}"
    assert debate.transcript_text("sciq", "consultancy", [0], ["No."]) == "Consultant (incorrect): No."
    assert debate.transcript_text("sciq", "debate", [0, 1], ["", ""]) == "Debater A (incorrect):\nDebater B (correct):"


# ---- transcripts ----

SETTINGS = DebateConfig(max_new_tokens=6, temperature=1.0, dtype="float32")


def make_debater(folder: str) -> Debater:
    debater = Debater(ModelSpec(folder), SETTINGS)
    debater.is_end[100:150] = True  # so that many turns of a random model end before the limit
    return debater


@pytest.fixture(scope="module")
def debater(tiny_model):
    return make_debater(tiny_model("llama"))


def transcripts(debater, samples, folder, seeds=(0,), turns=3, chunk=8, protocol="debate", choose=None):
    """File contents by debate seed."""
    files = {k: folder / f"seed{k}.jsonl" for k in seeds}
    debater.batch_size = lambda *_, **__: chunk
    make_transcripts(lambda: debater, "sciq", protocol, samples, files, turns, choose)
    return {k: path.read_bytes() for k, path in files.items()}


@pytest.fixture(scope="module")
def three_turns(debater, samples, tmp_path_factory):
    return transcripts(debater, samples, tmp_path_factory.mktemp("three"), seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def six_turns(debater, samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    return transcripts(debater, samples, folder, seeds=(0, 1), turns=6), read_jsonl(folder / "seed0.jsonl")


def test_transcripts_hold_what_they_should(six_turns, samples):
    rows = six_turns[1]
    assert [r["id"] for r in rows] == [s["id"] for s in samples]
    assert all(len(r["turns"]) == len(r["sides"]) == len(r["n_tokens"]) == 6 for r in rows)
    assert all(r["sides"] == [debate.assign_side(r["id"], t) for t in range(6)] for r in rows)
    lengths = [n for r in rows for n in r["n_tokens"]]
    assert min(lengths) == 1 and max(lengths) == 6 and 20 < lengths.count(6) < 200


@pytest.mark.parametrize("seeds, chunk", [((0, 1), 1), ((1,), 7), ((2, 0), 64)])
def test_neither_the_batch_nor_the_other_seeds_matter(debater, samples, three_turns, tmp_path, seeds, chunk):
    assert transcripts(debater, samples, tmp_path, seeds, chunk=chunk) == {k: three_turns[k] for k in seeds}
    assert len(set(three_turns.values())) == 3


def test_the_order_of_the_samples_does_not_matter(debater, samples, three_turns, tmp_path):
    got = transcripts(debater, samples[::-1], tmp_path)
    assert got[0].splitlines()[::-1] == three_turns[0].splitlines()


def test_a_short_debate_is_the_beginning_of_a_long_one(debater, samples, three_turns, six_turns, tmp_path):
    transcripts(debater, samples, tmp_path)
    short = read_jsonl(tmp_path / "seed0.jsonl")
    assert short == [{k: v[:3] if isinstance(v, list) else v for k, v in r.items()} for r in six_turns[1]]
    assert transcripts(debater, samples, tmp_path, turns=6)[0] == six_turns[0][0]  # continued
    assert transcripts(debater, samples, tmp_path, turns=3)[0] == six_turns[0][0]  # enough: left alone
    assert [p.name for p in tmp_path.iterdir()] == ["seed0.jsonl"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("begun", [0, 3])
def test_a_killed_run_continues_to_the_same_bytes(debater, samples, six_turns, tmp_path, monkeypatch, begun):
    asked = []

    def counted(debater, task, protocol, chunk, *rest):
        if len(asked) == kill_at:
            raise Killed
        asked.append([s["id"] for s in chunk])
        return run_protocol(debater, task, protocol, chunk, *rest)

    if begun:
        transcripts(debater, samples, tmp_path, seeds=(0, 1), turns=begun)
    monkeypatch.setattr(debate, "run_protocol", counted)
    kill_at = 3
    with pytest.raises(Killed):
        transcripts(debater, samples, tmp_path, seeds=(0, 1), turns=6, chunk=8)
    [part] = tmp_path.glob("seed1.jsonl.part*")
    text = part.read_bytes()
    assert text.count(b"\n") == 24
    part.write_bytes(text[:-15])  # in the middle of the last line of the third of five chunks
    before, asked, kill_at = asked, [], None
    files = {k: tmp_path / f"seed{k}.jsonl" for k in (0, 1)}
    cost = make_transcripts(lambda: debater, "sciq", "debate", samples, files, 6)
    assert {k: path.read_bytes() for k, path in files.items()} == six_turns[0]
    assert cost["turns"] == (2 * (40 - 24) + 1) * (6 - begun)  # of this time alone, as its seconds are
    assert before == [[s["id"] for s in c] for c in debate.chunks(samples, lambda _: 8)][:3]
    assert asked[0] == before[2] and len(asked) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed0.jsonl", "seed1.jsonl"]


def test_the_cost_is_counted_and_finished_transcripts_need_no_model(debater, samples, tmp_path):
    files = {k: tmp_path / f"seed{k}.jsonl" for k in (0, 1)}
    cost = make_transcripts(lambda: debater, "sciq", "debate", samples[:9], files, 2)
    assert cost["turns"] == 9 * 2 * 2
    assert cost["new_tokens"] == sum(sum(r["n_tokens"]) for path in files.values() for r in read_jsonl(path))
    more = make_transcripts(lambda: debater, "sciq", "debate", samples[:9], files, 3)
    assert more["turns"] == 9 * 2
    assert more["new_tokens"] == sum(r["n_tokens"][2] for path in files.values() for r in read_jsonl(path))
    none = make_transcripts(pytest.fail, "sciq", "debate", samples[:9], files, 3)
    assert none["new_tokens"] == none["turns"] == 0


def test_transcripts_of_other_samples_are_refused(debater, samples, tmp_path):
    transcripts(debater, samples[:8], tmp_path)
    with pytest.raises(ValueError, match="ids do not match"):
        transcripts(debater, samples[1:9], tmp_path)


def literal_prompt(text: str, protocol: str, said: list[str], side: int, shown: str) -> str:
    """The prompt of the turn after those that are `said`, written out."""
    turn, debating = len(said), protocol == "debate"
    names = ("Consultant", "Consultant") if protocol in ("consultancy", "market_making") else ("Debater A", "Debater B")
    opening = INTRODUCTION if debating else SHOWN
    before = "".join(f"{names[t % 2]}: {words}\n" for t, words in enumerate(said) if protocol != "independent")
    asked = ASKED[min(turn, 2) if debating else 0].format(("incorrect", "correct")[side])
    return shown.format(f"{opening}\n\n{text}\n\n{before}{asked}") + f"{names[turn % 2]}:"


def naive_transcript(debater, sample_row, protocol, seed, turns, sides=None, shown="{}\n"):
    """Without cache or batch: every token from a forward over the whole prompt. `shown`: as a chat template has it."""
    row = {"id": sample_row["id"], "sides": [], "turns": [], "n_tokens": []}
    for turn in range(turns):
        turn_of_side = 0 if protocol == "consultancy" else turn
        side = sides[turn] if sides else debate.assign_side(sample_row["id"], turn_of_side)
        text = literal_prompt(sample_row["text"], protocol, row["turns"], side, shown)
        prompt, said = debater.tokenizer(text)["input_ids"], []
        for position in range(debater.config.max_new_tokens):
            with torch.no_grad():
                logits = debater.model(torch.tensor([prompt + said]), use_cache=False).logits[:, -1]
            if position == 0:
                logits[:, debater.is_end] = -torch.inf
            key = torch.tensor([stable_hash("noise", seed, sample_row["id"], turn)])
            key = splitmix64(key, torch.tensor(position))
            token = sample(logits, key, debater.config.temperature, debater.config.top_p).item()
            if debater.is_end[token]:
                break
            said.append(token)
        row["sides"].append(side)
        row["turns"].append(" ".join(debater.tokenizer.decode(said, skip_special_tokens=True).split()))
        row["n_tokens"].append(len(said))
    return row


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox")
COMBINED = [*((family, "debate") for family in FAMILIES), ("llama", "consultancy"), ("llama", "independent")]


@pytest.mark.parametrize("family, protocol", COMBINED)
def test_the_cache_changes_nothing(family, protocol, tiny_model, samples):
    debater = make_debater(tiny_model(family))
    batch = samples[2:8]  # of several lengths
    got = run_protocol(debater, "sciq", protocol, batch, [4, 5], 4)
    assert len({n for rows in got for r in rows for n in r["n_tokens"]}) > 2  # rows left the batch at several places
    assert got == [[naive_transcript(debater, s, protocol, seed, 4) for s in batch] for seed in (4, 5)]
    begun = run_protocol(debater, "sciq", protocol, batch, [4, 5], 2)
    assert run_protocol(debater, "sciq", protocol, batch, [4, 5], 4, begun) == got


def test_zero_shot_is_the_likelihood_of_the_two_sides_about_its_median(debater, samples, monkeypatch):
    monkeypatch.setattr(debater, "batch_size", lambda *_, **__: 3)  # more than one batch
    batch, odds = [s | {"evidence": "It is so."} for s in samples[:5]], []
    asked = debater.tokens("Decide whether the answer is correct or incorrect.\nThe answer is")
    for s in batch:
        prompt, log_p = encode_question(debater, "sciq", "consultancy", s) + asked, []
        for side in ("incorrect", "correct"):
            word = debater.tokens(f" {side}")
            with torch.no_grad():
                logits = debater.model(torch.tensor([prompt + word]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            log_p.append(logits.log_softmax(-1)[range(len(word)), word].sum().item())
        odds.append(log_p[1] - log_p[0])
    wanted = [1 / (1 + math.exp(sorted(odds)[2] - x)) for x in odds]
    got = debate.zero_shot(debater, "sciq", batch)
    assert [p[1] for p in got] == pytest.approx(wanted, abs=1e-5) and [sum(p) for p in got] == pytest.approx([1] * 5)
    assert len({round(x, 6) for x in odds}) == 5
    assert debate.zero_shot(debater, "sciq", samples[:5]) != got  # the evidence is read


def test_debaters_read_the_evidence_before_the_question(debater, samples):
    ids = encode_question(debater, "sciq", "debate", samples[0] | {"evidence": "It is so."})
    assert debater.tokenizer.decode(ids) == f"{INTRODUCTION}\n\nPassage: It is so.\n{samples[0]['text']}\n\n"


def test_market_making_argues_against_the_choice(debater, samples):
    asked = []

    def choose(batch, rows):
        asked.append([(s["id"], r["id"], len(r["turns"])) for s, r in zip(batch, rows, strict=True)])
        return [(int(s["id"][1:]) + len(r["turns"]) // 2) % 2 for s, r in zip(batch, rows, strict=True)]

    [rows] = run_protocol(debater, "sciq", "market_making", samples[:6], [0], 3, None, choose)
    assert asked == [[(s["id"], s["id"], turn) for s in samples[:6]] for turn in range(3)]
    for i, (s, row) in enumerate(zip(samples[:6], rows, strict=True)):
        assert row == naive_transcript(debater, s, "market_making", 0, 3, sides=[1 - i % 2, 1 - i % 2, i % 2])


# ---- as a script ----


def test_the_script_writes_the_same_transcripts(tiny_model, samples, tmp_path):
    write_jsonl(tmp_path / "samples.jsonl", samples[:9])
    write_jsonl(tmp_path / "weak.jsonl", [{"id": s["id"], "probs": [0.9, 0.1]} for s in samples[:9]])
    flags = f"--samples samples.jsonl --strong {tiny_model('llama')} --max-new-tokens 6 --temperature 1 --seed 3 8"
    flags += " --turns 2 --out out --show 1 --protocol market_making --choices weak.jsonl"
    command = [sys.executable, ROOT / "debate.py", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    debater = Debater(ModelSpec(tiny_model("llama")), SETTINGS)
    wanted = transcripts(debater, samples[:9], tmp_path, (3, 8), 2, 8, "market_making", lambda s, r: [0] * len(s))
    assert {k: (tmp_path / f"out/seed{k}.jsonl").read_bytes() for k in (3, 8)} == wanted
    assert f"[s0] {samples[0]['text']}" in done.stdout and "Consultant, for «the answer is correct»" in done.stdout


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Flags -> exit code, stdout and stderr of debate.py on samples.jsonl."""
    monkeypatch.chdir(tmp_path)

    def debates(flags: str) -> tuple[int, str, str]:
        return run("debate", *"--samples samples.jsonl --out out".split(), *flags.split()), *capsys.readouterr()

    return debates


def test_the_script_continues_its_own_transcripts_and_no_others(tiny_model, samples, script, monkeypatch):
    def turns(seed: int) -> int:
        return len(read_jsonl(Path(f"out/seed{seed}.jsonl"))[0]["turns"])

    write_jsonl(Path("samples.jsonl"), samples[:3])
    same = f"--max-new-tokens 3 --strong {tiny_model('llama')}"
    script(f"{same} --turns 1")
    script(f"{same} --turns 2 --seed 0 1")
    assert (turns(0), turns(1)) == (2, 2)
    assert "nothing to do" in script(f"{same} --turns 2 --seed 1 --cache-tokens 99")[1]  # a setting of speed
    for other in (f"--strong {tiny_model('qwen2')}", "--protocol consultancy", "--temperature 0.9"):
        code, _, told = script(f"{same} --turns 2 {other}")
        assert code == 2 and "holds something else" in told and told.count("\n") == 1
    with monkeypatch.context() as edited:  # an ablation of the prompts
        wording = dataclasses.replace(TASKS["sciq"].wording, shown="There is a question.")
        edited.setitem(TASKS, "sciq", dataclasses.replace(TASKS["sciq"], wording=wording))
        code, _, told = script(f"{same} --turns 2")
        assert code == 2 and "wording" in told
    write_jsonl(Path("samples.jsonl"), samples[:4])
    code, _, told = script(f"{same} --turns 2")
    assert code == 2 and "inputs.samples" in told and turns(0) == 2


NO_CHOICES = ([], [{"id": "s0", "label": 1}], [{"probs": [0.5, 0.5]}], [{"id": "s1", "probs": [0.5, 0.5]}])
REFUSED = [  # flags, words of the line, rows of weak.jsonl; more in test_bad_input.py
    ("--task chess", ["chess", "sciq", "boolq"], []),
    ("--protocol duel", ["duel", "consultancy"], []),
    ("--top-p 1.5", ["--top-p 1.5"], []),
    ("--temperature -1", ["--temperature -1"], []),
    ("--protocol market_making", ["market_making", "--choices"], []),
    ("--seeds 1", ["--seeds"], []),
    *(("--protocol market_making --choices weak.jsonl", ["weak.jsonl"], rows) for rows in NO_CHOICES),
]


@pytest.mark.parametrize("flags, told, weak", REFUSED)
def test_bad_input_ends_in_one_line_before_a_model_is_loaded(flags, told, weak, samples, script, monkeypatch):
    write_jsonl(Path("samples.jsonl"), samples[:1])
    write_jsonl(Path("weak.jsonl"), weak)
    monkeypatch.setitem(ENGINES, "replicated", lambda *_: pytest.fail("a model was loaded"))
    code, _, line = script(f"--strong random-large {flags}")
    assert (code, line.count("\n")) == (2, 1) and all(word in line for word in told) and not Path("out").exists()
