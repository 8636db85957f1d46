"""The losses of train.py against a literal reading of their formulas in float64."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train
from kernels import conf_loss
from train import TrainConfig

# ---- the formulas, read literally, in Python's float64 ----


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def cross_entropy(z, y):
    log_sum = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
    return sum(-t * (v - log_sum) for t, v in zip(y, z, strict=True))


def literal_xent(Z, Y):
    return sum(cross_entropy(z, y) for z, y in zip(Z, Y, strict=True)) / len(Z)


def literal_product(Z, Y, alpha, beta):
    targets = []
    for z, y in zip(Z, Y, strict=True):
        t = [p**beta * v**alpha for p, v in zip(softmax(z), y, strict=True)]
        targets.append([v / sum(t) for v in t])
    return literal_xent(Z, targets)


def literal_quantile(values, q):
    values, rank = sorted(values), q * (len(values) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(values) - 1)
    return values[low] + (rank - low) * (values[high] - values[low])


def literal_logconf(Z, Y, step_frac, aux_coef, warmup_frac, ramp):
    ramped = step_frac if ramp == "openai" else step_frac / warmup_frac if warmup_frac else 1  # over no steps: no ramp
    c = aux_coef * (1 if step_frac > warmup_frac else ramped)
    p0 = [softmax(z)[0] for z in Z]
    threshold = literal_quantile(p0, sum(y[1] for y in Y) / len(Y))
    H = [(1, 0) if p >= threshold else (0, 1) for p in p0]
    T = [[(1 - c) * v + c * u for v, u in zip(y, h, strict=True)] for y, h in zip(Y, H, strict=True)]
    return literal_xent(Z, T)


LOGITS = {
    "ordinary": lambda r, B, K: r.normal(size=(B, K)) * 3,
    "all equal": lambda r, B, K: np.full((B, K), r.normal()),
    "ties": lambda r, B, K: r.integers(-2, 3, (B, K)) / 2,
    "saturated": lambda r, B, K: r.uniform(-60, 60, (B, K)),
    "extreme": lambda r, B, K: r.choice([-300.0, -1.0, 0.0, 300.0], (B, K)),
}
LABELS = {
    "soft": lambda r, B, K: r.dirichlet(np.ones(K), B),
    "hard": lambda r, B, K: np.eye(K)[r.integers(0, K, B)],
    "both": lambda r, B, K: np.where(r.random((B, 1)) < 0.5, LABELS["hard"](r, B, K), LABELS["soft"](r, B, K)),
    "one class": lambda r, B, K: np.eye(K)[np.full(B, r.integers(0, K))],
}


def random_batches(dtype, classes=(2, 3, 8), n=1000):
    """Logits, labels, and a generator for further choices, in every combination of the kinds above."""
    for seed in range(n):
        r = np.random.default_rng(seed)
        B, K = int(r.integers(1, 41)), int(r.choice(classes))
        z = list(LOGITS.values())[seed % 5](r, B, K)
        y = list(LABELS.values())[seed // 5 % 4](r, B, K)
        yield torch.tensor(z, dtype=dtype), torch.tensor(y, dtype=dtype), r


def loss_of(name, z, y, step_frac=1.0, **settings):
    """A loss of LOSSES, differentiable."""
    return conf_loss.cross_entropy(z, train.LOSSES[name](z.detach(), y, step_frac, TrainConfig(loss=name, **settings)))


def assert_equal_loss(got, want):
    """To 1e-6; in float32, whose steps are wider than that above 8, to 1e-6 of the value."""
    assert got.ndim == 0
    scale = max(1, abs(want)) if got.dtype == torch.float32 else 1
    assert abs(got.item() - want) < 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_xent_and_product_are_the_formulas(dtype):
    for z, y, r in random_batches(dtype):
        assert_equal_loss(loss_of("xent", z, y), literal_xent(z.tolist(), y.tolist()))
        alpha, beta = (1, 1) if z.abs().max() > 60 else [(1, 1), (0.5, 2), (2, 0.5)][r.integers(3)]
        got = loss_of("product", z, y, alpha=alpha, beta=beta)
        assert_equal_loss(got, literal_product(z.tolist(), y.tolist(), alpha, beta))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logconf_is_the_formula(dtype):
    for z, y, r in random_batches(dtype, classes=(2,)):
        step_frac = [0.0, 0.03, 0.1, 0.100001, 0.7][r.integers(5)]
        aux_coef, warmup_frac = [(0.5, 0.1), (0.8, 0.25), (0.5, 0.0)][r.integers(3)]
        for ramp in ("openai", "linear"):
            got = loss_of("logconf", z, y, step_frac, aux_coef=aux_coef, warmup_frac=warmup_frac, aux_warmup=ramp)
            want = literal_logconf(z.tolist(), y.tolist(), step_frac, aux_coef, warmup_frac, ramp)
            assert_equal_loss(got, want)


def test_product_target_where_label_and_prediction_exclude_each_other():
    z, y = torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0]])
    assert loss_of("product", z, y).item() == 2e4  # 0/0 read literally; the label decides
    assert loss_of("product", z, torch.tensor([[1.0, 0.0]])).item() == 0


def test_the_targets_of_product_and_logconf_carry_no_gradient():
    z, y = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.full((6, 2), 0.5, dtype=torch.float64)
    p = z.detach().softmax(-1)
    h = torch.eye(2, dtype=torch.float64)[(~conf_loss.hardened_to_0(z, y)).long()]
    for name, target in (("product", p), ("logconf", (y + h) / 2)):  # y is even: the product's target is p itself
        (gradient,) = torch.autograd.grad(loss_of(name, z, y), z)
        assert_close(gradient, (p - target) / 6)
