"""Bad input of every kind ends with exit code 2 (1 where the run itself fails) and one line with value and remedy."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import triton
from conftest import ROOT, run
from safetensors.torch import load_file, save_file

import common
import data.prepare
from common import read_jsonl, write_jsonl, write_text
from data.models import builtin_folder
from kernels import resolve

GOOD = [{"id": f"s{i}", "text": f"Q: why {i}? A: {i}", "label": i % 2} for i in range(8)]
W2S, DEBATE, TRAIN, PREPARE = "w2s", "debate", "train", "data.prepare"
FLAGS = {  # that would work
    W2S: "run --preset smoke --tasks sciq --seeds 0 --methods single --limit-train 24",
    DEBATE: "--samples good.jsonl --strong random-small",
    TRAIN: "--model random-small --train good.jsonl --test good.jsonl",
    PREPARE: "--task sciq",
    "bench.orders": "--results run --seeds 0",
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a script with more flags and sees that it ends with one line that holds some words; returns the folder."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", GOOD)

    def check(script: str, flags: list, told: tuple, code: int = 2) -> None:
        ended = run(script, *FLAGS[script].split(), "--out", "out", *flags)
        line = capsys.readouterr().err
        assert (ended, line.startswith("error: "), line.count("\n")) == (code, True, 1), line
        assert [word for word in told if word not in line] == [], line

    return check


# ---- flags ----

WORD_BY_WORD = {  # every word of these stands in the line
    W2S: [
        "--tasks sciq sciq", "--methods ours single ours", "--methods oracle", "--seeds 1 1", "--seeds -2",
        "--seeds 1.5", "--seeds", "--seed 0", "--lr nan", "--lr inf", "--lr fast", "--weak-lr 0.0", "--head-lr 0.0",
        "--head-epochs -3", "--epochs 0", "--batch-size 0", "--max-new-tokens 0", "--limit-train -1", "--limit-test 0",
        "--max-sample-tokens 0", "--cache-tokens 0", "--max-tokens-per-forward 0", "--temperature nan", "--temperature inf",
        "--top-p 0.0", "--top-p 1.2", "--dtype float16", "--engine magic", "--aux-warmup steep", "--transcript middle",
        "--weak-gpus -1", "--strong-gpus -1", "--lora-rank -1", "--lora-alpha 0", "--gpus 2", "--data-dir nowhere", "--data-dir good.jsonl", "--out good.jsonl",
    ],
    DEBATE: [
        "--task ../sciq", "--protocol quarrel", "--seed one", "--turns 0", "--cache-tokens 0", "--max-new-tokens -1",
        "--temperature inf", "--top-p nan", "--show -1", "--samples nowhere",
    ],
    TRAIN: [
        "--los brier", "--loss brier", "--epochs two", "--batch-size 0", "--lr -1.0", "--lr inf", "--max-tokens 0", "--max-tokens-per-forward -5", "--aux-coef 1.5", "--warmup-frac nan",
        "--alpha -1.0", "--beta inf", "--aux-warmup steep", "--test nowhere", "--lora-rank -1", "--lora-alpha 0",
    ],
    PREPARE: ["--task chess", "--limit-train -1"],
}  # fmt: skip
MORE_TOLD = [  # script, flags, what the line names beside
    (W2S, "--preset large", ["smoke", "tiny", "small", "paper-lora", "paper"]),
    (W2S, "--tasks chess", ["chess", "sciq", "boolq"]),
    (W2S, "--lr 0", ["--lr 0.0", "greater than 0", "finite"]),
    (W2S, "--top-p 2", ["--top-p 2.0", "greater than 0", "at most 1"]),
    (W2S, "--weak-lr -inf", ["--weak-lr"]),
    (W2S, "--no-such-flag", ["--no-such-flag", "--help"]),
    (W2S, "--data-dir .", ["--data-dir", "sciq/train.jsonl"]),
    (W2S, "--weak ''", ["model ''", "built-in"]),
    (W2S, "--strong :3", ["model ':3'", "built-in"]),
    (W2S, "--strong random-small:0", ["random-small:0", "at least 1"]),
    (W2S, "--strong random-large:9", ["random-large", "9", "2 layers"]),
    (W2S, "--weak nowhere", ["nowhere", "random-small", "smollm2-135m"]),
    (W2S, "--weak 'own er/na me'", ["own er/na me"]),
    (W2S, "--weak owner/name", ["owner/name"]),  # no network
    (W2S, "--strong ../nowhere", ["../nowhere", "no such folder"]),
    (W2S, "--strong random-large:²", ["random-large:²"]),
    (W2S, "--max-sample-tokens 1025", ["--max-sample-tokens 1025", "at most 1024"]),
    (W2S, "--engine sharded", ["--engine sharded", "torchrun"]),
    (W2S, "--head-only --keep-models", ["--head-only", "--keep-models"]),
    (W2S, "--chat", ["--chat", "random-large", "no chat template"]),
    (DEBATE, "--strong nowhere", ["nowhere", "built in"]),
    (DEBATE, "--chat", ["--chat", "random-small", "no chat template"]),
    (DEBATE, "--choices good.jsonl", ["--choices", "no other does"]),
    (TRAIN, "--out .", ["--out", "does not exist yet"]),
    (TRAIN, "--out " + 300 * "x", ["--out", "too long"]),
    *((script, "--out good.jsonl/x", ["good.jsonl is not a directory"]) for script in FLAGS),
    *((script, "--out ''", ["--out ''"]) for script in (W2S, DEBATE, TRAIN)),
    (PREPARE, "", ["allenai/sciq", "--data-dir"]),  # no network
]
BAD_FLAGS = [(s, flags, flags.split()) for s in WORD_BY_WORD for flags in WORD_BY_WORD[s]] + MORE_TOLD


@pytest.mark.parametrize("script, flags, told", BAD_FLAGS, ids=[f"{s} {flags[:40]}" for s, flags, _ in BAD_FLAGS])
def test_bad_flags(script, flags, told, refused):
    refused(script, shlex.split(flags), told)
    assert not list(Path("out").rglob("*.jsonl"))


def test_processes_that_share_a_gpu_train_alone(refused, monkeypatch):
    monkeypatch.setattr(common, "processes_per_gpu", lambda: 3)
    monkeypatch.setattr("w2s.world", lambda: common.Ranks(0, 3))
    for flags in ([], ["--weak-gpus", "1"], ["--weak-gpus", "1", "--strong-gpus", "1", "--engine", "sharded"]):
        refused(W2S, flags, ("3 processes", "--weak-gpus 1", "--strong-gpus 1", "--engine replicated"))
    refused(TRAIN, [], ("3 processes", "one process per GPU"))
    refused(DEBATE, ["--engine", "sharded"], ("3 processes", "--engine replicated"))
    assert not Path("out").exists()


@pytest.mark.parametrize("command, told", [("dance", "run, plan, status, report"), ("report", "python w2s.py run")])
def test_bad_commands(command, told, tmp_path, capsys):
    assert run("w2s", command, "--preset", "smoke", "--out", tmp_path / "out") == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- files of samples, by train.py and debate.py ----


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def rows(**change) -> bytes:
    """Good rows, the last one changed."""
    return lines([*GOOD[:-1], GOOD[-1] | change])


FILES = {  # content, what is told of it
    "empty": (b"", ["no rows"]),
    "blank lines": (b"\n \n\n", ["no rows"]),
    "latin-1": (rows(text="caf").replace(b"caf", b"caf\xe9"), ["not UTF-8", "byte"]),
    "UTF-16": (rows().decode().encode("utf-16"), ["not UTF-8", "convert"]),
    "UTF-16 without mark": (rows().decode().encode("utf-16-le"), [":1: not JSON"]),
    "CSV": (b"id,text,label\ns0,why,1\n", [":1: not JSON"]),
    "one array": (json.dumps(GOOD).encode(), [":1: expected a JSON object"]),
    "cut off": (rows()[:-9], [":8: not JSON"]),
    "deep": (b"[" * 200_000, [":1: not JSON"]),
    "long number": (b'{"id": ' + b"1" * 5000 + b"}", [":1: not JSON"]),
    "half a pair": (rows(text="\ud800"), [":8: not JSON", "surrogates"]),
    "no id": (rows(id=None), ["lacks 'id' (row 8)"]),
    "id NaN": (rows(id=float("nan")), ["id nan of row 8", "string"]),
    "id number": (rows(id=7), ["id 7 of row 8", "string"]),
    "id twice": (rows(id="s0"), ["id 's0' is a duplicate"]),
    "text number": (rows(text=5), ["text 5 of row 8", "string"]),
    "text empty": (rows(text=""), ["lacks 'text' (row 8)"]),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("script, flag", [(TRAIN, "--train"), (TRAIN, "--test"), (DEBATE, "--samples")])
def test_bad_files(script, flag, kind, refused):
    content, told = FILES[kind]
    Path("bad.jsonl").write_bytes(content)
    refused(script, [flag, "bad.jsonl"], ["bad.jsonl", *told])
    assert not Path("out").exists()


NAN, INF = float("nan"), float("inf")
NO_PROBS = [[NAN, 1.0], [-0.5, 1.5], [1.0, 1.0], [INF, 0], [1.0], [], ["yes", "no"], {"0": 1}]
NO_LABELS = [NAN, "yes", 0.5, -1, 2, None]


@pytest.mark.parametrize("change", [*({"probs": x} for x in NO_PROBS), *({"label": x} for x in NO_LABELS)], ids=str)
def test_labels_that_are_none(change, refused):
    told = ["'s7'", *map(repr, change.values())]
    Path("bad.jsonl").write_bytes(rows(**change))
    refused(TRAIN, ["--train", "bad.jsonl"], told)
    assert not Path("out").exists()
    if "probs" in change:
        write_jsonl(Path("bad.jsonl"), [{"probs": [0.5, 0.5]} | row for row in [*GOOD[:-1], GOOD[-1] | change]])
        refused(DEBATE, ["--protocol", "market_making", "--choices", "bad.jsonl"], told)


def test_labels_that_cannot_be_learned(refused):
    for change, told in (({"label": 1}, "all 8 rows have the same label"), ({"probs": [0.2, 0.3, 0.5]}, "3 classes")):
        write_jsonl(Path("bad.jsonl"), [r | change for r in GOOD])
        refused(TRAIN, ["--loss", "logconf", "--train", "bad.jsonl"], [told])


def test_a_byte_order_mark_changes_nothing(tmp_path):
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + rows())
    assert common.read_samples(tmp_path / "marked.jsonl", "text") == GOOD


@pytest.mark.parametrize("content", [b"{}\n", rows(id="x"), rows()], ids=["no rows", "other ids", "no turns"])
def test_transcripts_that_are_none_are_not_continued(content, refused):
    Path("out").mkdir()
    Path("out/seed0.jsonl").write_bytes(content)
    refused(DEBATE, [], ["seed0.jsonl"])
    assert Path("out/seed0.jsonl").read_bytes() == content


# ---- sources of w2s.py ----

SCIQ = {"question": "q", "correct_answer": "a", "distractor1": "b", "distractor2": "c", "distractor3": "d"}
BOOLQ = {"question": "is it?", "answer": True, "passage": "it is"}
COSMOS = {"context": "c", "question": "q", "answer0": "a", "answer1": "b", "answer2": "c", "answer3": "d", "label": 0}
SOURCES = [  # task, what becomes of its rows, told
    ("sciq", lambda rows: [{"question": "q"}, *rows], ["sciq", "'correct_answer'"]),
    ("sciq", lambda rows: [SCIQ | {"correct_answer": 4}, *rows], ["correct_answer '4'", "not a text"]),
    ("sciq", lambda rows: [], ["no sample left"]),
    ("boolq", lambda rows: [BOOLQ | {"answer": "false"}, *rows], ["answer 'false'", "one of false, true"]),
    ("boolq", lambda rows: [r | {"answer": True} for r in rows], ["boolq", "have label 1"]),
    ("cosmos_qa", lambda rows: [COSMOS | {"label": -1}, *rows], ["label '-1'", "one of 0, 1, 2, 3"]),  # hidden
    ("cosmos_qa", lambda rows: [COSMOS | {"label": 4}, *rows], ["label '4'", "one of 0, 1, 2, 3"]),
    ("cosmos_qa", lambda rows: [COSMOS | {"label": "1"}, *rows], ["label '1'", "one of 0, 1, 2, 3"]),
    ("anthropic_hh", lambda rows: [{"chosen": [], "rejected": "no"}, *rows], ["chosen '[]'", "not a text"]),
]


@pytest.mark.parametrize("task, change, told", SOURCES)
def test_bad_sources(task, change, told, refused):
    for split in ("train", data.prepare.TASKS[task].test_split):
        write_jsonl(Path(f"source/{task}/{split}.jsonl"), change(read_jsonl(ROOT / f"data/tiny/{task}/{split}.jsonl")))
    refused(W2S, ["--tasks", task, "--data-dir", "source"], told)
    assert not Path(f"out/{task}/data/manifest.json").exists()


def test_a_row_with_nothing_to_choose_from_is_dropped():
    alike = COSMOS | {f"answer{i}": "a" for i in range(4)}
    samples, counts = data.prepare.make_samples("cosmos_qa", [COSMOS | {"question": "other"}, alike], 0)
    assert len(samples) == 1 and counts["incomplete"] == 1
    empty = {"chosen": "", "rejected": " "}
    assert data.prepare.make_samples("anthropic_hh", [empty], 0)[1]["incomplete"] == 1


# ---- task files ----

OWN = [{"text": f"{i} is even", "label": 1 - i % 2} for i in range(40)]
HEADER = {"claim": "it is {side}", "sides": ["odd", "even"]}


def own(line: int = 5, without: str = "", **change) -> list:
    """Good rows, one of them changed."""
    row = {k: v for k, v in OWN[line - 1].items() if k != without} | change
    return [*OWN[: line - 1], row, *OWN[line:]]


def worded(**change) -> list:
    return [{"wording": HEADER | change}, *OWN]


OWN_FILES = [  # rows, what is told beside the file's name
    ([], ["no rows", "8"]),
    (OWN[:7], ["7 rows", "8"]),
    ([r | {"label": 1} for r in OWN], ["0 rows with label 0", "with label 1", "split"]),
    ([r | {"split": "train"} for r in OWN], ["test split has 0 rows"]),
    (own(without="label"), [":5: no label", "1 (right) or 0 (wrong)"]),
    *((own(label=x), [f":5: label {x!r}", "1 (right) or 0 (wrong)"]) for x in (2, -1, 1.0, True, "1", [])),
    (own(without="text"), [":5: either text, or question and answer", "the row has label"]),
    (own(question="q", answer="a"), [":5: either text, or question and answer"]),
    (own(answer="a"), [":5: either text, or question and answer"]),
    (own(without="text", question="q", answer="a"), [":5:", "one kind in a file"]),
    (own(text=7), [":5: text 7: a text is needed"]),
    (own(text=" "), [":5: text ' ': a text is needed"]),
    ([{"question": "q", "label": 1}] * 9, [":1: no answer: a text is needed"]),
    ([{"question": "q", "answer": 4, "label": 1}] * 9, [":1: answer 4: a text is needed, in quotes"]),
    (own(text="1 is even"), [":5: the same text as line 2", "'1 is even'"]),
    ([r | {"id": i % 30} for i, r in enumerate(OWN)], [":31: the same id as line 1", "'0'"]),
    (own(id=True), [":5: id True", "a name or a whole number"]),
    (own(id=""), [":5: id ''", "a name or a whole number"]),
    (own(evidence="e"), [":5: evidence 'e', unlike in the first row", "all rows or in none"]),
    (own(1, evidence="e"), [":2: no evidence, unlike in the first row"]),
    ([r | {"evidence": ""} for r in OWN], [":1: evidence '': a text is needed"]),
    (own(split="test"), [":5: split 'test', unlike in the first row"]),
    ([r | {"split": "dev"} for r in OWN], [":1: split 'dev'", "train or test"]),
    ([{"wording": "kind"}, *OWN], [":1: wording kind", "shown, debated, claim, sides"]),
    (worded(side="x"), [":1: wording", "shown, debated, claim, sides"]),
    (worded(shown=3), [":1: shown 3: a text is needed"]),
    *((worded(claim=x), [f":1: claim {x!r}", "{side}"]) for x in ("it is so", "a {side} day", "{x} is {side}")),
    *((worded(sides=x), [":1: sides", "two names"]) for x in ("no", ["a"], ["a", "a"], ["a", 1], ["", "a"])),
]


TASK_FILES = [
    *(("own.jsonl", lines(rows), ["own.jsonl", *told]) for rows, told in OWN_FILES),
    ("nowhere.jsonl", None, ["no such file"]),
    ("own.jsonl", b'{"text": "x", "label": 1}\n\n{"text": \n', ["own.jsonl:3: not JSON"]),
    ("own.csv", b"text,label\nx,1\n", ["own.csv:1: not JSON"]),
    ("own.jsonl.gz", b"text", ["damaged gzip"]),
]
for name in ("sciq", "heads", "my task", "a.b", "_x", "\u00e9", 99 * "x"):
    TASK_FILES.append((f"{name}.jsonl", b"", [f"{name}.jsonl", "rename"]))


@pytest.mark.parametrize("file, content, told", TASK_FILES, ids=[" ".join(told)[:60] for *_, told in TASK_FILES])
def test_bad_task_files(file, content, told, refused):
    if content is not None:
        Path(file).write_bytes(content)
    refused(W2S, ["--task-file", file], told)
    assert not Path("out").exists()


# ---- models ----


def change(folder: Path, file: str, *without: str, **values) -> None:
    have = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({k: v for k, v in have.items() if k not in without}))


def change_weights(folder: Path, how) -> None:
    """Put how(name, weight) in the place of each weight, or leave it out where that is None."""
    weights = {name: how(name, weight) for name, weight in load_file(folder / "model.safetensors").items()}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    """Unpickled, the weights make a file."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(f"cbuiltins\nopen\n(V{folder.parent / 'ran'}\nVw\ntR.")


def remote_code(folder: Path) -> None:
    maps = {"AutoConfig": "modeling_x.C", "AutoModel": "modeling_x.M"}
    change(folder, "config.json", model_type="evil", auto_map=maps)
    (folder / "modeling_x.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")


def remote_tokenizer(folder: Path) -> None:
    remote_code(folder)
    shutil.copy(Path(builtin_folder("random-small")) / "config.json", folder)
    (folder / "tokenizer.json").unlink()
    change(folder, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["modeling_x.T", None]})


def link(folder: Path) -> None:
    outside = shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(outside)


def index(folder: Path, name) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    weight_map = {"model.embed_tokens.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def drop_a_weight(folder: Path) -> None:
    change_weights(folder, lambda name, w: None if "layers.1.mlp.up" in name else w)


def drop_a_token(folder: Path) -> None:
    """The model's vocabulary ends before the tokenizer's."""
    change(folder, "config.json", vocab_size=200)
    change_weights(folder, lambda name, w: w[:200].clone() if "embed" in name else w)


MODELS = {  # how a good one is spoiled, what is told
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut off": (lambda f: os.truncate(f / "config.json", 20), "no readable config.json"),
    "config an array": (lambda f: (f / "config.json").write_text("[]"), "no readable config.json"),
    "config of 2 GB": (lambda f: os.truncate(f / "config.json", 2 * 2**30), "config.json", str(2 * 2**30)),
    "unknown architecture": (lambda f: change(f, "config.json", model_type="evil"), "evil"),
    "no architecture": (lambda f: change(f, "config.json", "model_type"), "model_type"),
    "wrong width": (lambda f: change(f, "config.json", hidden_size=48),),
    "width a word": (lambda f: change(f, "config.json", hidden_size="wide"),),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors", "never pickles"),
    "pickled weights": (pickled, "model.safetensors", "never pickles"),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 2000),),
    "weights no tensors": (lambda f: (f / "model.safetensors").write_bytes(b"{}" * 99),),
    "a weight is missing": (drop_a_weight, "lack 1 weights", "layers.1.mlp.up_proj"),
    "an index that leaves the folder": (lambda f: index(f, "../outside.safetensors"), "../outside.safetensors"),
    "an index of numbers": (lambda f: index(f, 7), "'7'"),
    "a link out of the folder": (link, "model.safetensors is a link", "copy"),
    "remote code": (remote_code, "code of its own", "never run"),
    "a remote tokenizer": (remote_tokenizer,),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(),),
    "tokenizer cut off": (lambda f: os.truncate(f / "tokenizer.json", 100),),
    "no end of text": (lambda f: change(f, "tokenizer_config.json", "eos_token"), "no end-of-text token"),
    "more tokens than the model has": (drop_a_token, "token 256", "199"),
}


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(builtin_folder("random-small"), tmp_path / "a model"))


BEFORE_ANYTHING = ("no weights", "pickled weights", "no end of text", "more tokens than the model has")
WITH_MODEL = [(script, flag, kind) for script, flag in ((TRAIN, "--model"), (DEBATE, "--strong")) for kind in MODELS]
WITH_MODEL += [(W2S, "--strong", kind) for kind in BEFORE_ANYTHING]  # the others when it loads the model


@pytest.mark.parametrize("script, flag, kind", WITH_MODEL)
def test_bad_models(script, flag, kind, refused, model):
    spoil, *told = MODELS[kind]
    spoil(model)
    refused(script, [flag, str(model)], ["a model", *told])
    assert not Path("ran").exists() and not Path("out").exists()


def test_an_encoder_is_no_student(refused, model):
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(model)
    refused(TRAIN, ["--model", str(model)], ["bert"])


NOT_FINITE = [
    (TRAIN, ["--model"], ["loss is nan at step 0 of"]),
    (W2S, ["--weak"], ["loss is nan at step 0 of", "weak-naive-f0-s0 failed"]),
    (DEBATE, ["--temperature", "0", "--strong"], ["logits are not finite"]),
    (DEBATE, ["--temperature", "1", "--strong"], ["logits are not finite"]),
]


@pytest.mark.parametrize("script, flags, told", NOT_FINITE)
def test_logits_that_are_not_finite_end_the_run(script, flags, told, refused, model):
    change_weights(model, lambda name, w: w * NAN if "norm" in name else w)
    refused(script, [*flags, str(model)], told, code=1)
    assert not list(Path("out").glob("sciq/predictions/*/manifest.json"))


def test_a_step_that_explodes_after_the_last_loss_is_seen(refused):
    for _ in range(2):  # such a folder may be used again
        refused(TRAIN, ["--lr", "1e38", "--epochs", "1"], ["logits of", "--lr"], code=1)
        assert [f.name for f in Path("out").iterdir()] == ["steps.jsonl"]


def test_judgements_of_other_settings_are_not_taken_for_these(refused):
    for file in ("transcripts/debate/seed0/train_b.jsonl", "data/train_b.evidence.jsonl"):
        write_text(Path("run/places_evidence", file), "")
    write_text(Path("out/settings.json"), '{"lr": 0.5}')
    refused("bench.orders", [], ("lr 0.5", "another folder"))


@pytest.mark.parametrize("script", [W2S, TRAIN])
def test_triton_without_a_gpu(script, refused, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto") == "reference"
    refused(script, ["--kernels", "triton"], ["'triton'", "no CUDA GPU", "reference"])
