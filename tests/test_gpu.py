"""Everything that needs a GPU: attention and kernels against float64, packed against plain forwards, steps that never wait.

The other tests hide the GPU from their process. The first test here starts one that sees it and runs the rest there:

    python -m pytest -rs tests/test_gpu.py                        says why, where it cannot
    W2S_TEST_ON_GPU=1 python -m pytest -v tests/test_gpu.py       test by test
"""

import contextlib
import os
import subprocess
import sys

import pytest
import test_debate
import test_kernels
import test_model
import torch
from conftest import ROOT, finetuned
from test_kernels import poisoned_memory  # noqa: F401
from torch.testing import assert_close

import generate
import heads
import model
import train
from bench.measure import launched, profiled
from common import stable_hash
from generate import DebateConfig, Debater
from kernels import conf_loss, head
from model import Classifier, ModelSpec, load_model, pack, packed_attention
from train import TrainConfig

VISIBLE = os.environ.get("W2S_TEST_ON_GPU") == "1"
HERE = VISIBLE and torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HERE, reason="needs a GPU, seen by a process of its own")
WIDE = "qwen2 of 16"  # head_dim 16: FlashAttention takes multiples of 8


@pytest.mark.skipif(VISIBLE, reason="the GPU is visible already")
def test_the_rest_where_the_gpu_is_visible():
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch is built without CUDA")
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")}
    env |= {"W2S_TEST_ON_GPU": "1"}
    if (devices := env.pop("W2S_HIDDEN_GPUS")) != "all":
        env["CUDA_VISIBLE_DEVICES"] = devices
    command = [sys.executable, "-m", "pytest", "-rs", __file__]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if "passed" not in done.stdout and "failed" not in done.stdout and "needs a GPU" in done.stdout:
        pytest.skip("no GPU here")
    assert done.returncode == 0


@contextlib.contextmanager
def no_waits():
    """Anything inside that makes the CPU wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# ---- attention ----


def attention_by_definition(q, k, v, lengths):
    """Causal attention of each sample in float64: [1, H, T, d], [1, H_kv, T, d] -> [1, T, H, d]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    sample = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=q.device)
    seen = (sample[:, None] == sample).tril()
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@on_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("H, H_kv", [(4, 4), (4, 2), (12, 2), (8, 1)])
@pytest.mark.parametrize("lengths", [[1], [130], [1, 7, 130, 64, 2], [3] * 33])
def test_packed_attention_and_its_gradients_are_those_of_float64(lengths, H, H_kv, dtype, tolerance):
    T, g = sum(lengths), torch.Generator("cuda").manual_seed(0)
    q, k, v, to = (torch.randn(1, h, T, 16, device="cuda", generator=g).to(dtype) for h in (H, H_kv, H_kv, H))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    _, _, where = pack([[1] * n for n in lengths], q.device)
    out, _ = packed_attention(None, *inputs, None, 16**-0.5, where)
    want = attention_by_definition(*doubles, lengths)
    assert out.dtype == dtype and relative_error(out, want) < tolerance
    gradients = torch.autograd.grad(out, inputs, to.transpose(1, 2))
    for got, wanted in zip(gradients, torch.autograd.grad(want, doubles, to.double().transpose(1, 2)), strict=True):
        error = (got.double() - wanted).norm()  # of one token the gradient of a query is zero
        assert got.dtype == dtype and error < 2 * tolerance * max(wanted.norm(), to.double().norm() / 10)


@on_gpu
def test_float32_attention_stores_no_scores():
    n, H = 4096, 8
    q, k, v = (torch.randn(1, h, n, 16, device="cuda", requires_grad=True) for h in (H, 2, 2))
    _, _, where = pack([[1] * n], q.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed_attention(None, q, k, v, None, pack=where)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * H * n * n / 4


# ---- finetuning ----


@on_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float32, 1e-4)])
def test_packed_is_padded_and_each_sample_alone(dtype, tolerance, tiny_model, samples):
    import transformers

    spec = ModelSpec(tiny_model(WIDE))
    classifier, plain = Classifier(spec, 2, dtype), load_model(spec, transformers.AutoModel, torch.float32).cuda()
    tokens, _ = classifier.encode([s["text"] for s in samples], 100)
    with torch.no_grad():
        padded = test_model.padded_features(plain, tokens)
        packed = classifier.features(tokens)
        alone = torch.cat([classifier.features([t]) for t in tokens])
    assert padded.std() > 0.1 and relative_error(packed, padded) < tolerance
    assert relative_error(alone, packed) < tolerance


@on_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", train.LOSSES)
def test_a_step_never_waits_for_the_gpu(loss, checkpointing, tiny_model, samples):
    classifier = Classifier(ModelSpec(tiny_model(WIDE)), 2, torch.bfloat16)
    config = TrainConfig(loss=loss, checkpointing=checkpointing)
    classifier.reset(config)
    tokens, _ = classifier.encode([s["text"] for s in samples], 100)
    y = torch.full((len(tokens), 2), 0.5, device="cuda")

    def step(max_tokens):
        train.backward_batch(classifier, tokens, y, 0.5, config, max_tokens)
        classifier.optimizer.step(1e-4)

    for max_tokens in (config.max_tokens_per_forward, 200):  # one forward, and several
        step(max_tokens)  # compiles the kernels
        with no_waits():
            step(max_tokens)


@on_gpu
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("loss", train.LOSSES)
def test_a_float32_run_on_the_gpu_is_one_on_the_cpu(loss, kernels, tiny_model, samples, monkeypatch):
    found = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(model, "device", lambda device=device: torch.device(device))
        chosen = kernels if device == "cuda" else "reference"
        classifier = Classifier(ModelSpec(tiny_model(WIDE)), 2, torch.float32, chosen)
        cost, probs = finetuned(classifier, samples, loss=loss, lr=1e-3, epochs=2)
        found.append((torch.tensor([r["loss"] for r in cost["log"]]), probs))
    assert found[1][1].std() > 0.01
    assert_close(found[0], found[1], atol=1e-3, rtol=0)


@on_gpu
def test_heads_on_the_gpu_are_heads_on_the_cpu():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(96, 64, generator=g), torch.rand(6, 96, 1, generator=g)
    labels = torch.cat([labels, 1 - labels], -1)
    configs = [TrainConfig(loss=loss, lr=1e-2, seed=seed) for seed in (0, 1) for loss in train.LOSSES]
    got = heads.finetune_heads(x.cuda(), list(labels.cuda()), configs, "triton")
    wanted = heads.finetune_heads(x, list(labels), configs, "reference")
    assert wanted.std() > 1e-3
    assert_close(got.cpu(), wanted, atol=1e-4, rtol=0)


# ---- kernels ----


@on_gpu
class TestKernels:
    """The comparisons of test_kernels.py, compiled and not interpreted."""

    pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
    test_head = staticmethod(test_kernels.test_head_and_its_gradients_are_those_of_float64)
    test_loss = staticmethod(test_kernels.test_loss_and_gradient_are_those_of_float64)
    test_quantile = staticmethod(test_kernels.test_quantile_is_torchs_in_a_thousand_cases)
    test_not_finite = staticmethod(test_kernels.test_logits_that_are_not_finite_give_a_loss_that_is_not_and_end)


@on_gpu
def test_head_and_loss_are_three_launches_without_a_wait_the_same_bits_and_can_be_captured():
    hidden, weight = test_kernels.randn(32, 5120).bfloat16(), test_kernels.randn(2, 5120, seed=1) / 70
    y, rows = test_kernels.randn(1, 32, 2, seed=2).softmax(-1), torch.arange(32, dtype=torch.int32, device="cuda")

    def step():
        loss, g = conf_loss.conf_loss(head.forward(hidden, rows, weight)[None], y, "logconf", 0.5)
        return loss, *head.backward(hidden, rows, weight, g[0])

    first = step()
    with no_waits():
        again = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert launched(profiled(step)) == 3
    for a, b, c in zip(first, again, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


# ---- debates ----


@pytest.fixture(scope="module")
def debater(tiny_model):
    return test_debate.make_debater(tiny_model(WIDE))


@on_gpu
def test_debates_are_the_same_in_any_batch_in_float32(debater, samples, tmp_path):
    whole, *others = (
        test_debate.transcripts(debater, samples, tmp_path / str(n), seeds=(0, 1), chunk=n) for n in (64, 1, 7, 32)
    )
    assert others == 3 * [whole]


@on_gpu
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 3e-2), ("float32", 1e-5)])
def test_logits_of_a_decode_step_are_those_of_the_whole_text(dtype, tolerance, tiny_model):
    """Over the 64th column, after which attention sees 64 more, with rows of several lengths."""
    spec = ModelSpec(tiny_model(WIDE))
    debater, exact = (Debater(spec, DebateConfig(dtype=d)) for d in (dtype, "float32"))
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 257, (n,), generator=g).tolist() for n in (50, 61, 3)]
    session = debater.prefill(texts, copies=2)
    for _ in range(20):
        token = torch.randint(1, 257, (3,), generator=g)
        logits = session.forward(token.repeat_interleave(2).cuda())
        texts = [t + [n] for t, n in zip(texts, token.tolist(), strict=True)]
    with torch.no_grad():
        want = torch.stack([exact.model(torch.tensor([t]).cuda()).logits[0, -1] for t in texts])
    assert want.std() > 0.1 and relative_error(logits, want.repeat_interleave(2, 0)) < tolerance


@on_gpu
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_a_turn_never_waits_for_the_gpu(temperature, top_p, debater, monkeypatch):
    monkeypatch.setattr(debater, "config", DebateConfig(40, temperature, top_p, dtype="float32"))
    keys = generate.splitmix64(torch.arange(8).cuda(), torch.arange(40).cuda()[:, None])

    def turn():
        session = debater.prefill([[1] * 20, [1] * 23], copies=4)
        logits = session.forward([[2, 3], [4]] * 4, room=40)
        with no_waits():
            return debater.decode(session, logits, keys)

    turn()  # allocates
    said, finite = turn()
    lengths = (said >= 0).sum(0).tolist()
    assert finite and max(lengths) > 1 and (temperature == 0 or min(lengths) < 40)


@on_gpu
def test_sampling_on_the_gpu_is_sampling_on_the_cpu():
    logits = 3 * torch.randn(200, 3000, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([stable_hash("key", i) for i in range(200)])
    for temperature, top_p in ((0.0, 1.0), (0.4, 1.0), (1.0, 0.8)):
        on_cpu = generate.sample(logits, keys, temperature, top_p)
        assert generate.sample(logits.cuda(), keys.cuda(), temperature, top_p).tolist() == on_cpu.tolist()
