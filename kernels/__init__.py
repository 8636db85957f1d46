"""Triton kernels of the finetuning step, each beside its PyTorch reference in the same signature.

    head.py        hidden states -> class logits: gather of the last tokens, head
    conf_loss.py   class logits -> loss and gradient: xent, product, logconf, for E heads at once

Nothing here imports torch's CUDA parts or asks for a driver until a kernel is called.
"""

from common import InputError

CHOICES = ("auto", "triton", "reference")


def resolve(choice: str) -> str:
    """triton or reference; auto is triton on a GPU and the reference elsewhere. Raises InputError on what cannot run."""
    import torch
    import triton

    if choice not in CHOICES:
        raise InputError(f"kernels {choice!r}: choose from {', '.join(CHOICES)}")
    if choice == "auto":
        return "triton" if torch.cuda.is_available() else "reference"
    if choice == "triton" and not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        raise InputError("kernels 'triton': no CUDA GPU here and TRITON_INTERPRET is not 1; choose auto or reference")
    return choice
