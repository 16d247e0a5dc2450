"""One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) with moments kept in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from veneer.errors import NonFiniteError, ShapeError
from veneer.ops.dispatch import implementation

BLOCK_SIZE = 256


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """Settings of one step. ``step`` counts from 1; ``eps`` is added to the root of the bias-corrected second moment,
    not under it.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int


@dataclass(frozen=True, slots=True)
class Moment8bit:
    """Moment in blocks of 256 entries: an 8-bit code for each entry, and the largest magnitude of each block."""

    codes: UInt8[Tensor, "..."]
    absmax: Float[Tensor, " blocks"]


def adamw_8bit_(
    param: Float[Tensor, "..."],
    grad: Float[Tensor, "..."],
    moments: tuple[Moment8bit, Moment8bit],
    hyper: AdamWStep,
    *,
    backend: str | None = None,
) -> Int32[Tensor, "1"] | None:
    """Update a parameter and its two moments in place (Dettmers et al. 2022, arXiv:2110.02861, section 2).

    Moments are dequantized to float32, updated, used unrounded, and quantized to 8 bits again. The first moment is
    quantized with the signed dynamic map, the second with the unsigned one. Decay comes before the update.

    Raises ShapeError if tensors do not fit each other, and NonFiniteError if a moment becomes NaN or infinite. On a GPU
    a flag for `require_finite` is returned instead of this error, because to raise it the host would have to wait.
    """
    n_blocks = -(param.numel() // -BLOCK_SIZE)
    for moment in moments:
        if moment.codes.numel() != param.numel() or moment.absmax.numel() != n_blocks:
            raise ShapeError(
                f"a parameter of {param.numel()} entries needs moments of as many codes and {n_blocks} block maxima, "
                f"not {moment.codes.numel()} and {moment.absmax.numel()}. Give the moments that were made for this "
                "parameter"
            )
    if grad.shape != param.shape:
        raise ShapeError(
            f"the gradient {tuple(grad.shape)} does not fit the parameter {tuple(param.shape)}: give one of its shape"
        )
    flag: Tensor | None = implementation("adamw.adamw_8bit_", param.device, backend)(param, grad, moments, hyper)
    return flag


def require_finite(flags: Sequence[tuple[Int32[Tensor, "1"], Tensor]]) -> None:
    """Raise NonFiniteError for the first parameter whose flag is set.

    ``flags``: each flag that `adamw_8bit_` returned, with its parameter. The host waits once for all flags of a device.
    """
    for device in dict.fromkeys(flag.device for flag, _ in flags):
        here = [(flag, param) for flag, param in flags if flag.device == device]
        broken = torch.cat([flag for flag, _ in here]).tolist()
        if any(broken):
            raise not_finite(here[broken.index(1)][1])


def not_finite(param: Tensor) -> NonFiniteError:
    """Return the error of a parameter whose moment became NaN or infinite."""
    return NonFiniteError(
        f"a moment of a parameter of shape {tuple(param.shape)} became NaN or infinite. Lower the learning rate, "
        "or leave out the batch of this step"
    )
