"""Softmax cross-entropy with its gradient in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None, write_grad: bool) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not logits.numel():
        return wide.new_zeros(len(labels))
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    shifted = capped - capped.amax(-1, keepdim=True)
    log_z = torch.log(torch.exp(shifted).sum(-1))
    losses = log_z - shifted.gather(-1, labels[:, None])[:, 0]
    if write_grad:
        grad = torch.exp(shifted - log_z[:, None])
        grad.scatter_add_(-1, labels[:, None], -torch.ones_like(log_z)[:, None])
        logits.copy_(grad if softcap is None else grad * (1 - (capped / softcap) ** 2))
    return losses
