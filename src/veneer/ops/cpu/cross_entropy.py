"""Softmax cross-entropy by csrc/cross_entropy, in float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import cross_entropy as reference


def softmax_cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None, write_grad: bool) -> Tensor:
    if not is_served(logits) or logits.stride(1) != 1 or not logits.numel():
        return reference.softmax_cross_entropy(logits, labels, softcap, write_grad)
    labels = labels.to(torch.int64).contiguous()
    losses = torch.empty(labels.shape, dtype=torch.float32)
    kernels().softmax_cross_entropy(
        address(logits),
        logits.stride(0),
        *logits.shape,
        DTYPES[logits.dtype],
        address(labels),
        softcap or 0.0,
        write_grad,
        address(losses),
    )
    return losses
