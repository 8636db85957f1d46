"""Several ranks, kills and memory: debates and stages do not depend on how many processes ran them or when they stopped."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from conftest import call, finish, run, start
from safetensors.torch import load_file
from test_robust import die_at

import stages
import steps
import w2s
from common import Ranks, read_jsonl, world, write_jsonl
from data.models import builtin_folder
from generate import DebateConfig, ShardedDebater
from model import ModelSpec
from stages import Stage


def make_stages(folder: Path) -> None:
    rank = os.environ["RANK"]

    def make(out: Path, ranks: Ranks) -> dict:
        (out / f"made{rank}").write_text("x")
        return {"tokens": 5}

    stages = [Stage(folder / f"shared{shared}", {}, {}, make, on_all_ranks=shared) for shared in (False, True)]
    made = [stage.run(world()) for stage in stages for _ in range(2)]
    (folder / f"made{rank}.json").write_text(json.dumps(made))


def test_a_manifest_says_how_many_processes_shared_the_gpu(monkeypatch):
    for processes in (1, 4):
        monkeypatch.setattr(stages, "processes_per_gpu", lambda n=processes: n)
        device = stages.provenance.__wrapped__()["device"]
        assert device.endswith(", shared by 4 processes") == (processes == 4) and device.startswith("cpu ")


def test_a_stage_is_made_by_one_rank_or_shared_by_all(tmp_path):
    finish(start(2, make_stages, tmp_path))
    assert [json.loads((tmp_path / f"made{r}.json").read_text()) for r in (0, 1)] == [[True, False] * 2] * 2
    for shared, files in ((False, ["made0"]), (True, ["made0", "made1"])):
        manifest = json.loads((tmp_path / f"shared{shared}/manifest.json").read_text())
        assert sorted(manifest["outputs"]) == files and manifest["tokens"] == 5


def make_the_rest(folder: Path) -> None:
    def make(out: Path, *_) -> dict:
        (out / os.environ["RANK"]).write_text("x")
        return {}

    stages = [Stage(folder / str(n), {}, {}, make, group_size=1) for n in range(4)]
    if world().rank == 0:
        _ = [stage.run() for stage in stages[::2]]
    w2s.make_all(stages, folder, {0: world(), 1: world().split(1)})


def test_what_is_left_of_a_run_goes_to_all_ranks(tmp_path):
    finish(start(2, make_the_rest, tmp_path))
    assert [sorted(p.name for p in (tmp_path / str(n)).iterdir())[0] for n in range(4)] == ["0", "0", "0", "1"]


def make_model(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)
    if world().rank == 0:
        world().barrier()  # the other rank is first
    assert "model.embed_tokens.weight" in load_file(builtin_folder("random-small") / "model.safetensors")
    if world().rank == 1:
        world().barrier()


def test_any_rank_can_make_a_built_in_model(tmp_path):
    finish(start(2, make_model, tmp_path))
    assert [p.name for p in (tmp_path / "w2s").iterdir() if p.is_dir()] == ["random-small"]


# ---- debates ----


@pytest.fixture(scope="module")
def debates(tiny_model, samples, tmp_path_factory):
    """The command of some debates but for its folder, and what one process writes there."""
    folder = tmp_path_factory.mktemp("debates")
    write_jsonl(folder / "samples.jsonl", samples)
    flags = f"--samples {folder}/samples.jsonl --strong {tiny_model('llama')} --seed 0 1 --dtype float32".split()
    flags += "--cache-tokens 1000 --max-new-tokens 6 --temperature 1 --out".split()
    assert run("debate", *flags, folder / "out") == 0
    return ("debate", *flags), texts(folder / "out")


def texts(out: Path) -> list[bytes]:
    return [(out / f"seed{k}.jsonl").read_bytes() for k in (0, 1)]


def test_two_processes_with_one_model_write_what_one_writes(debates, tmp_path):
    """With a model each: the pipelines of test_distributed.py."""
    command, wanted = debates
    finish(start(2, call, (*command, tmp_path, "--engine", "sharded")))
    assert texts(tmp_path) == wanted
    assert {p.name for p in tmp_path.iterdir()} <= {"seed0.jsonl", "seed1.jsonl", "manifest.json", ".lock"}


def test_killed_several_times_the_debates_are_the_same_and_nothing_finished_is_repeated(debates, tmp_path):
    """What is finished gets a mark: made again, it would lose it."""
    command, wanted = debates
    for size, n in ((2, 6), (1, 3), (2, 3)):
        ranks = start(size, die_at, n, signal.SIGKILL, ".rank", (*command, tmp_path))
        for p in ranks:
            p.join(300)
        assert [p.exitcode for p in ranks] == [-signal.SIGKILL] * size
        for part in tmp_path.glob("seed*.rank*"):
            write_jsonl(part, [r | {"turns": ["kept", *r["turns"][1:]]} for r in read_jsonl(part)])
        if n == 6:
            first, second = ({r["id"] for p in tmp_path.glob(f"*.rank{r}of2") for r in read_jsonl(p)} for r in (0, 1))
            assert first and second and not first & second  # the work was shared
    kept = [[r["id"] for p in tmp_path.glob(f"seed{k}*.rank*") for r in read_jsonl(p)] for k in (0, 1)]
    finish(start(1, call, (*command, tmp_path)))
    for k in (0, 1):
        rows = [json.loads(line) for line in wanted[k].splitlines()]
        marked = [r | ({"turns": ["kept", *r["turns"][1:]]} if r["id"] in kept[k] else {}) for r in rows]
        assert read_jsonl(tmp_path / f"seed{k}.jsonl") == marked and 0 < len(kept[k]) < 40


def sampled(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    debater = ShardedDebater.__new__(ShardedDebater)  # without a model
    debater.config, debater.ranks = DebateConfig(temperature=0.7), world()
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(rank))
    (folder / f"{rank}.json").write_text(json.dumps(debater.sample(logits, torch.arange(64)).tolist()))


def test_ranks_that_share_a_model_take_the_same_tokens_though_their_logits_differ(tmp_path):
    finish(start(2, sampled, tmp_path))
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second and len(set(first)) > 10


def answered(folder: Path, model: str, engine: str) -> None:
    settings, asked = DebateConfig(engine=engine, dtype="float32"), steps.ZeroShot(ModelSpec.parse(model), False)
    steps.make_zero_shot(steps.Files(folder, "sciq"), asked, settings, folder / engine, world(), steps.Held())


def test_ranks_that_share_a_model_answer_together_without_training(tiny_model, samples, tmp_path):
    model = tiny_model("llama")
    for part in ("train_b", "test"):
        write_jsonl(tmp_path / f"data/{part}.jsonl", samples)
    finish(start(2, answered, tmp_path, model, "sharded"))
    answered(tmp_path, model, "replicated")
    shared, alone = (
        torch.tensor([r["probs"] for r in read_jsonl(tmp_path / engine / "test.jsonl")])
        for engine in ("sharded", "replicated")
    )
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)
    assert len(shared.unique(dim=0)) > 10


@pytest.mark.parametrize("who, engine", [("zero_shot_strong", "sharded"), ("zero_shot_weak", "replicated")])
def test_a_strong_model_that_fits_no_gpu_is_never_loaded_whole(who, engine):
    stage = w2s.Experiment(w2s.Config.of("sciq", preset="smoke", engine="sharded"), "sciq").zero_shot(who)
    assert stage.make.args[2].engine == engine


def peak_memory(file: Path, *command) -> None:
    call(command)
    file.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_memory_is_flat_in_the_number_of_samples(tiny_model, tmp_path):
    peaks = []
    for n in (200, 2000):
        rows = [{"id": f"s{i}", "text": f"Q: {'why ' * (i % 5)}{i * 37 % 101} A: {i}"} for i in range(n)]
        write_jsonl(tmp_path / f"{n}.jsonl", rows)
        flags = f"--samples {tmp_path}/{n}.jsonl --strong {tiny_model('llama')} --turns 1 --out {tmp_path}/{n}".split()
        command = ("debate", *flags, *"--max-new-tokens 2 --cache-tokens 4000 --dtype float32".split())
        finish(start(1, peak_memory, tmp_path / f"{n}.txt", *command))
        assert len(read_jsonl(tmp_path / f"{n}/seed0.jsonl")) == n
        peaks.append(int((tmp_path / f"{n}.txt").read_text()))
    assert peaks[1] < 1.1 * peaks[0]
