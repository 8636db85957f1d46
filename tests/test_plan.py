"""plan.py: hours and gigabytes against an independent calculation, memory against measured peaks, what fits."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import debate
import generate
import model
import plan
import train
import w2s
from common import InputError
from data.models import builtin_folder
from data.prepare import TASKS
from model import ModelSpec
from sizes import GPUS, SIZES, Gpu, Shape

OFFLINE = """
import socket, sys
def refuse(*_):
    raise AssertionError("plan reached for the network")
socket.socket.connect = socket.getaddrinfo = refuse
import w2s
from common import run_script
run_script(w2s.main)
"""
ON_8 = ("--gpus", "8", "--gpu", "h100-80gb")


def run_plan(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", OFFLINE, "plan", "--out", tmp_path / "out", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def experiments(**given) -> list[w2s.Experiment]:
    given = {"dtype": "bfloat16", "tasks": ("sciq", "boolq")} | given
    return [w2s.Experiment(w2s.Config.of(task, **given), task) for task in given["tasks"]]


@pytest.mark.parametrize("preset", ["smoke", "tiny", "small", "paper-lora", "paper"])
def test_every_preset_is_planned_offline(tmp_path, preset):
    end = run_plan(tmp_path, "--preset", preset, *ON_8)
    assert end.returncode == 0, end.stderr
    assert "peak memory per GPU" in end.stdout and not (tmp_path / "out").exists()


def test_hours_and_gigabytes_of_the_strong_students_of_sciq(tmp_path):
    """Five ceilings and nineteen methods with five seeds, from the published shapes of Qwen-14B."""
    end = run_plan(tmp_path, "--preset", "paper", *ON_8, "--tasks", "sciq")
    cells = re.search("^sciq.*strong nothing.*", end.stdout, re.MULTILINE)[0].split()
    N = 40 * (4 * 5120**2 + 3 * 5120 * 13696)
    half, runs = 11679 // 2, 5 * (19 + 1)
    arithmetic = 6 * N * 32 * 22 / (8 * 989e12 * 0.4)
    exchange = 2 * N * 4 * 7 / 8 / (450e9 * 0.8)  # two bfloat16 gathers, one float32 reduction
    steps = 2 * -(-half // 32)
    read = 22 * (5 * 1000 + (runs - 5) * (half + 1000))  # a ceiling predicts the test split alone
    hours = (runs * steps * max(arithmetic, exchange) + 2 * N * read / (8 * 989e12 * 0.4)) / 3600
    assert int(cells[4]) == runs and float(cells[11]) == pytest.approx(hours, rel=2e-3) and "link" in cells[12:]
    parameters = N + 152064 * 5120
    # 32 samples on 8 GPUs, of 100 tokens at most
    activations = 40 * 4 * 100 * 2 * (8 * 5120 + 2 * 5120 * 2 + 4 * 13696)
    most = 16 * parameters / 8 + activations + 2 * 152064 * 5120 + 10 * N / 40
    found = re.search(r"sciq finetune strong: .* = (\S+) GB", end.stdout)[1]
    assert float(found) == pytest.approx(most / 1e9, abs=0.06)


@pytest.mark.parametrize("preset, gpu", [("small", "rtx4090-24gb"), ("small", "h200-141gb"), ("tiny", "l40s-48gb")])
def test_batches_of_debates_fill_the_memory_and_no_more(preset, gpu):
    """Within the tenth that is kept back, and what is assumed of the forward that reads."""
    config = dataclasses.replace(experiments(preset=preset)[0].config, cache_tokens=None)
    found = plan.Plan(config, "sciq", GPUS[gpu], 1)
    for protocol in ("debate", "market_making"):
        parts = found.memory(w2s.Debates(protocol, ModelSpec.parse(found.c.strong), dict.fromkeys(range(4), 3)))
        assert 0.4 < sum(parts.values()) / (1e9 * GPUS[gpu].gb) < 0.95, parts


def test_a_decode_step_of_a_small_model_is_as_long_as_its_launches():
    of_run = plan.Plan(experiments(preset="small")[0].config, "sciq", GPUS["h100-80gb"], 1)
    step = of_run.decode_step(Shape(1536, 28, 8960, 12, 2, 128, 151936), 3, 40, (22, 0))
    assert max(step, key=step.get) == "launches" and step["launches"] == pytest.approx(28 * 0.3e-3)


NO_FIT = [
    ("--gpus 1 --gpu rtx4090-24gb", ["needs", "rtx4090-24gb has 24 GB", "a smaller model"]),
    ("--gpus 8 --gpu h100-80gb --cache-tokens 40000", ["market_making", "--cache-tokens 26000"]),
    ("--gpus 4 --gpu h100-80gb", ["finetune strong", "would fit: --checkpointing"]),
    ("--gpus 8 --gpu tpu", ["tpu", "h100-80gb", "rtx4090-24gb"]),
    ("--gpus 0 --gpu h100-80gb", ["--gpus 0"]),
]


@pytest.mark.parametrize("flags, told", NO_FIT)
def test_what_does_not_fit_is_refused_with_what_would(flags, told, tmp_path):
    end = run_plan(tmp_path, "--preset", "paper", *flags.split())
    assert (end.returncode, end.stderr.count("\n")) == (2, 1), end.stderr
    assert end.stderr.startswith("error: ") and all(word in end.stderr for word in told), end.stderr


CHOSEN = [
    ("h100-80gb", 8, "paper"),
    ("h100-80gb", 6, "paper --checkpointing"),
    ("h100-80gb", 7, "paper --max-tokens-per-forward 4096"),
    ("h100-80gb", 1, "paper-lora"),
    ("h100-80gb", 3, "paper-lora"),
    ("rtx4090-24gb", 1, "small"),
    (None, None, "tiny"),  # a CPU
]


@pytest.mark.parametrize("gpu, gpus, chosen", CHOSEN)
def test_auto_takes_the_largest_preset_that_fits_with_the_flags_it_needs(gpu, gpus, chosen, capsys):
    plan.choose_preset(lambda preset: experiments(preset=preset, gpu=gpu, gpus=gpus))
    assert capsys.readouterr().out.strip() == chosen


@pytest.mark.parametrize("gpus", range(1, 9))
@pytest.mark.parametrize("preset, gpu, gb", [("small", "rtx4090-24gb", 20), ("paper-lora", "h100-80gb", 76)])
def test_presets_with_adapters_fit_any_number_of_one_gpu(preset, gpu, gb, gpus):
    made = experiments(preset=preset, gpu=gpu, gpus=gpus, tasks=("sciq", "boolq", "cosmos_qa", "anthropic_hh"))
    assert max(most for most, *_ in plan.peaks(made, GPUS[gpu], gpus, {}).values()) < gb


def test_a_step_of_adapters_by_the_published_shape_of_qwen_14b():
    """No gradient of the frozen weights: 4 N FLOPs a token, 2 bytes a weight; of the adapters 16."""
    N, D, F, blocks, V = 40 * (4 * 5120**2 + 3 * 5120 * 13696), 5120, 13696, 40, 152064
    for gpus, changes, flops in ((1, {}, 4), (1, {"checkpointing": True}, 6), (2, {"strong_gpus": 2}, 4)):
        made = experiments(preset="paper-lora", **changes)[0]
        of_run = plan.Plan(made.config, "sciq", GPUS["h100-80gb"], gpus)
        run = made.strong_ceiling(0).work
        step, parts = of_run.train_step(run, 22), of_run.memory(run)
        adapters = 16 * blocks * (4 * 2 * D + 3 * (D + F))
        assert step["training"] == pytest.approx(flops * N * 32 * 22 / gpus / (989e12 * 0.4))
        assert step["link"] == pytest.approx(8 * adapters * (gpus - 1) / gpus / (450e9 * 0.8))
        assert (parts["frozen"], parts["adapters"]) == (2 * (N + V * D), 16 * adapters)


def test_every_task_has_its_sizes_and_every_passage_its_length():
    built_in = {name: task for name, task in TASKS.items() if not task.file}  # other tests add their own
    assert {name: sizes[5] > 0 for name, sizes in SIZES.items()} == {t: bool(of.evidence) for t, of in built_in.items()}


def test_a_task_of_unknown_lengths_is_refused(monkeypatch):
    monkeypatch.delitem(SIZES, "sciq")
    with pytest.raises(InputError, match="lengths of task sciq are not known"):
        planned(ModelSpec("random-large"))


@pytest.mark.parametrize("flags", [["--gpus", "2"], ["--measure"], ["--preset", "auto"]])
def test_the_flags_of_plan_are_for_plan_only(flags):
    end = subprocess.run([sys.executable, ROOT / "w2s.py", "status", *flags], capture_output=True, text=True)
    assert (end.returncode, end.stderr.count("\n")) == (2, 1) and "plan" in end.stderr and flags[0] in end.stderr


# ---- memory as measured ----


def peak(work) -> int:
    """The most bytes that torch held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most


@pytest.fixture(scope="module", params=[2, 4])
def spec(request, tmp_path_factory) -> ModelSpec:
    """A small model with two or four heads of keys and the byte tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=258, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=request.param, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin_folder("random-small")).save_pretrained(folder)
    return ModelSpec(str(folder))


def planned(spec: ModelSpec, **given) -> plan.Plan:
    made = experiments(preset="smoke", weak="random-small", strong=spec.name, batch_size=8, **given)[0]
    found = plan.Plan(made.config, "sciq", Gpu(1, 8, 10, 1, cpu=True), 1)
    found.longest = (128, 0)
    return found


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype, checkpointing", [("float32", False), ("float32", True), ("bfloat16", False)])
def test_memory_of_a_finetuning_is_what_was_measured(spec, dtype, checkpointing, rank):
    """Peaks of what torch allocates on a CPU, which keeps scores too, within 15%; 20% where activations are most of it and
    bfloat16, since the norms then keep their inputs in float32, which is not counted."""
    config = train.TrainConfig(epochs=2, batch_size=8, checkpointing=checkpointing, kernels="reference")

    def finetune() -> None:
        classifier = model.Classifier(spec, 2, getattr(torch, dtype), "reference", lora_rank=rank, lora_alpha=16)
        train.finetune(classifier, ["x" * 128] * 8, torch.full((8, 2), 0.5), config)

    run = w2s.Run("strong", spec, config, predicts=("test",))
    parts = planned(spec, dtype=dtype, checkpointing=checkpointing, lora_rank=rank).memory(run)
    within = 0.2 if rank and dtype == "bfloat16" else 0.15
    assert sum(parts.values()) == pytest.approx(peak(finetune), rel=within), parts


def test_memory_of_debates_is_what_was_measured(spec):
    columns = []

    def decode() -> None:
        debater = generate.Debater(spec, generate.DebateConfig(max_new_tokens=16, temperature=1.0, dtype="float32"))
        debater.is_end[:] = False
        samples = [{"id": str(i), "text": "y" * 300} for i in range(8)]
        rows = debate.run_protocol(debater, "sciq", "debate", samples, [0, 1, 2, 3], 3)
        said = max(len(debate.encode_turn(debater, "debate", 0, r["turns"][0])) for seed in rows for r in seed)
        asked = max(len(debate.encode_instruction(debater, "sciq", "debate", t, 0)) for t in range(3))
        columns.append(len(debate.encode_question(debater, "sciq", "debate", samples[0])) + 2 * said + asked + 16)

    measured = peak(decode)
    work = w2s.Debates("debate", spec, dict.fromkeys(range(4), 3))
    of_run = planned(spec, dtype="float32", max_new_tokens=16, cache_tokens=32 * columns[0])
    of_run.mean = (300, 0)
    parts = of_run.memory(work)
    parts["KV"] /= 1.5  # none ended early, so no rows went on in a copy
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15), parts


def test_measuring_runs_one_longest_batch_of_each_kind(tmp_path):
    flags = "--preset tiny --weak smollm2-135m:2 --strong smollm2-135m:6 --tasks places_evidence --max-new-tokens 4"
    end = run_plan(tmp_path, *flags.split(), "--measure")
    assert end.returncode == 0, end.stderr
    found = re.findall(r"  places_evidence (.*): (\S+) s \((\S+)\), (\S+) GB \((\S+)\)", end.stdout)
    assert [kind for kind, *_ in found] == ["finetune weak", "debates debate", "finetune strong"]
    for _, seconds, _, used, estimated in found:
        assert float(seconds) > 0 and float(estimated) / 2 < float(used) < 2 * float(estimated)
    assert not (tmp_path / "out").exists()
