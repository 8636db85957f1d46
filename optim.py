"""The optimizer of the finetuning runs: Adam in float32, whatever the dtype of the weights, and sharded as they are."""

import torch
from torch import Tensor


class MasterAdam:
    """Adam on float32 master weights. A float32 parameter is its own master; a bfloat16 one is its master's rounded copy,
    its gradients summed in float32. Rounded ones are handled as lists: few launches, however many they are."""

    def __init__(self, params: list[Tensor]):
        self.params, self.masters = params, [local_shard(p).float() for p in params]
        self.rounded = [p for p in params if p.dtype != torch.float32]
        self.of_rounded = [m for p, m in zip(params, self.masters, strict=True) if p.dtype != torch.float32]
        self.sums = [torch.empty_like(m) for m in self.of_rounded]
        self.adam = torch.optim.Adam(self.masters, fused=True)

    @torch.no_grad()
    def reset(self, starts: list[Tensor]) -> None:
        """Begin a run: masters from `starts` (whole, on any device), no moments, no gradients."""
        for p, m, start in zip(self.params, self.masters, starts, strict=True):
            m.copy_(shard_of(start, p))
        self.round()
        for moments in self.adam.state.values():  # zeroed, not freed: a CPU takes seconds to get as much memory again
            torch._foreach_zero_(list(moments.values()))
        self.drop_gradients()

    @torch.no_grad()
    def accumulate_grads(self, first: bool) -> None:
        """After a backward: gradients of rounded parameters into their sums, anew (first) or on top. Autograd sums the others."""
        if self.rounded:
            (torch._foreach_copy_ if first else torch._foreach_add_)(self.sums, [p.grad for p in self.rounded])
        for p in self.rounded:
            p.grad = None

    def step(self, lr: float) -> None:
        sums = iter(self.sums)
        for p, m in zip(self.params, self.masters, strict=True):
            m.grad = local_shard(p.grad) if p.dtype == torch.float32 else next(sums)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.round()
        self.drop_gradients()

    @torch.no_grad()
    def round(self) -> None:
        if self.rounded:
            torch._foreach_copy_(self.rounded, self.of_rounded)

    def drop_gradients(self) -> None:
        """Nothing is zeroed: the next backward hands over tensors of its own."""
        for x in (*self.params, *self.masters):
            x.grad = None


def local_shard(x: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or the tensor; it shares the memory and carries no gradient."""
    x = x.detach()
    return x.to_local() if hasattr(x, "to_local") else x


def shard_of(whole: Tensor, p: Tensor) -> Tensor:
    """This rank's shard of `p` in `whole`: FSDP2 cuts the first dimension into equal parts, the last ones shorter or empty."""
    if not hasattr(p, "device_mesh"):
        return whole
    rows = -(-len(whole) // p.device_mesh.size())
    return whole[rows * p.device_mesh.get_local_rank() :][:rows]
