"""Low-rank adapters (LoRA, Hu et al. 2106.09685): a frozen layer W learns as W + (alpha / r) B A.

Not taken from peft, whose wrapper would stand between the model and packed attention, blocks that are checkpointed and
compiled one by one, and an optimizer that is reset in place. The folders are peft's. Shapes: A [r, in], B [out, r].
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import stable_hash, write_text

PREFIX = "base_model.model."  # of every weight's name in a folder of peft's


class LoraLinear(nn.Module):
    """A linear layer as it is, and its adapter: float32 weights, which compute in the dtype of what comes in."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: int):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        out, inside = linear.weight.shape
        float32 = {"dtype": torch.float32, "device": linear.weight.device}
        self.lora_A, self.lora_B = (nn.Parameter(torch.zeros(n, **float32)) for n in ((rank, inside), (out, rank)))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype))
        return self.linear(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))


def attach(model: nn.Module, blocks: Iterable[nn.Module], rank: int, alpha: int) -> list[nn.Parameter]:
    """Freeze the model and give every linear layer that its blocks have an adapter: their weights, A and B in turn."""
    model.requires_grad_(False)
    adapters = []
    for block in blocks:
        for name in [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]:
            block.set_submodule(name, adapted := LoraLinear(block.get_submodule(name), rank, alpha))
            adapters += adapted.parameters(recurse=False)
    return adapters


def starts(adapters: list[Tensor], seed: int) -> list[Tensor]:
    """What a run begins with: A uniform as peft has it (Kaiming), by the seed alone, and B zero, so that W is as it was."""
    generator = torch.Generator().manual_seed(stable_hash("lora", seed))
    whole = [torch.zeros(p.shape) for p in adapters]
    for a in whole[::2]:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return whole


# ---- as a folder of peft's ----


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Adapters and head by the names that peft gives them."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {PREFIX + name.removesuffix(".weight") + ".weight": p.detach() for name, p in weights.items()}


def save(model: nn.Module, folder: Path, base: str, revision: str | None) -> None:
    """adapter_model.safetensors and adapter_config.json. `base`: what the adapters are for, as `--model` names it."""
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    one = next(iter(adapted.values()))
    rank = len(one.lora_A)
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": rank, "lora_alpha": round(one.scale * rank),
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}), "modules_to_save": ["score"],
        "base_model_name_or_path": base, "revision": revision, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.cpu().contiguous() for name, x in trained(model).items()}, folder / "adapter_model.safetensors")
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Adapters and head, as `save` wrote them, into a model with adapters of the same rank."""
    weights = load_file(folder / "adapter_model.safetensors")
    for name, p in trained(model).items():
        p.copy_(weights[name])
