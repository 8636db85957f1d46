"""Triton kernels of the finetuning step, each beside its PyTorch reference: head.py, from hidden states to class logits, and
conf_loss.py, from those to the loss and its gradient."""

import torch
import triton

from common import InputError

CHOICES = ("auto", "triton", "reference")


def resolve(choice: str) -> str:
    """triton or reference; auto is triton on a GPU and the reference elsewhere. Raises InputError on what cannot run."""
    if choice not in CHOICES:
        raise InputError(f"kernels {choice!r}: choose from {', '.join(CHOICES)}")
    if choice == "auto":
        return "triton" if torch.cuda.is_available() else "reference"
    if choice == "triton" and not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        raise InputError("kernels 'triton': no CUDA GPU here and TRITON_INTERPRET is not 1; choose auto or reference")
    return choice
