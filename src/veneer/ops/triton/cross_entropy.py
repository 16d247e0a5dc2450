"""Softmax cross-entropy in Triton: one program a row, two passes over its classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.reference import cross_entropy as reference
from veneer.ops.triton.activations import tanh
from veneer.ops.triton.launch import block, is_served, launch, warps

_WIDEST = 4096


def softmax_cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None, write_grad: bool) -> Tensor:
    if not is_served(logits):
        return reference.softmax_cross_entropy(logits, labels, softcap, write_grad)
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    n, classes = logits.shape
    size = block(classes, most=_WIDEST)
    args = logits, *logits.stride(), labels.contiguous(), losses, classes, softcap or 1.0
    forms = {"SOFTCAP": softcap is not None, "WRITE_GRAD": write_grad, "BLOCK": size}
    launch(_kernel, (n,), *args, **forms, num_warps=warps(size))
    return losses


@triton.jit
def _kernel(
    logits,
    row_stride,
    class_stride,
    labels,
    losses,
    n_classes,
    softcap,
    SOFTCAP: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * row_stride
    # Lane by lane first, so that one reduction over lanes serves the whole row.
    lane_most = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    lane_label = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_classes, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(start + columns * class_stride, mask=columns < n_classes, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            x = tl.where(columns < n_classes, softcap * tanh(x / softcap), float("-inf"))
        most = tl.maximum(lane_most, x)
        # A lane that has seen nothing yet has a sum of 0, whatever it is shifted by.
        shift = tl.where(most == float("-inf"), 0.0, most)
        lane_sum = lane_sum * tl.exp(lane_most - shift) + tl.exp(x - shift)
        lane_most = most
        lane_label += tl.where(columns == label, x, 0.0)
    top = tl.max(lane_most, axis=0)
    log_z = tl.log(tl.sum(lane_sum * tl.exp(lane_most - top), axis=0))
    tl.store(losses + row, log_z - (tl.sum(lane_label, axis=0) - top))
    if WRITE_GRAD:
        for first in range(0, n_classes, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            place = start + columns * class_stride
            x = tl.load(place, mask=columns < n_classes, other=float("-inf")).to(tl.float32)
            slope = 1.0
            if SOFTCAP:
                bent = tanh(x / softcap)
                x = softcap * bent
                slope = 1.0 - bent * bent
            gradient = (tl.exp(x - top - log_z) - tl.where(columns == label, 1.0, 0.0)) * slope
            tl.store(place, gradient.to(logits.dtype.element_ty), mask=columns < n_classes)
