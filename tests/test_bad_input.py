"""Bad input of every kind ends with exit code 2 (1 where the run itself failed) and one line that names value and remedy.

And what a malicious model's folder or a hostile id would do, it does not do.
"""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import common
import data.prepare
import debate
import train
import w2s
from common import run_script, write_jsonl
from data.models import builtin_folder

SCRIPTS = {"w2s": w2s.main, "debate": debate.main, "train": train.main, "prepare": data.prepare.main}
GOOD = [{"id": f"s{i}", "text": f"Q: why {i}? A: {i}", "label": i % 2} for i in range(8)]


def one_line(capsys, monkeypatch, script: str, flags: list) -> tuple[int, str]:
    """Exit code and stderr of a script in this process; an exception that reaches the user is raised here."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        run_script(SCRIPTS[script])
    return end.value.code, capsys.readouterr().err


def assert_told(end: tuple[int, str], code: int, words: tuple) -> None:
    assert end[0] == code and end[1].startswith("error: ") and end[1].count("\n") == 1, end
    for word in words:
        assert word in end[1], (word, end[1])


# ---- flags ----

W2S, DEBATE, TRAIN, PREPARE = "w2s", "debate", "train", "prepare"
FLAGS = [  # script, flags behind good ones, what the line must name
    (W2S, ["--preset", "large"], ("large", "smoke", "paper")),
    (W2S, ["--tasks", "sciq", "sciq"], ("--tasks sciq sciq", "once")),
    (W2S, ["--methods", "ours", "single", "ours"], ("--methods", "once")),
    (W2S, ["--seeds", "1", "1"], ("--seeds 1 1", "once")),
    (W2S, ["--seeds", "-2"], ("--seeds", "-2")),
    (W2S, ["--seeds", "1.5"], ("--seeds", "1.5")),
    (W2S, ["--seeds"], ("--seeds",)),
    (W2S, ["--lr", "nan"], ("--lr nan", "greater than 0")),
    (W2S, ["--lr", "inf"], ("--lr inf", "finite")),
    (W2S, ["--weak-lr", "-inf"], ("--weak-lr",)),
    (W2S, ["--head-lr", "0"], ("--head-lr 0.0",)),
    (W2S, ["--head-epochs", "-3"], ("--head-epochs",)),
    (W2S, ["--batch-size", "0"], ("--batch-size 0",)),
    (W2S, ["--max-new-tokens", "0"], ("--max-new-tokens 0",)),
    (W2S, ["--limit-train", "-1"], ("--limit-train",)),
    (W2S, ["--limit-test", "0"], ("--limit-test 0",)),
    (W2S, ["--temperature", "nan"], ("--temperature nan", ">= 0")),
    (W2S, ["--temperature", "inf"], ("--temperature inf",)),
    (W2S, ["--top-p", "0"], ("--top-p 0.0", "(0, 1]")),
    (W2S, ["--dtype", "float16"], ("--dtype", "float16", "bfloat16")),
    (W2S, ["--engine", "magic"], ("--engine", "magic", "vllm")),
    (W2S, ["--aux-warmup", "steep"], ("--aux-warmup", "steep", "linear")),
    (W2S, ["--no-such-flag"], ("--no-such-flag", "--help")),
    (W2S, ["--out", ""], ("--out ''", "folder")),
    (W2S, ["--out", "{tmp}/good.jsonl"], ("good.jsonl", "not a folder")),
    (W2S, ["--out", "{tmp}/good.jsonl/deep"], ("good.jsonl", "can be written")),
    (W2S, ["--data-dir", "{tmp}/good.jsonl"], ("--data-dir", "good.jsonl", "no such folder")),
    (W2S, ["--data-dir", "{tmp}/empty"], ("--data-dir", "sciq/train.jsonl")),
    (W2S, ["--weak", ""], ("model ''", "built-in")),
    (W2S, ["--strong", ":3"], ("model ':3'", "built-in")),
    (W2S, ["--strong", "random-small:0"], ("random-small:0", "at least 1")),
    (W2S, ["--strong", "random-small:3"], ("random-small", "2 layers")),
    (W2S, ["--weak", "no/such/model"], ("no/such/model", "smollm2-135m")),
    (W2S, ["--weak", "own er/na me"], ("own er/na me",)),
    (W2S, ["--weak", "owner/name"], ("owner/name",)),  # no network
    (W2S, ["--strong", "../nowhere"], ("../nowhere", "no such folder")),
    (W2S, ["--chat"], ("--chat", "random-large", "no chat template")),
    (DEBATE, ["--task", "../sciq"], ("../sciq", "boolq")),
    (DEBATE, ["--protocol", "quarrel"], ("quarrel", "market_making")),
    (DEBATE, ["--seed", "one"], ("--seed", "one")),
    (DEBATE, ["--cache-tokens", "0"], ("--cache-tokens 0",)),
    (DEBATE, ["--max-new-tokens", "-1"], ("--max-new-tokens -1",)),
    (DEBATE, ["--temperature", "inf"], ("--temperature inf",)),
    (DEBATE, ["--top-p", "nan"], ("--top-p nan",)),
    (DEBATE, ["--show", "-1"], ("--show -1",)),
    (DEBATE, ["--samples", "{tmp}"], ("--samples", "no such file")),
    (DEBATE, ["--out", ""], ("--out ''",)),
    (DEBATE, ["--out", "{tmp}/good.jsonl/x"], ("good.jsonl", "not a directory")),
    (DEBATE, ["--choices", "{tmp}/good.jsonl"], ("--choices", "no other does")),
    (DEBATE, ["--strong", "nowhere"], ("nowhere", "random-small")),
    (TRAIN, ["--loss", "brier"], ("brier", "logconf")),
    (TRAIN, ["--lr", "inf"], ("--lr inf", "finite")),
    (TRAIN, ["--max-tokens", "0"], ("--max-tokens 0",)),
    (TRAIN, ["--max-tokens-per-forward", "-5"], ("--max-tokens-per-forward -5",)),
    (TRAIN, ["--aux-coef", "1.5"], ("--aux-coef 1.5", "from 0 to 1")),
    (TRAIN, ["--warmup-frac", "nan"], ("--warmup-frac nan", "from 0 to 1")),
    (TRAIN, ["--alpha", "-1"], ("--alpha -1",)),
    (TRAIN, ["--beta", "inf"], ("--beta inf",)),
    (TRAIN, ["--aux-warmup", "steep"], ("--aux-warmup", "linear")),
    (TRAIN, ["--out", "{tmp}"], ("--out", "does not exist yet")),
    (TRAIN, ["--out", ""], ("--out ''",)),
    (TRAIN, ["--out", "{tmp}/good.jsonl/run"], ("good.jsonl", "not a directory")),
    (TRAIN, ["--out", "{tmp}/" + 300 * "x"], ("--out", "too long")),
    (TRAIN, ["--test", "{tmp}"], ("--test", "no such file")),
    (PREPARE, ["--task", "chess"], ("chess", "sciq")),
    (PREPARE, ["--limit-train", "-1"], ("--limit-train -1",)),
    (PREPARE, ["--out", "{tmp}/good.jsonl/x"], ("good.jsonl", "not a directory")),
    (PREPARE, [], ("allenai/sciq", "--data-dir")),  # no network
]


@pytest.fixture
def good(tmp_path):
    """Flags of each script that would work, and the folder that they lie in."""
    write_jsonl(tmp_path / "good.jsonl", GOOD)
    (tmp_path / "empty").mkdir()
    rows, out = str(tmp_path / "good.jsonl"), ["--out", str(tmp_path / "out")]
    smoke = [
        "run",
        "--preset",
        "smoke",
        "--tasks",
        "sciq",
        "--seeds",
        "0",
        "--methods",
        "single",
        "--limit-train",
        "24",
    ]
    return tmp_path, {
        W2S: [*smoke, *out],
        DEBATE: ["--samples", rows, "--strong", "random-small", *out],
        TRAIN: ["--model", "random-small", "--train", rows, "--test", rows, *out],
        PREPARE: ["--task", "sciq", *out],
    }


@pytest.mark.parametrize("script, flags, told", FLAGS, ids=[f"{s} {' '.join(f)[:40]}" for s, f, _ in FLAGS])
def test_bad_flags(script, flags, told, good, capsys, monkeypatch):
    tmp, defaults = good
    flags = [f.replace("{tmp}", str(tmp)) for f in flags]
    assert_told(one_line(capsys, monkeypatch, script, [*defaults[script], *flags]), 2, told)
    assert not list((tmp / "out").rglob("*.jsonl"))


# ---- files of samples, by train.py and debate.py ----


def rows(*changes: dict) -> bytes:
    """Good rows, the last ones changed."""
    table = [dict(r) for r in GOOD]
    for row, change in zip(table[::-1], changes, strict=False):
        row.update(change)
    return "".join(json.dumps(r) + "\n" for r in table).encode()


FILES = {  # content, what is told of it
    "empty": (b"", ("no rows",)),
    "blank lines": (b"\n \n\n", ("no rows",)),
    "latin-1": (rows({"text": "caf"}).replace(b"caf", b"caf\xe9"), ("not UTF-8", "byte")),
    "UTF-16": (rows().decode().encode("utf-16"), ("not UTF-8", "convert")),
    "UTF-16 without mark": (rows().decode().encode("utf-16-le"), (":1: not JSON",)),
    "NULs": (b"\x00" * 100, (":1: not JSON",)),
    "gzip under another name": (b"\x1f\x8b\x08\x00", ("not UTF-8",)),
    "CSV": (b"id,text,label\ns0,why,1\n", (":1: not JSON",)),
    "one array": (json.dumps(GOOD).encode(), (":1: expected a JSON object",)),
    "cut off": (rows()[:-9], (":8: not JSON",)),
    "deep": (b"[" * 200_000, (":1: not JSON",)),
    "long number": (b'{"id": ' + b"1" * 5000 + b"}", (":1: not JSON",)),
    "half a pair": (rows({"text": "\ud800"}), (":8: not JSON", "surrogates")),
    "no id": (rows({"id": None}), ("lacks 'id' (row 8)",)),
    "id NaN": (rows({"id": float("nan")}), ("id nan of row 8", "string")),
    "id number": (rows({"id": 7}), ("id 7 of row 8", "string")),
    "id list": (rows({"id": ["s7"]}), ("id ['s7'] of row 8", "string")),
    "id twice": (rows({"id": "s0"}), ("id 's0' is a duplicate",)),
    "text number": (rows({"text": 5}), ("text 5 of row 8", "string")),
    "text empty": (rows({"text": ""}), ("lacks 'text' (row 8)",)),
}
LABELS = {
    "probs NaN": (rows({"probs": [float("nan"), 1.0]}), ("'s7'", "nan", "2 probabilities")),
    "probs negative": (rows({"probs": [-0.5, 1.5]}), ("'s7'", "-0.5")),
    "probs of sum 2": (rows({"probs": [1.0, 1.0]}), ("'s7'", "[1.0, 1.0]")),
    "probs infinite": (rows({"probs": [float("inf"), 0]}), ("'s7'", "inf")),
    "probs of length 1": (rows({"probs": [1.0]}), ("'s7'", "[1.0]")),
    "probs none": (rows({"probs": []}), ("'s7'", "[]")),
    "probs words": (rows({"probs": ["yes", "no"]}), ("'s7'", "yes")),
    "probs an object": (rows({"probs": {"0": 1}}), ("'s7'", "{'0': 1}")),
    "label NaN": (rows({"label": float("nan")}), ("'s7'", "label nan", "0 to 1")),
    "label word": (rows({"label": "yes"}), ("'s7'", "'yes'")),
    "label 0.5": (rows({"label": 0.5}), ("'s7'", "0.5")),
    "label -1": (rows({"label": -1}), ("'s7'", "-1")),
    "label 2": (rows({"label": 2}), ("'s7'", "label 2")),
    "no label": (rows({"label": None}), ("'s7'", "None")),
    "one class": (rows(*[{"label": 1}] * 8), ("all 8 rows have the same label",)),
    "three classes": (
        rows(*[{"probs": [0.2, 0.3, 0.5]}] * 8),
        ("3 classes", "--loss logconf takes 2 classes"),
    ),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("script, flag", [(TRAIN, "--train"), (TRAIN, "--test"), (DEBATE, "--samples")])
def test_bad_files(script, flag, kind, good, capsys, monkeypatch):
    tmp, defaults = good
    content, told = FILES[kind]
    (tmp / "bad.jsonl").write_bytes(content)
    end = one_line(capsys, monkeypatch, script, [*defaults[script], flag, tmp / "bad.jsonl"])
    assert_told(end, 2, ("bad.jsonl", *told))
    assert not (tmp / "out").exists()


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_none(kind, good, capsys, monkeypatch):
    tmp, defaults = good
    content, told = LABELS[kind]
    (tmp / "bad.jsonl").write_bytes(content)
    flags = [*defaults[TRAIN], "--loss", "logconf", "--train", tmp / "bad.jsonl"]
    assert_told(one_line(capsys, monkeypatch, TRAIN, flags), 2, told)
    assert not (tmp / "out").exists()


@pytest.mark.parametrize("kind", ["probs NaN", "probs of length 1", "probs words", "probs an object"])
def test_choices_that_are_none(kind, good, capsys, monkeypatch):
    tmp, defaults = good
    table = [{"probs": [0.5, 0.5]} | json.loads(line) for line in LABELS[kind][0].splitlines()]
    write_jsonl(tmp / "bad.jsonl", table)
    flags = [*defaults[DEBATE], "--protocol", "market_making", "--choices", tmp / "bad.jsonl"]
    assert_told(one_line(capsys, monkeypatch, DEBATE, flags), 2, LABELS[kind][1])


def test_a_byte_order_mark_changes_nothing(tmp_path):
    write_jsonl(tmp_path / "plain.jsonl", GOOD)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "plain.jsonl").read_bytes())
    assert common.read_samples(tmp_path / "marked.jsonl", "text") == GOOD


@pytest.mark.parametrize("what", ["no rows", "other ids", "no turns"])
def test_transcripts_that_are_none_are_not_continued(what, good, capsys, monkeypatch):
    tmp, defaults = good
    there = {"no rows": b"{}\n", "other ids": rows({"id": "x"}), "no turns": rows()}[what]
    (tmp / "out").mkdir()
    (tmp / "out/seed0.jsonl").write_bytes(there)
    assert_told(one_line(capsys, monkeypatch, DEBATE, defaults[DEBATE]), 2, ("seed0.jsonl",))
    assert (tmp / "out/seed0.jsonl").read_bytes() == there


# ---- sources of w2s.py ----

SCIQ = {"question": "q", "correct_answer": "a", "distractor1": "b", "distractor2": "c", "distractor3": "d"}
BOOLQ = {"question": "is it?", "answer": True, "passage": "it is"}
COSMOS = {"context": "c", "question": "q", "answer0": "a", "answer1": "b", "answer2": "c", "answer3": "d", "label": 0}
SOURCES = {  # task, rows beside good ones (None: these alone), told
    "a field is missing": ("sciq", [{"question": "q"}], ("sciq", "'correct_answer'")),
    "a number for a text": ("sciq", [SCIQ | {"correct_answer": 4}], ("correct_answer '4'", "not a text")),
    "a word for a truth": ("boolq", [BOOLQ | {"answer": "false"}], ("answer 'false'", "true or false")),
    "a hidden label": ("cosmos_qa", [COSMOS | {"label": -1}], ("label '-1'", "0 to 3")),
    "a label out of range": ("cosmos_qa", [COSMOS | {"label": 4}], ("label '4'", "0 to 3")),
    "a label in quotes": ("cosmos_qa", [COSMOS | {"label": "1"}], ("label '1'", "0 to 3")),
    "a list for a text": ("anthropic_hh", [{"chosen": [], "rejected": "no"}], ("chosen '[]'", "not a text")),
    "no rows": ("sciq", None, ("no sample left",)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_bad_sources(kind, good, capsys, monkeypatch):
    tmp, defaults = good
    task, added, told = SOURCES[kind]
    for split in ("train", data.prepare.TASKS[task].test_split):
        have = common.read_jsonl(ROOT / f"data/tiny/{task}/{split}.jsonl")
        write_jsonl(tmp / f"source/{task}/{split}.jsonl", [] if added is None else [*added, *have])
    flags = [*defaults[W2S], "--tasks", task, "--data-dir", tmp / "source"]
    assert_told(one_line(capsys, monkeypatch, W2S, flags), 2, told)
    assert not (tmp / f"out/{task}/data/manifest.json").exists()


def test_sources_of_one_class(good, capsys, monkeypatch):
    tmp, defaults = good
    for split in ("train", "validation"):
        have = common.read_jsonl(ROOT / f"data/tiny/boolq/{split}.jsonl")
        write_jsonl(tmp / f"source/boolq/{split}.jsonl", [r | {"answer": True} for r in have])
    flags = [*defaults[W2S], "--tasks", "boolq", "--data-dir", tmp / "source"]
    assert_told(one_line(capsys, monkeypatch, W2S, flags), 2, ("boolq", "have label 1"))


def test_a_row_with_nothing_to_choose_from_is_dropped(tmp_path):
    alike = COSMOS | {f"answer{i}": "a" for i in range(4)}
    samples, counts = data.prepare.make_samples("cosmos_qa", [COSMOS | {"question": "other"}, alike], 0)
    assert len(samples) == 1 and counts["incomplete"] == 1
    empty = {"chosen": "", "rejected": " "}
    assert data.prepare.make_samples("anthropic_hh", [empty], 0)[1]["incomplete"] == 1


# ---- models ----


def change(folder: Path, file: str, **values) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def without(folder: Path, file: str, *keys: str) -> None:
    have = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in have.items() if k not in keys}))


def change_weights(folder: Path, how) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(how(weights), folder / "model.safetensors", metadata={"format": "pt"})


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as f:
        pickle.dump(Payload(folder.parent / "ran"), f)


def remote_code(folder: Path) -> None:
    change(
        folder, "config.json", model_type="evil", auto_map={"AutoConfig": "modeling_x.C", "AutoModel": "modeling_x.M"}
    )
    (folder / "modeling_x.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")


def remote_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["modeling_x.T", None]})
    (folder / "modeling_x.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")


def link(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "outside.safetensors")


def index(folder: Path, name) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    weight_map = {"model.embed_tokens.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def huge(folder: Path) -> None:
    os.truncate(folder / "config.json", 2 * 2**30)  # sparse


def drop_a_token(folder: Path) -> None:
    """The model's vocabulary ends before the tokenizer's."""
    change(folder, "config.json", vocab_size=200)
    change_weights(folder, lambda w: {k: v[:200].clone() if "embed" in k else v for k, v in w.items()})


def no_end(folder: Path) -> None:
    without(folder, "tokenizer_config.json", "eos_token")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


MODELS = {
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "config cut off": (lambda f: os.truncate(f / "config.json", 20), ("no readable config.json",)),
    "config an array": (lambda f: (f / "config.json").write_text("[]"), ("no readable config.json",)),
    "config of 2 GB": (huge, ("config.json", str(2 * 2**30))),
    "unknown architecture": (lambda f: change(f, "config.json", model_type="evil"), ("evil",)),
    "no architecture": (lambda f: without(f, "config.json", "model_type"), ("model_type",)),
    "wrong width": (lambda f: change(f, "config.json", hidden_size=48), ()),
    "width a word": (lambda f: change(f, "config.json", hidden_size="wide"), ()),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors", "never pickles")),
    "pickled weights": (pickled, ("model.safetensors", "never pickles")),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 2000), ()),
    "weights no tensors": (lambda f: (f / "model.safetensors").write_bytes(b"{}" * 99), ()),
    "a weight is missing": (
        lambda f: change_weights(f, lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up" not in k}),
        ("lack 1 weights", "layers.1.mlp.up_proj"),
    ),
    "an index that leaves the folder": (lambda f: index(f, "../outside.safetensors"), ("../outside.safetensors",)),
    "an index of numbers": (lambda f: index(f, 7), ("'7'",)),
    "a link out of the folder": (link, ("model.safetensors is a link", "copy")),
    "remote code": (remote_code, ("code of its own", "never run")),
    "a remote tokenizer": (remote_tokenizer, ()),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ()),
    "tokenizer cut off": (lambda f: os.truncate(f / "tokenizer.json", 100), ()),
    "no end of text": (no_end, ("no end-of-text token",)),
    "more tokens than the model has": (drop_a_token, ("token 256", "199")),
}


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(builtin_folder("random-small"), tmp_path / "a model"))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("script, flag", [(TRAIN, "--model"), (DEBATE, "--strong")])
def test_bad_models(script, flag, kind, good, model, capsys, monkeypatch):
    tmp, defaults = good
    spoil, told = MODELS[kind]
    spoil(model)
    assert_told(one_line(capsys, monkeypatch, script, [*defaults[script], flag, model]), 2, ("a model'", *told))
    assert not (tmp / "ran").exists() and not (tmp / "out").exists()


@pytest.mark.parametrize("kind", ["no weights", "pickled weights", "no end of text", "more tokens than the model has"])
def test_w2s_refuses_a_bad_model_before_it_writes(kind, good, model, capsys, monkeypatch):
    tmp, defaults = good
    MODELS[kind][0](model)
    end = one_line(capsys, monkeypatch, W2S, [*defaults[W2S], "--strong", model])
    assert_told(end, 2, MODELS[kind][1])
    assert not (tmp / "ran").exists() and not (tmp / "out").exists()


def test_an_encoder_is_no_debater_and_no_student(good, model, capsys, monkeypatch):
    from transformers import BertConfig, BertForMaskedLM

    tmp, defaults = good
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    (model / "config.json").unlink()
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(model)
    end = one_line(capsys, monkeypatch, TRAIN, [*defaults[TRAIN], "--model", model])
    assert_told(end, 2, ("bert",))


@pytest.mark.parametrize("script, flag", [(TRAIN, "--model"), (DEBATE, "--strong")])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_not_finite_end_the_run(script, flag, temperature, good, model, capsys, monkeypatch):
    tmp, defaults = good
    change_weights(model, lambda w: {k: v * float("nan") if "norm" in k else v for k, v in w.items()})
    flags = [*defaults[script], flag, model]
    end = one_line(capsys, monkeypatch, script, [*flags, "--temperature", temperature] if script == DEBATE else flags)
    assert_told(end, 1, ("loss is nan at step 0 of",) if script == TRAIN else ("logits are not finite",))


def test_a_step_that_explodes_after_the_last_loss_is_seen(good, capsys, monkeypatch):
    tmp, defaults = good
    flags = [*defaults[TRAIN], "--lr", "1e38", "--epochs", "1"]
    assert_told(one_line(capsys, monkeypatch, TRAIN, flags), 1, ("logits of", "--lr"))
    assert [f.name for f in (tmp / "out").iterdir()] == ["steps.jsonl"]
    assert_told(
        one_line(capsys, monkeypatch, TRAIN, flags), 1, ("logits of", "--lr")
    )  # such a folder may be used again


def test_triton_without_a_gpu(good, capsys, monkeypatch):
    import triton

    tmp, defaults = good
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in (W2S, TRAIN):
        end = one_line(capsys, monkeypatch, script, [*defaults[script], "--kernels", "triton"])
        assert_told(end, 2, ("'triton'", "no CUDA GPU", "reference"))


# ---- the machine ----


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up the rights of root")
def test_no_permission(good):
    """Of a user without rights: a folder that it may not write."""
    tmp, defaults = good

    for path in (tmp, *tmp.parents):
        path.chmod(path.stat().st_mode | 0o055)
    with open(tmp / "told", "w+") as stderr:
        child = os.fork()
        if child == 0:
            os.setgid(65534), os.setuid(65534)
            sys.stderr, codes = stderr, []
            for script in (TRAIN, W2S):
                sys.argv = [script, *defaults[script]]
                try:
                    run_script(SCRIPTS[script])
                except SystemExit as e:
                    codes.append(e.code)
            stderr.flush()
            os._exit(0 if codes == [2, 2] else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = (tmp / "told").read_text().splitlines()
    assert code == 0 and len(told) == 2 and all("--out" in line and "not writable" in line for line in told), told


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(common.InputError, match=r"rows\.jsonl: cannot be read \(Permission denied\)"):
        common.read_jsonl(tmp_path / "rows.jsonl")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    common.write_text(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        common.write_text(tmp_path / "a.txt", "new and longer")
    assert (tmp_path / "a.txt").read_text() == "old"


# ---- security ----


def sources() -> list[Path]:
    found = [p for p in ROOT.rglob("*.py") if not {".venv", "tests", "out"} & set(p.relative_to(ROOT).parts)]
    assert len(found) > 10
    return found


def forbidden(tree: ast.AST) -> list[str]:
    """Calls that run text or data as code, and flags that let others' code run."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [
                n for n in names if n.split(".")[0] in ("pickle", "dill", "marshal", "shelve", "cloudpickle", "joblib")
            ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "os.system", "os.popen", "torch.load", "np.load", "__import__"):
                found.append(name)
            for k in node.keywords:
                if k.arg in ("shell", "trust_remote_code", "allow_pickle") and not (
                    isinstance(k.value, ast.Constant) and k.value.value is False
                ):
                    found.append(f"{name}({ast.unparse(k)})")
    return found


def test_no_source_runs_text_or_data_as_code():
    bad = "import pickle\neval(x)\nos.system(x)\nf(shell=True)\nf(trust_remote_code=True)\nf(trust_remote_code=False)"
    assert sorted(forbidden(ast.parse(bad))) == [
        "eval",
        "f(shell=True)",
        "f(trust_remote_code=True)",
        "os.system",
        "pickle",
    ]
    assert {p.name: forbidden(ast.parse(p.read_text())) for p in sources() if forbidden(ast.parse(p.read_text()))} == {}


def test_whatever_loads_from_a_model_says_no_to_its_code():
    """Not said, the libraries ask at a terminal, and yes is one key away."""
    calls = [
        ast.unparse(node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.search(r"from_pretrained$", ast.unparse(node.func))
    ]
    of_users = [c for c in calls if "spec.source()" in c or "**source, **changes" in c]
    assert len(of_users) == 3 and all("trust_remote_code=False" in c for c in of_users)


def test_ids_of_a_file_name_no_path(good, capsys, monkeypatch):
    tmp, defaults = good
    names = ["../../escaped", "/etc/escaped", "..", "a/b", "\x00", "~", "$(touch escaped)", "%2e%2e/x"]
    write_jsonl(tmp / "good.jsonl", [r | {"id": n} for r, n in zip(GOOD, names, strict=True)])
    before = {p for p in tmp.parent.rglob("*")}
    for script, more in ((TRAIN, []), (DEBATE, ["--max-new-tokens", "2", "--turns", "1"])):
        monkeypatch.setattr(sys, "argv", [script, *defaults[script], *more, "--out", str(tmp / "out" / script)])
        run_script(SCRIPTS[script])
    new = {p for p in tmp.parent.rglob("*")} - before
    assert new and all(p.is_relative_to(tmp / "out") for p in new)
    assert [r["id"] for r in common.read_jsonl(tmp / "out/debate/seed0.jsonl")] == names


def test_packages_that_some_runs_need_are_not_needed_by_the_others():
    """Nor are plots and reports: a machine that trains may lack them all."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("datasets", "gguf", "accelerate", "matplotlib", "jinja2", "vllm")))
import bench.debates, bench.kernels, bench.steps, data.models, data.prepare, data.convert_qwen, debate, heads, train
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
