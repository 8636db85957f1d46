"""plan.py: hours and gigabytes against an independent calculation, memory against measured peaks, what it refuses."""

import json
import re
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

import plan
from common import InputError

GPU = plan.GPUS["h100-80gb"]
OFFLINE = """
import socket, sys
def refuse(*_):
    raise AssertionError("plan reached for the network")
socket.socket.connect = socket.getaddrinfo = refuse
import w2s
from common import run_script
run_script(w2s.main)
"""


def run_plan(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", OFFLINE, "plan", "--out", tmp_path / "out", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("preset", ["smoke", "tiny", "small", "paper"])
def test_every_preset_is_planned_in_seconds_and_offline(tmp_path, preset):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    end = run_plan(tmp_path, "--preset", preset, "--gpus", "8", "--gpu", "h100-80gb")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.returncode == 0, end.stderr
    assert "peak memory a GPU" in end.stdout and not (tmp_path / "out").exists()
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # others may use the cores too
    assert seconds < 10, f"{seconds:.1f} s of CPU time; 5 s on an idle machine"


def test_the_device_at_hand_is_timed(tmp_path):
    end = run_plan(tmp_path, "--preset", "smoke")
    assert end.returncode == 0, end.stderr
    rate, memory = re.search(r"1 x this \w+: (\S+) TFLOP/s, (\S+) GB", end.stdout).groups()
    assert float(rate) > 0 and float(memory) > 1


def test_hours_and_gigabytes_of_the_strong_students_of_sciq(tmp_path):
    """Five ceilings and nineteen methods with five seeds, from the published shapes of Qwen-14B."""
    end = run_plan(tmp_path, "--preset", "paper", "--gpus", "8", "--gpu", "h100-80gb", "--tasks", "sciq")
    cells = next(line for line in end.stdout.splitlines() if re.match(r"sciq +finetune strong ", line)).split()
    N = 40 * (4 * 5120**2 + 3 * 5120 * 13696)
    half, runs = 11679 // 2, 5 * (19 + 1)
    arithmetic = 6 * N * half * 2 * 22 / (8 * 989e12 * 0.4)
    exchange = -(-half // 32) * 2 * N * 8 * 7 / 8 / (450e9 * 0.8)  # two bf16 gathers, one float32 reduction a step
    predicted = 2 * N * 22 * (half + 1000) / (8 * 989e12 * 0.4)
    hours = runs * (max(arithmetic, exchange) + predicted) / 3600
    assert int(cells[3]) == runs and float(cells[-1]) == pytest.approx(hours, abs=2e-3) and exchange > arithmetic
    with_embeddings = N + 152064 * 5120
    state, tokens = 16 * with_embeddings / 8, 4 * 100  # 32 samples on 8 GPUs, none longer than 100 tokens
    a_block = 16 * 5120 + 4 * 2 * 5120 + 4 * 40 + 8 * 13696  # norms; queries, keys, values, result; sums; MLP
    activations = tokens * (39 * a_block + 8 * 5120 + 4 * 5120 + 2 * 13696)
    gathered = 2 * 152064 * 5120 + 10 * N / 40
    peak = state + gathered + max(activations, 2 * 152064 * 5120)
    found = re.search(r"sciq strong-\S+ finetuning.* = (\S+) GB", end.stdout)[1]
    assert float(found) == pytest.approx(peak / 1e9, abs=0.06)


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--gpus", "1", "--gpu", "rtx4090-24gb"],
            ["needs", "rtx4090-24gb has 24 GB", "would fit: --strong-gpus 16 --gpus 16"],
        ),
        (
            ["--gpus", "8", "--gpu", "h100-80gb", "--cache-tokens", "40000"],
            ["sciq market_making", "--cache-tokens 30000", "--engine sharded"],
        ),
        (["--gpus", "2", "--gpu", "h100-80gb"], ["finetuning", "would fit:", "-gpus"]),
        (["--gpus", "8", "--gpu", "tpu"], ["tpu", "h100-80gb", "rtx4090-24gb"]),
        (["--gpus", "0", "--gpu", "h100-80gb"], ["--gpus 0"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(tmp_path, flags, told):
    end = run_plan(tmp_path, "--preset", "paper", *flags)
    assert (end.returncode, end.stderr.count("\n")) == (2, 1), end.stderr
    assert end.stderr.startswith("error: ") and all(word in end.stderr for word in told), end.stderr


def test_every_task_has_its_sizes_and_every_passage_its_length():
    for name, task in plan.TASKS.items():
        for table in (plan.ROWS, plan.TOKENS):
            assert name in table or task.source in table, name
        assert (name in plan.EVIDENCE) == bool(task.evidence), name


def test_a_remedy_is_only_named_where_it_helps():
    ways = [("--gpus 2", {"a": 80e9}), ("--gpus 4", {"a": 40e9}), ("--gpus 8", {"a": 9e9})]
    need = plan.Need("x: training", "training", {"a": 90e9}, ways)
    with pytest.raises(InputError, match=r"90.0 GB .* would fit: --gpus 4 \(40.0 GB\)$"):
        plan.check([need], GPU, "h100-80gb")
    plan.check([plan.Need("x: training", "training", {"a": 70e9}, [])], GPU, "h100-80gb")


def test_the_flags_of_plan_are_for_plan_only():
    command = [sys.executable, ROOT / "w2s.py", "status", "--preset", "smoke", "--gpus", "2"]
    end = subprocess.run(command, capture_output=True, text=True)
    assert (end.returncode, end.stderr.count("\n")) == (2, 1) and "plan" in end.stderr


MEASURED = """
import json, sys
import torch
from torch.profiler import ProfilerActivity, profile
import debate, generate, model, train
from debate import encode_instruction, encode_question, encode_turn
from model import ModelSpec
torch.set_num_threads(1)
spec = ModelSpec(sys.argv[1])

def peak(work):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    now = most = 0
    for _, n in sizes:
        now += n
        most = max(most, now)
    return most

def step(dtype, checkpointing):
    classifier = model.Classifier(spec, 2, dtype, "reference")
    config = train.TrainConfig(epochs=2, batch_size=8, checkpointing=checkpointing, kernels="reference")
    train.finetune(classifier, ["x" * 128] * 8, torch.full((8, 2), 0.5), config)

def decode():
    debater = generate.Debater(spec, generate.DebateConfig(max_new_tokens=16, temperature=1.0, dtype="float32"))
    debater.is_end[:] = False
    samples = [{"id": str(i), "text": "y" * 300} for i in range(8)]
    rows = debate.run_protocol(debater, "sciq", "debate", samples, [0, 1, 2, 3], 3)
    rows = [r for seed in rows for r in seed]
    lengths["said"] = max(len(encode_turn(debater, "debate", t, r["turns"][t])) for r in rows for t in range(2))
    lengths["opening"] = len(encode_question(debater, "sciq", "debate", samples[0]))
    lengths["asked"] = max(len(encode_instruction(debater, "sciq", "debate", t, 0)) for t in range(3))

lengths = {}
found = {
    "float32": peak(lambda: step(torch.float32, False)),
    "float32 recomputing": peak(lambda: step(torch.float32, True)),
    "bfloat16": peak(lambda: step(torch.bfloat16, False)),
    "decoding": peak(decode),
}
print(json.dumps([found, lengths]))
"""


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_memory_is_what_was_measured(tmp_path, family):
    """Peaks of what torch allocates on a CPU, which keeps scores and pretrained weights too, within 15%."""
    import torch
    import transformers as t

    from data.models import builtin_folder

    kind = {"llama": (t.LlamaConfig, t.LlamaForCausalLM), "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM)}[family]
    config = kind[0](
        vocab_size=258, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2 if family == "llama" else 4, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    kind[1](config).to(torch.bfloat16).save_pretrained(tmp_path)
    t.AutoTokenizer.from_pretrained(builtin_folder("random-small")).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURED, tmp_path]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert end.returncode == 0, end.stderr
    measured, lengths = json.loads(end.stdout.splitlines()[-1])
    m = plan.shape_of(plan.ModelSpec(str(tmp_path)))
    columns = plan.cache_columns(lengths["opening"], lengths["asked"], lengths["said"], 16, 3)
    fed = lengths["said"] + lengths["asked"]
    decoding = plan.debating_memory(m, 8, 4, columns, lengths["opening"], fed, 4)
    decoding.pop("rows left")  # none ended early
    planned = {
        "float32": plan.finetuning_memory(m, 1, 1024, 128, False, 4, False),
        "float32 recomputing": plan.finetuning_memory(m, 1, 1024, 128, True, 4, False),
        "bfloat16": plan.finetuning_memory(m, 1, 1024, 128, False, 2, False),
        "decoding": decoding,
    }
    ratio = {k: sum(planned[k].values()) / measured[k] for k in measured}
    print(ratio, planned, measured, lengths)
    assert all(1 / 1.15 < r < 1.15 for r in ratio.values()), (ratio, planned, measured)
