"""Killed anywhere, started twice, out of room, fed with NaN: the right files or one clear line.

Run as a script, this file is the run that is killed: it loads the libraries once and forks a run for every kill.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import w2s
from common import InputError, run_script, write_jsonl
from stages import digest, locked

KILLS = int(os.environ.get("W2S_KILLS", 10))
FLAGS = ["--preset", "smoke", "--tasks", "sciq", "--seeds", "0", "1", "--limit-train", "24", "--limit-test", "8"]
FLAGS += ["--methods", "finetune_aux", "single", "ours", "market_making", "turns_4", "no_argument"]


def run_w2s(*arguments: str) -> None:
    sys.argv = ["w2s.py", *map(str, arguments)]
    run_script(w2s.main)


def run_killed(out: str, kills: int, seconds: float) -> list[int]:
    """Run to the end in `out`, after `kills` runs that were killed within about `seconds` all told; the exit codes.

    A run that ended before it could be killed does not count: its folder goes, and the next one begins anew.
    """
    import torch

    torch.set_num_threads(1)
    chance, ends = random.Random(0), []
    while True:
        child = os.fork()
        if child == 0:
            try:
                run_w2s("run", *FLAGS, "--out", out)
            except SystemExit as e:
                os._exit(e.code)
            os._exit(0)
        if len(ends) < kills:
            time.sleep(chance.uniform(0, 2 * seconds / kills))
            os.kill(child, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if len(ends) == kills:
            return [*ends, end]
        if end == 0:
            shutil.rmtree(out)
        else:
            ends.append(end)


def products(out: Path) -> dict[str, bytes]:
    """Every file of a run, but for what says when and where it was made."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    for name in list(files):
        if name.endswith("manifest.json"):
            m = json.loads(files[name])
            files[name] = json.dumps([m["config"], m["inputs"], m["outputs"], m["minimum"]]).encode()
        elif name.endswith(("steps.jsonl", "results.jsonl", "debates.jsonl", "cost.md", "report.html", ".lock")):
            del files[name]
    return files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed, and the seconds that it took."""
    out = tmp_path_factory.mktemp("whole") / "out"
    end = subprocess.run([sys.executable, __file__, out, "0", "1"], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    return out, json.loads(end.stdout.splitlines()[-1])["seconds"]


def test_killed_at_random_and_resumed_is_the_same_to_the_byte(whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, __file__, out, str(KILLS), str(whole[1])]
    end = subprocess.run(command, capture_output=True, text=True)
    ends = json.loads(end.stdout.splitlines()[-1])["ends"]
    assert ends[-1] == 0, end.stderr
    assert len(ends) == KILLS + 1 and set(ends[:-1]) <= {-signal.SIGKILL, -signal.SIGTERM, 1}
    assert products(out) == products(whole[0]) and len(products(out)) > 50
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp") or ".part" in p.name or ".stale" in p.name]


def test_killed_between_writing_and_renaming(whole, tmp_path):
    """The n-th rename never comes: for the first stages one by one, then further and further on."""
    out, renames = tmp_path / "out", [1, 2, 3, 5, 8, 13, 21, 34]
    script = f"import os, sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]; import test_robust as t; t.run_without_rename({str(out)!r}, {renames})"
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert products(out) == products(whole[0])


def dying_replace(replace, count, last, src, dst) -> None:
    if next(count) == last:
        os._exit(9)
    replace(src, dst)


def run_without_rename(out: str, at: list[int]) -> None:
    import torch

    torch.set_num_threads(1)
    for n in [*at, None]:
        child = os.fork()
        if child == 0:
            os.replace = functools.partial(dying_replace, os.replace, iter(range(1, 10**6)), n)
            run_w2s("run", *FLAGS, "--out", out)
            os._exit(0)
        end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert end == (0 if n is None else 9), (n, end)


def ended(capsys, *arguments) -> tuple[int, list[str]]:
    """Exit code and what stood in stderr of a command in this process."""
    with pytest.raises(SystemExit) as e:
        run_w2s(*arguments)
    return e.value.code, capsys.readouterr().err.strip().splitlines()


def test_a_folder_that_another_run_holds_is_refused_and_a_dead_ones_is_taken(tmp_path, capsys):
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom stages import *\nwith locked(Path({str(tmp_path)!r})): print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    code, told = ended(capsys, "run", *FLAGS, "--out", tmp_path)
    assert code == 2 and len(told) == 1 and f"process {holder.pid} on" in told[0] and not (tmp_path / "sciq").exists()
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
        with pytest.raises(InputError, match="is writing there"), locked(tmp_path):
            pass


def test_no_room_left_ends_in_one_line_and_the_run_can_go_on(whole, tmp_path):
    """Files may not grow beyond 4 kB: as on a full disk, a write fails half-way."""
    script = f"""import resource, signal, sys; sys.path[:0] = [{str(ROOT / "tests")!r}]
import test_robust as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
t.run_w2s("run", *t.FLAGS, "--out", {str(tmp_path / "out")!r})"""
    end = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    told = end.stderr.strip().splitlines()
    assert end.returncode == 1 and told[-1].startswith("error: ") and "the same command resumes" in told[-1], end.stderr
    assert "Traceback" not in end.stderr
    end = subprocess.run([sys.executable, __file__, tmp_path / "out", "0", "1"], capture_output=True, text=True)
    assert end.returncode == 0 and products(tmp_path / "out") == products(whole[0])


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path, capsys, monkeypatch):
    import train

    nan = lambda z, y, step_frac, c: y * float("nan")  # noqa: E731
    monkeypatch.setitem(train.LOSSES, "xent", nan)
    code, told = ended(capsys, "run", *FLAGS, "--out", tmp_path / "out")
    assert code == 1 and len(told) == 1
    assert "loss is nan at step 0 of" in told[0] and "weak-naive-f0-s0 failed" in told[0]
    assert not list((tmp_path / "out").glob("sciq/predictions/*/manifest.json"))


def test_permuted_gold_labels_change_nothing_but_the_ceiling_and_the_scores(whole, tmp_path):
    """Labels of train_b and test reach no other training: all but the ceiling is the same to the byte."""
    out = tmp_path / "out"
    shutil.copytree(whole[0] / "sciq/data", out / "sciq/data")
    for file in (out / "sciq/data/train_b.gold.jsonl", out / "sciq/data/test.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(r | {"label": 1 - r["label"]}, ensure_ascii=False) + "\n" for r in rows))
    manifest = json.loads((out / "sciq/data/manifest.json").read_text())
    for name in manifest["outputs"]:
        manifest["outputs"][name] = digest(out / "sciq/data" / name)
    (out / "sciq/data/manifest.json").write_text(json.dumps(manifest))
    end = subprocess.run([sys.executable, __file__, out, "0", "1"], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    a, b = ({n: f for n, f in products(o).items() if n.endswith(".jsonl")} for o in (whole[0], out))
    differ = {n for n in a if a[n] != b.get(n)}
    ceilings = {n for n in a if "strong-ceiling" in n}
    assert differ == ceilings | {"sciq/data/train_b.gold.jsonl", "sciq/data/test.jsonl"} and len(ceilings) == 2


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_jsonl(file, [r | {"probs": r["probs"][::-1]} for r in rows])


def swap(file: Path) -> None:
    """With the same file of the other replicate: valid, but not this run's."""
    other = file.parent.with_name(file.parent.name.replace("-s0", "-s1")) / file.name
    file.write_bytes(other.read_bytes())


CHANGED = "was changed after it was written"
BROKEN = [  # stage, file, how, what is said of it
    ("data", "train_a.jsonl", truncate, f"output train_a.jsonl {CHANGED}"),
    ("transcripts/debate", "seed1/train_a.jsonl", flip_a_bit, f"output seed1/train_a.jsonl {CHANGED}"),
    ("transcripts/market_making", "manifest.json", truncate, "manifest.json is not readable"),
    ("predictions/weak-no_argument-f2-s0", "train_b.jsonl", swap, f"output train_b.jsonl {CHANGED}"),
    ("predictions/strong-ours-s0", "test.jsonl", Path.unlink, "output test.jsonl is missing"),
    (
        "predictions/weak-naive-f0-s0",
        "model/model.safetensors",
        flip_a_bit,
        f"output model/model.safetensors {CHANGED}",
    ),
    ("weak_labels/ours/seed1", "train_b.jsonl", edit, f"output train_b.jsonl {CHANGED}"),
]


def test_broken_artifacts_are_named_and_made_again(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    for stage, file, how, _ in BROKEN:
        how(out / "sciq" / stage / file)
    end = subprocess.run([sys.executable, __file__, out, "0", "1"], capture_output=True, text=True)
    told = [line for line in end.stdout.splitlines() if line.startswith("stale: ")]
    for stage, _, _, what in BROKEN:
        assert any(f"/{stage} (" in line and what in line for line in told), stage
    assert len(told) == len(BROKEN)  # and nothing else was stale: what is made again is the same
    for aside in out.rglob("*.stale1"):
        shutil.rmtree(aside)
    assert products(out) == products(whole[0])


if __name__ == "__main__":
    begin = time.time()
    out, kills, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ends = run_killed(out, kills, seconds)
    print(json.dumps({"ends": ends, "seconds": time.time() - begin}))
    sys.exit(ends[-1])
