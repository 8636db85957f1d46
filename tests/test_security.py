"""No file, model or text of others runs as code or leads out of its folder, and no right is taken for granted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call, run, start
from test_bad_input import DEBATE, FLAGS, GOOD, TRAIN, W2S

import common
from common import read_jsonl, write_jsonl


def sources() -> list[Path]:
    found = [p for p in ROOT.rglob("*.py") if not {".venv", "tests", "out"} & set(p.relative_to(ROOT).parts)]
    assert len(found) > 10
    return found


FORBIDDEN = re.compile(  # what runs text or data as code, and flags that let others' code run
    r"^ *(?:import|from) .*\b(?:pickle|dill|marshal|shelve|cloudpickle|joblib)\b"
    r"|(?<![\w.])(?:eval|exec|__import__|os\.system|os\.popen|torch\.load|np\.load)\("
    r"|\b(?:shell|trust_remote_code|allow_pickle)=(?!False\b)",
    re.MULTILINE,
)


def test_no_source_runs_text_or_data_as_code():
    bad = "import pickle\neval(x)\nos.system(x)\nf(shell=True)\nf(trust_remote_code=True)\nf(trust_remote_code=False)"
    assert FORBIDDEN.findall(bad) == ["import pickle", "eval(", "os.system(", "shell=", "trust_remote_code="]
    assert [(p.name, found) for p in sources() for found in FORBIDDEN.findall(p.read_text())] == []


def test_whatever_loads_from_a_model_says_no_to_its_code():
    """Not said, the libraries ask at a terminal, and yes is one key away."""
    text = "".join(p.read_text() for p in sources() if p != ROOT / "data/models.py")  # which loads the built-in ones
    calls = re.findall(r"\.from_pretrained\(.*?\)", text.replace("()", ""), re.DOTALL)
    assert len(calls) >= 3 and all("trust_remote_code=False" in call for call in calls)


def test_ids_of_a_file_name_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["../../escaped", "/etc/escaped", "..", "a/b", "\x00", "~", "$(touch escaped)", "%2e%2e/x"]
    write_jsonl(Path("good.jsonl"), [r | {"id": name} for r, name in zip(GOOD, names, strict=True)])
    before = set(tmp_path.parent.rglob("*"))
    assert run(TRAIN, *FLAGS[TRAIN].split(), "--out", "out/train") == 0
    assert run(DEBATE, *FLAGS[DEBATE].split(), "--out", "out/debate", "--max-new-tokens", 2, "--turns", 1) == 0
    new = set(tmp_path.parent.rglob("*")) - before
    assert new and all(p.is_relative_to(tmp_path / "out") for p in new)
    assert [r["id"] for r in read_jsonl(Path("out/debate/seed0.jsonl"))] == names


def test_packages_that_some_runs_need_are_not_needed_by_the_others():
    """Nor are plots and reports: a machine that trains may lack them all."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("datasets", "gguf", "accelerate", "matplotlib", "jinja2", "vllm")))
import bench.debates, bench.kernels, bench.steps, data.models, data.prepare, data.convert_qwen, debate, heads, train
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the machine ----


def without_rights(folder: Path, command: tuple) -> None:
    os.setgid(65534)
    os.setuid(65534)
    os.chdir(folder)
    call(command)


NO_PERMISSION = [
    (TRAIN, [], "is not writable"),
    (W2S, [], "is not writable"),
    (TRAIN, ["--train", "secret.jsonl", "--out", "open/out"], "secret.jsonl: cannot be read (Permission denied)"),
]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up the rights of root")
@pytest.mark.parametrize("script, flags, told", NO_PERMISSION)
def test_no_permission(script, flags, told, tmp_path):
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o055)
    write_jsonl(tmp_path / "good.jsonl", GOOD)
    (tmp_path / "secret.jsonl").touch(mode=0)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    command = (script, *FLAGS[script].split(), "--out", "out", *flags)
    [user] = start(1, without_rights, tmp_path, command, stderr=tmp_path / "told")
    user.join(300)
    [line] = (tmp_path / "told").read_text().splitlines()
    assert user.exitcode == 2 and told in line


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    common.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        common.write_text(tmp_path / "a.txt", "new, and half a pair \ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
