"""kernels/: every output against float64, the quantile against torch's, registers on sm_90.

Here the kernels run in Triton's interpreter (conftest.py), which shows neither races nor the GPU's rounding; test_gpu.py
runs the comparisons again on a GPU.
"""

import csv
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from conftest import ROOT, finetuned
from torch.testing import assert_close

import train
from bench import debates, measure, steps
from bench import kernels as bench
from common import InputError, write_jsonl
from generate import DebateConfig, Debater
from kernels import conf_loss, head, resolve
from model import Classifier, ModelSpec, device
from sizes import SHAPES

DEVICE = device()
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's log(0) and 0 * inf, of which no trace may be stored
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN: an element that a kernel does not write shows in every comparison."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.empty(2, 2).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_accurate(got, want, scale=None):
    """float32: 1e-6 of the norm of `scale`, if not of `want`. bfloat16: one unit in the last place of the rounded value."""
    assert got.shape == want.shape and want.dtype == torch.float64 and want.norm() > 0
    error = (got.double() - want).abs()
    if got.dtype == torch.float32:
        assert error.norm() <= 1e-6 * (want if scale is None else scale).norm()
    else:
        ulp = 2.0 ** (want.abs().clamp_min(1e-30).log2().floor() - 7)
        error = (got.double() - want.bfloat16().double()).abs()
        assert (error <= ulp + 1e-6 * want.abs().max()).all()  # where terms cancel, float32's error counts


# ---- head ----

# B: 513 and 1030 are split among programs, with a rest; D: 5120 is more than one block of the forward, 576 of the backward
HEADS = [
    (1, 64, 2, "float32"), (2, 5120, 3, "bfloat16"), (31, 576, 2, "float32"), (31, 64, 8, "bfloat16"),
    (32, 5120, 2, "float32"), (289, 64, 2, "bfloat16"), (513, 64, 3, "float32"), (1030, 64, 2, "float32"),
]  # fmt: skip


@pytest.mark.parametrize("B, D, K, dtype", HEADS)
def test_head_and_its_gradients_are_those_of_float64(B, D, K, dtype):
    N = B + 7
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:B].int().to(DEVICE)
    hidden, weight, g = randn(N, D).to(getattr(torch, dtype)), randn(K, D, seed=3), randn(B, K, seed=4)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]

    def run(kernels, hidden, weight):
        z = head.head(hidden, rows, weight, kernels)
        return z, torch.autograd.grad(z, (hidden, weight), g.to(z.dtype))

    z, gradients = run("triton", *inputs)
    want_z, want_gradients = run("reference", *doubles)
    assert z.dtype == torch.float32
    assert_accurate(z, want_z)
    for x, got, want in zip(inputs, gradients, want_gradients, strict=True):
        assert got.dtype == x.dtype
        assert_accurate(got, want)


# ---- loss ----

SIZES = [  # E, B, K
    (1, 1, 2), (1, 2, 3), (3, 31, 2), (1, 32, 2), (8, 32, 8), (3, 289, 3), (3, 289, 2), (1, 4096, 2), (1, 4096, 8), (64, 5, 2),
]  # fmt: skip
LOSSES = [(mode, *sizes) for sizes in SIZES for mode in conf_loss.MODES if mode != "logconf" or sizes[2] == 2]


def random_batch(E, B, K):
    z, y = 3 * randn(E, B, K), (2 * randn(E, B, K, seed=1)).softmax(-1)
    hard = torch.rand(y.shape[:2], generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.3
    return z, torch.where(hard[..., None], torch.nn.functional.one_hot(y.argmax(-1), K).float(), y)


@pytest.mark.parametrize("mode, E, B, K", LOSSES)
def test_loss_and_gradient_are_those_of_float64(mode, E, B, K):
    z, y = random_batch(E, B, K)
    config = train.TrainConfig(loss=mode, alpha=1.5, beta=0.5, aux_coef=0.6, warmup_frac=0.7)
    got = train.loss_and_gradient(z, y, 0.5, config, "triton")
    want = train.loss_and_gradient(z.double(), y.double(), 0.5, config, "reference")
    for g, w, scale in zip(got, want, (None, z.double().softmax(-1) / B), strict=True):
        assert g.dtype == torch.float32
        assert_accurate(g, w, scale)  # the gradient is a difference of probabilities, be it small


# ---- the quantile ----


@triton.jit
def quantile_kernel(p_ptr, margin_ptr, q_ptr, n_ptr, out_ptr, ROWS: tl.constexpr):
    e = tl.program_id(0)
    b = tl.arange(0, ROWS)
    n = tl.load(n_ptr + e)
    p = tl.load(p_ptr + e * ROWS + b)
    margin = tl.load(margin_ptr + e * ROWS + b)
    tl.store(out_ptr + e, conf_loss.select_quantile(p, margin, b < n, tl.load(q_ptr + e), n))


def logits_of(kind, n, generator):
    u = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    return [
        6 * u - 3,
        torch.zeros_like(u),  # all equal
        (4 * u).floor() / 2,  # ties
        (u - 0.5).bfloat16().double(),
        torch.where(u[:, :1] < 0.5, 800.0, -800.0) * torch.tensor([[1.0, -1.0]]),  # zeros and ones
        120 * u - 60,  # saturated
        5.0 + 1e-9 * u[:, :1] * torch.tensor([[1.0, 0.0]]),  # one float32 margin
        torch.tensor([3e38, -3e38, 0.0, 1e-38])[(4 * u).long()].double(),
    ][kind]


def test_quantile_is_torchs_in_a_thousand_cases():
    """Thresholds to one unit in the last place (fused or not), and the same samples on either side."""
    generator, ROWS, n_cases = torch.Generator().manual_seed(0), 32, 1000
    p, margins = torch.full((n_cases, ROWS), 7.0, dtype=torch.float64), torch.full((n_cases, ROWS), 7.0)
    q, n = torch.rand(n_cases, generator=generator, dtype=torch.float64), torch.randint(1, ROWS + 1, (n_cases,))
    q[::7], q[1::7], n[2::7] = 0, 1, ROWS
    q[3::7] = torch.arange(len(q[3::7])) % n[3::7] / n[3::7]  # mean of hard labels
    for i in range(n_cases):
        z = logits_of(i % 8, int(n[i]), generator)
        p[i, : n[i]] = z.softmax(-1)[:, 0]
        margins[i, : n[i]] = (z[:, 0] - z[:, 1]).float()
    got = torch.empty(n_cases, dtype=torch.float64, device=DEVICE)
    arrays = [x.to(DEVICE) for x in (p, margins, q, n.int())]
    quantile_kernel[(n_cases,)](*arrays, got, ROWS=ROWS, num_warps=1)
    for i in range(n_cases):
        values = p[i, : n[i]]
        want = torch.quantile(values, q[i])
        assert abs(got[i].item() - want.item()) <= 2**-52 * want.item(), f"kind {i % 8}"
        assert torch.equal(values >= got[i].cpu(), values >= want), f"kind {i % 8}"
        assert torch.equal(conf_loss.quantile(values, q[i : i + 1])[0], want)


def test_logits_that_are_not_finite_give_a_loss_that_is_not_and_end():
    z, y = random_batch(2, 32, 2)
    z[0, 3, 0] = float("nan")
    loss, _ = conf_loss.conf_loss(z, y, "logconf", 0.5)
    assert loss.isnan().tolist() == [True, False]


# ---- choosing ----


def test_what_cannot_run_is_refused_in_one_line():
    with pytest.raises(InputError, match="kernels 'cuda': choose from auto, triton, reference"):
        resolve("cuda")
    with pytest.raises(InputError, match="4097 samples"):
        conf_loss.conf_loss(randn(1, 4097, 2), randn(1, 4097, 2), "logconf")
    with pytest.raises(InputError, match="33 classes"):
        head.head(randn(2, 8), torch.arange(2, device=DEVICE), randn(33, 8), "triton")
    for logconf in (lambda x: conf_loss.conf_loss(x, x, "logconf"), lambda x: conf_loss.logconf_target(x, x, 0.5)):
        with pytest.raises(ValueError, match="K=3"):
            logconf(randn(1, 4, 3))
    with pytest.raises(ValueError, match=r"labels \[1, 4, 2\] of logits \[2, 4, 2\]"):
        conf_loss.conf_loss(randn(2, 4, 2), randn(1, 4, 2), "xent")


def test_a_run_with_kernels_is_a_run_without(samples):
    """Whole steps through head and loss: same losses and predictions to float32's rounding."""
    outcomes = []
    for kernels in ("triton", "reference"):
        classifier = Classifier(ModelSpec("random-small"), 2, torch.float32, kernels)
        assert classifier.kernels == kernels
        cost, probs = finetuned(classifier, samples[:16], loss="logconf", epochs=2)
        outcomes.append((torch.tensor([row["loss"] for row in cost["log"]]), probs))
    assert outcomes[0][1].std() > 0.01
    assert_close(outcomes[0], outcomes[1], atol=1e-5, rtol=1e-5)


# ---- compiled for a GPU ----


def test_no_kernel_spills_registers_on_sm_90():
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests/compile_kernels.py")]
    done = subprocess.run(command, env=without, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + 19


# ---- the benchmark ----


def test_the_loop_that_steps_are_measured_against_computes_the_same(samples):
    spec, texts = ModelSpec("random-small"), [s["text"] for s in samples]
    labels, config = train.soft_labels(samples, 2), train.TrainConfig(loss="logconf", lr=1e-2, epochs=1, batch_size=16)
    logs = [steps.build(name, spec).finetune(texts, labels, config) for name in ("ours", "openai 1", "openai 16")]
    losses = torch.tensor([[row["loss"] for row in log] for log in logs])
    assert losses.shape == (3, 3) and (losses[0].diff().abs() > 1e-3).all()
    assert_close(losses[1:], losses[:1].expand(2, 3), atol=1e-4, rtol=0)
    assert [row["tokens"] for row in logs[0]] == [row["tokens"] for row in logs[1]]


def test_a_profile_counts_launches_and_waits_of_one_step(samples):
    """A run of two steps less a run of one: what is done once per run cancels, what is done per step stays."""
    config = train.TrainConfig(epochs=1, batch_size=8)
    texts, labels = [s["text"] for s in samples[:16]], train.soft_labels(samples[:16], 2)
    log, peak, calls = steps.measure("ours", ModelSpec("random-small"), texts, labels, config)
    assert len(log) == 2 and 0.05 < peak < 50
    assert calls["CPU", "aten::embedding_dense_backward"] == 1 and ("CUDA", "") not in calls
    on_gpu = Counter({("CUDA", "gemm"): 5, ("CUDA", "Memcpy HtoD"): 2, ("CPU", "cudaStreamSynchronize"): 3})
    on_gpu |= {("CPU", "cudaLaunchKernel"): 5, ("CPU", "cudaDeviceSynchronize"): 1, ("CPU", "cudaEventSynchronize"): 1}
    assert (measure.launched(on_gpu), measure.waited(on_gpu)) == (7, 4)


def test_a_step_is_held_against_plan():
    flops, gb = steps.planned(ModelSpec("smollm2-135m"), train.TrainConfig(), 3000, 100)
    shape = SHAPES["smollm2-135m"]
    assert flops == 6 * 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536)  # of the blocks' matrices
    assert gb > 16 * (shape.body + shape.V * shape.D) / 1e9
    assert steps.planned(ModelSpec("smollm2-135m"), train.TrainConfig(), 6000, 100)[1] > gb


def test_the_floor_of_a_token_step_is_weights_and_cache():
    debater = Debater(ModelSpec("random-small"), DebateConfig(dtype="float32"))
    debater.is_end[:] = False
    session = debater.prefill([[1] * 70], 3)
    weights = 4 * sum(p.numel() for p in debater.model.parameters())
    assert debates.bytes_read(debater.model, session, 70) == weights + 2 * 2 * (3 * 70 * 16) * 4  # layers, K and V
    step, floor = debates.decode_step(debater, rows=3, columns=70, bandwidth=1e9)
    assert step > 0 and floor == pytest.approx(1e3 * debates.bytes_read(debater.model, session, 78) / 1e9)
    assert debater.config.max_new_tokens == DebateConfig().max_new_tokens


def test_the_table_has_a_row_per_provider(tmp_path, monkeypatch):
    out = tmp_path / "bench.csv"
    monkeypatch.setattr(sys, "argv", ["bench", "--rows", "T1", "T4", "H", "--seconds", "0", "--csv", str(out)])
    bench.main()
    rows = list(csv.DictReader(open(out)))
    assert {r["provider"] for r in rows} >= {"eager", "together", "one by one"}
    assert {r["loss"] for r in rows} == set(conf_loss.MODES) and all(r["torch"] and r["commit"] for r in rows)
    assert all(0 < float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) for r in rows)


def test_the_benchmark_refuses_too_few_samples(tmp_path):
    write_jsonl(tmp_path / "few.jsonl", [{"id": str(i), "text": "a"} for i in range(40)])
    with pytest.raises(InputError, match="40 rows, 64 are needed"):
        list(steps.step_rows(steps.Args(samples=str(tmp_path / "few.jsonl"), steps=2, rounds=1), []))
