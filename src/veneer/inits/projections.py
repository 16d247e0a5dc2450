"""Random A and B that all layers share, for VeRA and PVeRA."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from veneer.ops.traced import is_tracing


def projections(
    key: int, a_shape: tuple[int, int], b_shape: tuple[int, int], *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return A and B of these shapes: Kaiming uniform with gain √2, drawn on the CPU in float32 from ``key``.

    All layers share one copy, which must not be written to. Copies of the last eight configs and devices are kept.
    """
    draw = _kept.__wrapped__ if is_tracing() else _kept  # a traced step makes tensors without values
    return draw(key, a_shape, b_shape, device=device, dtype=dtype)


@functools.lru_cache(maxsize=8)
def _kept(
    key: int, a_shape: tuple[int, int], b_shape: tuple[int, int], *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(key)
    drawn = []
    with torch.inference_mode(False):  # they outlive the pass that asks first, and training must be able to keep them
        for shape in (a_shape, b_shape):
            bound = math.sqrt(6 / shape[1])
            empty = torch.empty(shape, dtype=torch.float32, device="cpu")
            drawn.append(empty.uniform_(-bound, bound, generator=generator).to(device, dtype))
    return drawn[0], drawn[1]
