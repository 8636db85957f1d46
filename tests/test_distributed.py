"""Several processes under torchrun, gloo on a CPU: the same losses, predictions and tables as one process alone.

Run by torchrun, this file is a rank: it finetunes a tiny model with each loss and rank 0 writes what came out.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close

import train
from common import in_groups, rank, read_jsonl, run_script
from kernels import conf_loss
from model import Classifier, ModelSpec, save_model
from train import TrainConfig

TEXTS = [f"Q: {'why ' * (i % 7)}{i * 37 % 101} A: {i}" for i in range(21)]


def finetuned(folder: str, keep: str = "") -> dict:
    """Losses, hardened labels and predictions of a run with each loss; the last batch has fewer samples than ranks.

    The last model is saved in the folder `keep`.
    """
    classifier = Classifier(ModelSpec(folder), 2, torch.float32, sharded=True)
    labels = torch.tensor([[i * 29 % 31 / 31, 1 - i * 29 % 31 / 31] for i in range(len(TEXTS))])
    out, harden = {}, conf_loss.hardened_to_0
    for loss in train.LOSSES:
        hardened: list = []

        def spy(z, y, seen=hardened):
            seen.append(harden(z, y).tolist())
            return harden(z, y)

        conf_loss.hardened_to_0 = spy
        config = TrainConfig(loss=loss, lr=1e-4, batch_size=6, max_tokens_per_forward=64)
        log = train.finetune(classifier, TEXTS, labels, config)["log"]
        conf_loss.hardened_to_0 = harden
        probs = train.predict(classifier, TEXTS, config)
        out[loss] = {"losses": [r["loss"] for r in log], "hardened": hardened, "probs": probs.tolist()}
    log = train.finetune(classifier, TEXTS, labels, config)["log"]  # the last run again, after a prediction
    out["again"] = [[r["loss"] for r in log], train.predict(classifier, TEXTS, config).tolist()]
    if keep:
        save_model(classifier, Path(keep), config, "these texts")
    return out


def torchrun(*arguments: object, ranks: int = 1, node: int = 0, nodes: int = 1, port: int = 0) -> subprocess.Popen:
    launch = ["--nproc-per-node", ranks, "--nnodes", nodes, "--node-rank", node, "--master-addr", "127.0.0.1"]
    port = port or free_port()
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "--master-port", port, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ended_well(*runs: subprocess.Popen) -> None:
    for run in runs:
        told = run.communicate(timeout=300)[0]
        assert run.returncode == 0, told


@pytest.fixture(scope="module")
def alone(tiny_model):
    return finetuned(tiny_model("qwen2"))


@pytest.mark.parametrize("nodes, ranks", [(2, 1), (1, 2), (1, 4)])
def test_finetuning_is_the_same_on_any_number_of_ranks_and_nodes(nodes, ranks, tiny_model, alone, tmp_path):
    port = free_port()
    arguments = (__file__, tiny_model("qwen2"), tmp_path / "out.json")
    ended_well(*(torchrun(*arguments, ranks=ranks, node=n, nodes=nodes, port=port) for n in range(nodes)))
    got = json.loads((tmp_path / "out.json").read_text())
    for loss in train.LOSSES:
        wanted = alone[loss]
        assert got[loss]["hardened"] == wanted["hardened"]
        for key in ("losses", "probs"):
            assert_close(torch.tensor(got[loss][key]), torch.tensor(wanted[key]), atol=1e-5, rtol=0)
    assert got["again"] == [got[loss]["losses"], got[loss]["probs"]]  # what ran before does not matter, to the last bit
    assert len(alone["logconf"]["hardened"]) == 8 and torch.tensor(alone["xent"]["probs"]).std() > 1e-3


def test_a_run_killed_on_two_ranks_continues_on_one_to_the_same_tables(tmp_path):
    flags = ["run", "--preset", "smoke", "--tasks", "sciq", "--seeds", 0, "--limit-train", 16, "--limit-test", 8]
    flags += ["--methods", "finetune", "finetune_aux", "ours", "market_making", "--out"]
    whole = torchrun(ROOT / "w2s.py", *flags, tmp_path / "whole", ranks=2)
    killed = torchrun(ROOT / "w2s.py", *flags, tmp_path / "killed", ranks=2)
    begun = tmp_path / "killed/sciq/predictions/weak-debate-d0-t3-f0-s0/started.json"
    while not begun.exists() and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert begun.exists() and killed.wait() == -signal.SIGKILL
    ended_well(whole, torchrun(ROOT / "w2s.py", *flags, tmp_path / "killed"))
    for name in ("table2", "table4", "table5"):
        assert (tmp_path / f"killed/tables/{name}.md").read_text() == (tmp_path / f"whole/tables/{name}.md").read_text()
    files = sorted((tmp_path / "whole/sciq/transcripts").rglob("*.jsonl"))
    files += sorted((tmp_path / "whole/sciq/predictions").rglob("*.jsonl"))
    assert len(files) > 40
    for file in files:
        assert_same(file, tmp_path / "killed" / file.relative_to(tmp_path / "whole"))


def assert_same(file: Path, other: Path) -> None:
    """Probabilities to 1e-5, everything else to the byte; steps.jsonl holds seconds."""
    if {"predictions", "weak_labels"} & set(file.parts):
        if file.name != "steps.jsonl":
            got, wanted = (torch.tensor([r["probs"] for r in read_jsonl(f)]) for f in (other, file))
            assert_close(got, wanted, atol=1e-5, rtol=0)
    else:
        assert other.read_bytes() == file.read_bytes()


def test_a_whole_pipeline_is_the_same_on_two_ranks(tmp_path):
    """Many runs in one process, at a learning rate that tells them apart: a run must not see what ran before it."""
    flags = ["run", "--preset", "smoke", "--tasks", "sciq", "--seeds", 0]
    flags += ["--methods", "finetune", "finetune_aux", "ours"]
    ended_well(torchrun(ROOT / "w2s.py", *flags, "--out", tmp_path / "1"))
    ended_well(torchrun(ROOT / "w2s.py", *flags, "--out", tmp_path / "2", ranks=2))
    files = [f for f in sorted((tmp_path / "1/sciq").rglob("*.jsonl")) if f.name != "steps.jsonl"]
    assert len(files) > 20
    for file in files:
        assert_same(file, tmp_path / "2" / file.relative_to(tmp_path / "1"))
    assert (tmp_path / "1/tables/table2.md").read_text() == (tmp_path / "2/tables/table2.md").read_text()


def test_groups_train_side_by_side_what_one_process_trains(tmp_path):
    flags = ["run", "--preset", "smoke", "--tasks", "sciq", "--seeds", 0, 1, "--limit-train", 16, "--limit-test", 8]
    flags += ["--methods", "finetune", "finetune_aux", "--out"]
    groups = torchrun(ROOT / "w2s.py", *flags, tmp_path / "groups", "--weak-gpus", 1, "--strong-gpus", 1, ranks=2)
    ended_well(torchrun(ROOT / "w2s.py", *flags, tmp_path / "alone"), groups)
    files = sorted((tmp_path / "alone/sciq/predictions").rglob("t*.jsonl"))
    assert len(files) == 2 * 2 + 2 * 2 + 2 + 4 * 2  # two zero-shot models, floors, ceilings, students
    for file in files:
        assert (tmp_path / "groups" / file.relative_to(tmp_path / "alone")).read_bytes() == file.read_bytes()


def test_four_processes_in_groups_of_two_train_two_models_at_once(tiny_model, alone, tmp_path):
    ended_well(torchrun(__file__, tiny_model("qwen2"), tmp_path / "out.json", "2", ranks=4))
    for group in (0, 1):
        got = json.loads((tmp_path / f"out.json{group}").read_text())
        for loss in train.LOSSES:
            wanted = alone[loss]
            assert got[loss]["hardened"] == wanted["hardened"]
            assert_close(torch.tensor(got[loss]["probs"]), torch.tensor(wanted["probs"]), atol=1e-5, rtol=0)
        saved = Classifier(ModelSpec(f"{tmp_path}/out.json{group}.model"), 2, torch.float32)  # each group's, whole
        probs = train.predict(saved, TEXTS, TrainConfig())
        assert_close(probs, torch.tensor(got["again"][1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("failure", ["InputError", "OSError", "KeyError"])
def test_a_rank_that_fails_ends_though_its_shutdown_would_hang(failure, tmp_path):
    """As with NCCL, whose communicator waits for ranks that are in a collective. torchrun then stops the others."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import atexit, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from common import InputError, barrier, rank, run_script\n"
        "def main():\n"
        "    if rank() == 0:\n"
        "        atexit.register(time.sleep, 1000)\n"
        f"        raise {failure}('this one')\n"
        "    barrier()\n"
        "run_script(main)\n"
    )
    run = torchrun(script, ranks=2)
    try:
        told = run.communicate(timeout=60)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 1 and "this one" in told
    assert f"exitcode  : {2 if failure == 'InputError' else 1} " in told


def test_groups_that_do_not_divide_the_processes_are_refused(tmp_path):
    flags = ["--preset", "smoke", "--tasks", "sciq", "--methods", "finetune", "--weak-gpus", 2]
    run = torchrun(ROOT / "w2s.py", "run", *flags, "--out", tmp_path / "out", ranks=3)
    told = run.communicate(timeout=300)[0]
    assert run.returncode != 0 and "3 processes cannot be cut into groups of 2" in told


def main() -> None:
    with in_groups(int(sys.argv[3]) if len(sys.argv) > 3 else 0) as (mine, groups):
        name = sys.argv[2] + (str(mine) if groups > 1 else "")
        result = finetuned(sys.argv[1], f"{name}.model")
        if rank() == 0:
            Path(name).write_text(json.dumps(result))


if __name__ == "__main__":
    run_script(main)
