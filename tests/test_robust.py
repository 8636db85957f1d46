"""Killed anywhere, started twice, out of room, damaged by hand: the right files or one clear line."""

import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import SMOKE, call, finish, products, run, start

from common import run_script
from stages import Stage, State, read_manifest

KILLS = int(os.environ.get("W2S_KILLS", 10))


def die_at(n: int, how: signal.Signals, where: str, *commands) -> None:
    """Scripts in this process, which gets a signal when it opens a file for writing, or renames one, for the n-th time.

    Only files count whose path holds the word `where`.
    """
    count = itertools.count(1)

    def hook(event: str, args: tuple) -> None:
        writes = event == "os.rename" or event == "open" and set(str(args[1])) & set("wax")
        if writes and where in str(args[0]) and next(count) == n:
            os.kill(os.getpid(), how)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    sys.addaudithook(hook)
    call(*commands)


def test_killed_anywhere_and_resumed_is_the_same_to_the_byte(smoke, tmp_path):
    chance, out, kills = random.Random(0), tmp_path / "out", 0
    while kills < KILLS:
        how = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        [run] = start(1, die_at, chance.randint(1, 60), how, str(out), ("w2s", *SMOKE, out))
        run.join(300)
        if run.exitcode == 0:  # it ended before it could be killed: the next one begins anew
            shutil.rmtree(out)
        else:
            assert run.exitcode == (1 if how == signal.SIGINT else -how)
            kills += 1
    finish(start(1, call, ("w2s", *SMOKE, out)))
    assert products(out) == products(smoke)


class Killed(Exception):
    pass


def of_two_files(folder: Path, n: int, cost: str, killed: bool = False) -> Stage:
    """A stage whose two files hold at least n; killed, it is after the first of them."""

    def make(out: Path, *_) -> dict:
        for name in ("a", "b"):
            (out / name).write_text(str(n))
            if killed:
                raise Killed
        return {cost: 10}

    return Stage(folder, {"lr": 1}, {}, make, minimum={"n": n})


@pytest.mark.parametrize("cost, in_all", [("new_tokens", 20), ("train_tokens", 10)])  # of debates, of a finetuning
def test_what_was_killed_while_it_grew_is_continued_and_costs_what_it_did(cost, in_all, tmp_path):
    folder = tmp_path / "stage"
    assert of_two_files(folder, 1, cost).run()
    with pytest.raises(Killed):
        of_two_files(folder, 2, cost, killed=True).run()
    for n in (1, 2):  # what it holds now is not what its manifest says, so it is not done
        assert of_two_files(folder, n, cost).state()[0] is State.SHORT
    assert of_two_files(folder, 2, cost).run() and not of_two_files(folder, 2, cost).run()
    assert [p.name for p in tmp_path.iterdir()] == ["stage"] and read_manifest(folder)[cost] == in_all
    started = {part: read_manifest(folder)[part] for part in ("config", "inputs", "code")}
    (folder / "started.json").write_text(json.dumps(started))  # as a kill after the manifest leaves it
    assert not of_two_files(folder, 2, cost).run()
    (folder / "a").write_text("by hand")
    assert of_two_files(folder, 2, cost).state()[0] is State.STALE


def test_an_error_without_words_is_named(capsys):
    def out_of_memory() -> None:
        raise MemoryError

    with pytest.raises(SystemExit):
        run_script(out_of_memory)
    assert capsys.readouterr().err == "error: MemoryError\n"


def without_room(*commands) -> None:
    """Files may not grow beyond 4 kB: as on a full disk, a write fails half-way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    call(*commands)


def test_no_room_left_ends_in_one_line_and_the_run_can_go_on(smoke, copied, tmp_path):
    shutil.rmtree(copied / "sciq/predictions/weak-naive-f0-s0")  # it holds a model, the largest file of all
    [full] = start(1, without_room, ("w2s", *SMOKE, copied), stderr=tmp_path / "told")
    full.join(300)
    [told] = (tmp_path / "told").read_text().splitlines()
    assert full.exitcode == 1 and told.startswith("error: ") and "the same command resumes" in told
    assert run("w2s", *SMOKE, copied) == 0 and products(copied) == products(smoke)


def test_a_folder_that_another_run_holds_is_refused_and_a_dead_ones_is_taken(copied, capsys):
    lock = copied / ".lock"
    lock.write_text("process 12 on another")
    with open(lock, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("w2s", *SMOKE, copied) == 2
        [told] = capsys.readouterr().err.splitlines()
        assert "process 12 on another is writing there" in told
    assert run("w2s", *SMOKE, copied) == 0
    assert lock.read_text().startswith(f"process {os.getpid()} on")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    """With the same file of another member: valid, but not this one's."""
    shutil.copy(str(file).replace("-f2-", "-f1-"), file)


def unfinished_otherwise(manifest: Path) -> None:
    """As if the stage had been killed, begun with another learning rate."""
    have = json.loads(manifest.read_text())
    begun = {"config": have["config"] | {"lr": 0.5}, "inputs": have["inputs"]}
    manifest.with_name("started.json").write_text(json.dumps(begun))
    manifest.unlink()


BROKEN = [  # stage, file, how, what is said of it
    ("data", "train_a.jsonl", truncate, "output train_a.jsonl was changed after it was written"),
    ("transcripts/debate", "seed1/train_a.jsonl", flip_a_bit, "output seed1/train_a.jsonl was changed"),
    ("transcripts/market_making", "manifest.json", truncate, "manifest.json is not readable"),
    ("predictions/weak-no_argument-f2-s0", "train_b.jsonl", swap, "output train_b.jsonl was changed"),
    ("predictions/strong-ours-s0", "test.jsonl", Path.unlink, "output test.jsonl is missing"),
    ("predictions/weak-naive-f0-s0", "model/model.safetensors", flip_a_bit, "output model/model.safetensors was changed"),
    ("predictions/weak-debate-d1-t3-f0-s0", "manifest.json", unfinished_otherwise, "begun with other settings"),
    ("weak_labels/ours/seed0", "train_b.jsonl", truncate, "output train_b.jsonl was changed"),
]  # fmt: skip


def test_broken_files_are_named_kept_aside_and_made_again(smoke, copied, capsys):
    taken = copied / "sciq/stale/data.1"
    taken.mkdir(parents=True)
    (taken / "kept.txt").write_text("of an earlier run")
    for stage, file, how, _ in BROKEN:
        how(copied / "sciq" / stage / file)
    spoiled = {stage: content_of(copied / "sciq" / stage) for stage, *_ in BROKEN}
    assert run("w2s", *SMOKE, copied) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stale: ")]
    assert len(told) == len(BROKEN)  # nothing else was stale: what is made again is the same
    for stage, _, _, what in BROKEN:
        assert any(f"/{stage} (" in line and what in line for line in told), stage
        folder = (copied / "sciq" / stage).parent
        aside = folder / f"stale/{Path(stage).name}.{2 if stage == 'data' else 1}"
        assert content_of(aside) == spoiled[stage]
        shutil.rmtree(aside)
    assert [p.name for p in taken.iterdir()] == ["kept.txt"]
    for folder in list(copied.rglob("stale")):
        shutil.rmtree(folder)
    assert products(copied) == products(smoke)


def content_of(stage: Path) -> dict[str, bytes]:
    return {p.relative_to(stage).as_posix(): p.read_bytes() for p in stage.rglob("*") if p.is_file()}
