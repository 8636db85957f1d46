"""Several processes, kills and memory: what a run leaves does not depend on how many ran it or when they were stopped.

The processes are forked from a server that has the imports, and join by the variables that torchrun sets.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import common
import debate
from common import read_jsonl, write_jsonl
from debate import make_transcripts
from generate import DebateConfig, Debater, ShardedDebater
from model import ModelSpec
from stages import Stage

SEEDS, TURNS, CHUNK = (0, 1), 3, 4
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["debate"])


def start(size: int, target, *args) -> list:
    """`size` processes that run target(*args) as ranks of one group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [processes.Process(target=as_rank, args=(r, size, port, target, args)) for r in range(size)]
    for p in ranks:
        p.start()
    return ranks


def as_rank(rank: int, size: int, port: int, target, args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with common.distributed():
        target(*args)


def finish(ranks: list) -> None:
    for p in ranks:
        p.join(60)
        assert p.exitcode == 0


# ---- what processes tell each other, and stages ----


def exchange(folder) -> None:
    r = common.rank()
    told = [common.gather({"rank": r}), common.broadcast([r, "first"]), common.world_size()]
    (folder / f"told{r}.json").write_text(json.dumps(told))


def make_stages(folder) -> None:
    def make(out) -> dict:
        (out / f"made{common.rank()}").write_text("x")
        return {"tokens": 5}

    made = []
    for shared in (False, True):
        stage = Stage(folder / f"shared{shared}", {"a": 1}, {}, make, on_all_ranks=shared)
        made += [stage.run(), stage.run()]
    (folder / f"made{common.rank()}.json").write_text(json.dumps(made))


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_gather_and_broadcast(size, tmp_path):
    finish(start(size, exchange, tmp_path))
    wanted = [[{"rank": r} for r in range(size)], [0, "first"], size]
    assert [json.loads((tmp_path / f"told{r}.json").read_text()) for r in range(size)] == [wanted] * size


def test_a_stage_is_made_by_one_rank_or_shared_by_all(tmp_path):
    finish(start(2, make_stages, tmp_path))
    assert [json.loads((tmp_path / f"made{r}.json").read_text()) for r in (0, 1)] == [[True, False] * 2] * 2
    for shared, files in ((False, ["made0"]), (True, ["made0", "made1"])):
        manifest = json.loads((tmp_path / f"shared{shared}/manifest.json").read_text())
        assert sorted(manifest["outputs"]) == files and manifest["tokens"] == 5


# ---- debates ----


def run_debates(model: str, samples: list[dict], folder) -> None:
    """Fill `folder`; notes every chunk that is begun."""
    ran = debate.run_protocol

    def noted(debater, task, protocol, chunk, *rest):
        with open(folder / "begun.txt", "a") as f:
            f.write(" ".join(s["id"] for s in chunk) + "\n")
        return ran(debater, task, protocol, chunk, *rest)

    debate.run_protocol = noted
    debater = Debater(ModelSpec(model), DebateConfig(max_new_tokens=6, temperature=1.0, dtype="float32"))
    debater.is_end[100:150] = True
    files = {k: folder / f"seed{k}.jsonl" for k in SEEDS}
    make_transcripts(lambda: debater, "sciq", "debate", samples, files, TURNS, lambda *_, **__: CHUNK)


def texts(folder) -> dict[int, bytes]:
    return {k: (folder / f"seed{k}.jsonl").read_bytes() for k in SEEDS}


@pytest.fixture(scope="module")
def wanted(tiny_model, samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    finish(start(1, run_debates, tiny_model("llama"), samples, folder))
    return texts(folder)


def test_two_processes_write_what_one_writes(tiny_model, samples, wanted, tmp_path):
    finish(start(2, run_debates, tiny_model("llama"), samples, tmp_path))
    assert texts(tmp_path) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["begun.txt", "seed0.jsonl", "seed1.jsonl"]
    begun = (tmp_path / "begun.txt").read_text().split()
    assert sorted(begun) == sorted(s["id"] for s in samples)  # the work was shared


def test_killed_five_times_the_transcripts_are_the_same_and_nothing_finished_is_repeated(
    tiny_model, samples, wanted, tmp_path
):
    coin = random.Random()

    def rows() -> int:
        return sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("seed*"))

    lost_at_most = 0
    for size in (2, 1, 2, 1, 2):
        before, ranks = rows(), start(size, run_debates, tiny_model("llama"), samples, tmp_path)
        until = before + coin.randint(1, 12)  # of 80
        while rows() < until and any(p.is_alive() for p in ranks):
            time.sleep(0.002)
        time.sleep(coin.random() / 50)
        assert all(p.exitcode in (None, 0) for p in ranks)
        for p in ranks:
            p.kill()
            p.join()
        lost_at_most += size
    assert -signal.SIGKILL in {p.exitcode for p in ranks}
    finish(start(1, run_debates, tiny_model("llama"), samples, tmp_path))
    assert texts(tmp_path) == wanted
    begun = (tmp_path / "begun.txt").read_text().splitlines()
    chunks = [" ".join(s["id"] for s in c) for c in debate.chunks(samples, lambda _: CHUNK)]
    assert set(begun) == set(chunks)  # the batches are always the same
    assert len(chunks) <= len(begun) <= len(chunks) + lost_at_most


def sampled(folder) -> None:
    debater = ShardedDebater.__new__(ShardedDebater)  # without a model
    debater.config = DebateConfig(temperature=0.7)
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(common.rank()))
    token = debater.sample(logits, torch.arange(64))
    (folder / f"{common.rank()}.json").write_text(json.dumps(token.tolist()))


def test_ranks_that_share_a_model_take_the_same_tokens_though_their_logits_differ(tmp_path):
    finish(start(2, sampled, tmp_path))
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second and len(set(first)) > 10


@pytest.mark.parametrize("engine", ["replicated", "sharded"])
def test_torchrun_gives_the_same_bytes(engine, tiny_model, samples, tmp_path):
    write_jsonl(tmp_path / "samples.jsonl", samples[:9])
    flags = [
        "--samples",
        tmp_path / "samples.jsonl",
        "--strong",
        tiny_model("llama"),
        "--turns",
        "2",
        "--engine",
        engine,
    ]
    flags += ["--cache-tokens", "200", "--max-new-tokens", "6", "--temperature", "1", "--show", "1"]
    flags += ["--out", tmp_path / "out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, ROOT / "debate.py", *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"[s0] {samples[0]['text']}") == 1  # rank 0 alone speaks
    debater = Debater(ModelSpec(tiny_model("llama")), DebateConfig(max_new_tokens=6, temperature=1.0, dtype="float32"))
    make_transcripts(
        lambda: debater, "sciq", "debate", samples[:9], {0: tmp_path / "alone.jsonl"}, 2, lambda *_, **__: 9
    )
    assert (tmp_path / "out/seed0.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def peak_memory(model: str, n: int, folder) -> None:
    debater = Debater(ModelSpec(model), DebateConfig(max_new_tokens=2, dtype="float32"))
    samples = [{"id": f"s{i}", "text": f"Q: {'why ' * (i % 5)}{i * 37 % 101} A: {i}"} for i in range(n)]
    make_transcripts(lambda: debater, "sciq", "debate", samples, {0: folder / f"{n}.jsonl"}, 1, lambda *_, **__: 32)
    (folder / f"{n}.txt").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_memory_is_flat_in_the_number_of_samples(tiny_model, tmp_path):
    for n in (200, 2000):
        finish(start(1, peak_memory, tiny_model("llama"), n, tmp_path))
        assert len(read_jsonl(tmp_path / f"{n}.jsonl")) == n
    few, many = (int((tmp_path / f"{n}.txt").read_text()) for n in (200, 2000))
    assert many < 1.1 * few
