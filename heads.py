"""Heads alone, many at once, on features of a frozen model: hundreds of runs for the cost of one.

Head e becomes what a finetuning with `configs[e]` would make of it if all other weights stood still. Shapes: E heads,
N samples, B batch, D width, K classes.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from kernels import resolve
from model import Classifier, to_device
from train import TrainConfig, batches, check_finite, forward_all, loss_and_gradient, lr_at


def finetune_and_predict(
    classifier: Classifier, texts: dict[str, list[str]], part: str, labels: list[Tensor], configs: list[TrainConfig]
) -> list[dict[str, Tensor]]:
    """By each of E heads the class probabilities [N, K] of every part's texts. Head e learns `part` with labels[e] [N, K]."""
    dev = classifier.model.device
    x = {name: forward_all(classifier, t, configs[0], classifier.features).to(dev) for name, t in texts.items()}
    weights = finetune_heads(x[part], [y.to(dev) for y in labels], configs, classifier.kernels)
    return [{name: check_finite((x[name] @ w.T).softmax(-1).cpu()) for name in x} for w in weights]


def finetune_heads(x: Tensor, labels: list[Tensor], configs: list[TrainConfig], kernels: str = "auto") -> Tensor:
    """Weights [E, K, D] of E heads on frozen features x [N, D] with E soft labels [N, K].

    All configurations must agree in number of steps and batch size.
    """
    labels, n_classes, kernels = torch.stack(labels), labels[0].shape[-1], resolve(kernels)
    by_seed = {c.seed: c for c in configs}  # heads of one seed read the same batches
    seed_of = [list(by_seed).index(c.seed) for c in configs]
    n_slots = max(map(seed_of.count, seed_of))
    slots = [n_slots * s + seed_of[e + 1 :].count(s) for e, s in enumerate(seed_of)]  # of a head in `weight`
    weight = torch.zeros(len(by_seed) * n_slots, n_classes, x.shape[-1], device=x.device, requires_grad=True)
    adam = torch.optim.Adam([weight], fused=True)
    alike = [[e for e, c in enumerate(configs) if c.loss == loss] for loss in {c.loss for c in configs}]
    orders = list(zip(*(batches(len(x), c) for c in by_seed.values()), strict=True))
    for step, order in enumerate(tqdm(orders, desc=f"{len(configs)} heads", leave=False, disable=None)):
        index = to_device(torch.tensor(order), x.device)  # [seeds, B]
        z = x[index] @ weight.view(len(by_seed), -1, x.shape[-1]).mT  # [seeds, B, slots * K]
        z = z.unflatten(-1, (n_slots, -1)).transpose(1, 2).flatten(0, 1)[slots]  # [E, B, K]
        y = labels.take_along_dim(index[seed_of][..., None], 1)
        gradient = torch.empty_like(z)
        for e in alike:
            gradient[e] = loss_and_gradient(z[e].detach(), y[e], step / len(orders), configs[e[0]], kernels)[1]
        weight.grad = None
        z.backward(gradient)  # not autograd.grad: fused Adam assumes the parameter's strides
        adam.param_groups[0]["lr"] = lr_at(step, len(orders), configs[0].lr)
        adam.step()
    return weight.detach()[slots]
