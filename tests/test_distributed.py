"""History does not matter: what a run computes depends on its inputs alone, not on the number of processes, their groups,
the order of the stages, or on what a process did before.

Run by torchrun, this file is a rank that runs the scripts that it is given.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import METHODS, SMOKE, call, finish, free_port, products, run, start
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_robust import die_at
from torch.testing import assert_close

from common import group_size, read_jsonl, run_script, write_jsonl

LOSSES = ("xent", "product", "logconf")


def assert_close_probs(file: Path, whole: Path) -> None:
    got, wanted = read_jsonl(file), read_jsonl(whole)
    assert [r["id"] for r in got] == [r["id"] for r in wanted]
    assert_close(*(torch.tensor([r["probs"] for r in rows]) for rows in (got, wanted)), atol=1e-5, rtol=0)


def assert_same(out: Path, whole: Path) -> None:
    """Probabilities and weights to 1e-5; data, transcripts and tables to the byte."""
    for aside in list(out.rglob("stale")):  # of what was made from probabilities that differ in the seventh digit
        shutil.rmtree(aside)
    files, wanted = products(out), products(whole)
    assert files.keys() == wanted.keys()
    for name in files:
        if name.endswith("model.safetensors"):
            assert_close(load_file(out / name), load_file(whole / name), atol=1e-5, rtol=0)
        elif name.endswith(".jsonl") and ("/predictions/" in name or "/weak_labels/" in name):
            assert_close_probs(out / name, whole / name)
        elif name.startswith(("sciq/data", "sciq/transcripts", "tables")) and not name.endswith("manifest.json"):
            assert files[name] == wanted[name], name


# ---- whole pipelines ----


@pytest.mark.parametrize("size, groups", [(2, 0), (3, 2), (4, 2)])
def test_a_pipeline_is_the_same_on_any_number_of_ranks_and_in_groups(size, groups, smoke, tmp_path):
    """The last batch has one sample, fewer than there are ranks."""
    out = tmp_path / "out"
    finish(start(size, call, ("w2s", *SMOKE, out, "--weak-gpus", groups, "--strong-gpus", groups)))
    assert_same(out, smoke)


def test_a_run_killed_on_two_ranks_continues_on_one(smoke, copied):
    for stage in ("transcripts/debate", *(f"predictions/weak-debate-d{k}-t3-f0-s0" for k in range(4))):
        shutil.rmtree(copied / "sciq" / stage)
    ranks = start(2, die_at, 5, signal.SIGKILL, "weak-debate-d0", ("w2s", *SMOKE, copied))
    ranks[0].join(300)
    ranks[1].kill()  # it waits for the other
    assert ranks[0].exitcode == -signal.SIGKILL
    assert (copied / "sciq/predictions/weak-debate-d0-t3-f0-s0/started.json").exists()
    assert run("w2s", *SMOKE, copied) == 0 and products(copied) == products(smoke)


@settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate], database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.data())
def test_the_order_and_what_ran_before_do_not_matter(smoke, tmp_path, data):
    """Some stages are there already, some methods are made first, by one or two ranks, side by side or together."""
    stages = sorted(p.parent.relative_to(smoke).as_posix() for p in smoke.rglob("manifest.json"))
    missing = data.draw(st.sets(st.sampled_from(stages), min_size=5), "missing")
    order = data.draw(st.permutations(METHODS), "order")
    cut = data.draw(st.integers(1, len(METHODS) - 1), "cut")
    size = data.draw(st.sampled_from([1, 2]), "ranks")
    groups = data.draw(st.tuples(*[st.integers(0, size)] * 2), "groups")
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(smoke, out)
    for stage in missing:
        shutil.rmtree(out / stage)
    command = ("w2s", *SMOKE, out, "--weak-gpus", groups[0], "--strong-gpus", groups[1])
    finish(start(size, call, *((*command, "--methods", *some) for some in (order[:cut], order[cut:], order))))
    if size == 1 or groups == (1, 1):
        assert products(out) == products(smoke)
    assert_same(out, smoke)


# ---- torchrun ----


def torchrun(*arguments: object, ranks: int = 1, node: int = 0, nodes: int = 1, port: int = 0) -> subprocess.Popen:
    launch = f"-m torch.distributed.run --nproc-per-node {ranks} --nnodes {nodes} --node-rank {node}"
    launch += f" --master-addr 127.0.0.1 --master-port {port or free_port()}"
    command = [sys.executable, *launch.split(), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True)


@pytest.fixture(scope="module")
def finetunings(tiny_model, tmp_path_factory):
    """Commands, but for their folder, that finetune with each loss and then again with the last; what one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    rows = [{"id": f"s{i}", "text": f"Q: {'why ' * (i % 7)}{i * 37 % 101} A: {i}"} for i in range(21)]
    labels = [i * 29 % 31 / 31 for i in range(21)]
    write_jsonl(folder / "rows.jsonl", [r | {"probs": [p, 1 - p]} for r, p in zip(rows, labels, strict=True)])
    flags = f"--train {folder}/rows.jsonl --test {folder}/rows.jsonl --model {tiny_model('qwen2')} --dtype float32"
    flags += " --lr 1e-4 --batch-size 6 --max-tokens-per-forward 64 --epochs 2"  # the last batch has 3 samples

    def commands(out: Path) -> list[list]:
        runs = zip((*LOSSES, LOSSES[-1]), (*LOSSES, "again"), strict=True)
        return [["train", *flags.split(), "--loss", loss, "--out", f"{out}/{name}"] for loss, name in runs]

    finish(start(1, call, *commands(folder)))
    return commands, folder


@pytest.mark.parametrize("nodes, ranks", [(2, 1), (1, 4)])
def test_finetuning_is_the_same_on_any_number_of_ranks_and_nodes(nodes, ranks, finetunings, tmp_path):
    commands, alone = finetunings
    port, asked = free_port(), json.dumps(commands(tmp_path))
    runs = [torchrun(__file__, asked, ranks=ranks, node=n, nodes=nodes, port=port) for n in range(nodes)]
    told = [process.communicate(timeout=300)[0] for process in runs]
    assert [process.returncode for process in runs] == [0] * nodes, told
    assert sum(text.count("; wrote ") for text in told) == len(LOSSES) + 1  # rank 0 alone speaks
    for loss in LOSSES:
        assert_close_probs(tmp_path / loss / "predictions.jsonl", alone / loss / "predictions.jsonl")
        got, wanted = ([r["loss"] for r in read_jsonl(out / loss / "steps.jsonl")] for out in (tmp_path, alone))
        assert len(got) == 8 and got == pytest.approx(wanted, abs=1e-5)
    last, again = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in (LOSSES[-1], "again"))
    assert last == again  # what ran before does not matter, to the last bit


@pytest.mark.parametrize("failure, code", [("InputError", 2), ("KeyError", 1)])
def test_a_rank_that_fails_ends_though_its_shutdown_would_hang(failure, code, tmp_path):
    """As with NCCL, whose communicator waits for ranks that are in a collective. torchrun then stops the others."""
    script = tmp_path / "fails.py"
    script.write_text(f"""
import atexit, os, time
from common import InputError, run_script
def main():
    if os.environ["RANK"] == "0":
        atexit.register(time.sleep, 1000)
        raise {failure}("this one")
    time.sleep(1000)
run_script(main)
""")
    process = torchrun(script, ranks=2)
    try:
        told = process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and "this one" in told and f"exitcode  : {code} " in told


@pytest.mark.parametrize("asked, sizes", [(0, [1, 2, 3, 4, 5, 6, 7, 8]), (1, [1] * 8), (4, [1, 2, 3, 4, 5, 6, 7, 4])])
def test_no_number_of_processes_is_refused_a_group(asked, sizes):
    """The next divisor up: a model that fits as many GPUs as asked fits those too."""
    assert [group_size(total, asked) for total in range(1, 9)] == sizes


if __name__ == "__main__":
    run_script(functools.partial(call, *json.loads(sys.argv[1])))
