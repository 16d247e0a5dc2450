"""Linear layers whose weight is kept packed alone: what serving makes of a model that is its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.core.frozen import FrozenWeight
from veneer.model.linear import frozen_weight
from veneer.ops.packed import BLOCK, BLOCKS, ROWS, PackedWeight
from veneer.quant.dense import DenseWeight
from veneer.quant.packed import PackedDense

PANEL = BLOCK * BLOCKS
"""Outputs of a whole panel: weights joined at its multiples are parts of one packed weight."""


class PackedLinear(nn.Module):
    """``y = W x + bias`` with W packed, in the place of a layer that is left without values in its weight.

    ``source`` is that layer's class, ``like`` its weight without values. Adapters come to it in place, so that no name
    here may be one of `AdaptedSite`, whose `packed` and `unpacked` it would hide.
    """

    bias: nn.Parameter | None

    def __init__(self, module: nn.Module, packed: PackedWeight) -> None:
        super().__init__()
        own = cast(nn.Parameter, module._parameters["weight"])
        self.like = torch.empty_like(own, device="meta")
        self.bias = module._parameters.get("bias")
        self._stands_for = (module,)  # in a tuple, for it is no part of the model meanwhile
        module._parameters["weight"] = nn.Parameter(self.like, requires_grad=own.requires_grad)
        self.source, self.packed_weight = type(module), PackedDense(packed)
        self.out_features, self.in_features = packed.shape

    @property
    def is_transposed(self) -> bool:
        """True where the layer that this one stands for stores Wᵀ (GPT-2's)."""
        return issubclass(self.source, Conv1D)

    @property
    def weight(self) -> Tensor:
        """The weight in the layout of the layer that this one stands for: unpacked, a copy."""
        dense = self.packed_weight.dense()
        return dense.T if self.is_transposed else dense

    def original(self) -> nn.Module:
        """The layer that this one stands for, with its values."""
        [module] = self._stands_for
        learns = cast(Tensor, module._parameters["weight"]).requires_grad
        module._parameters["weight"] = nn.Parameter(self.weight.contiguous(), requires_grad=learns)
        return module

    def frozen_format(self) -> FrozenWeight:
        """The layer's weight."""
        return self.packed_weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed_weight.matmul(x)
        return y if self.bias is None else y + self.bias


class PackedGroup:
    """Layers that read the same x: their weights one below the other where they fill whole panels, and each apart."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        heights = [len(weight) for weight in weights]
        joins = len(weights) > 1 and all(height % PANEL == 0 for height in heights)
        self.whole = PackedWeight.pack(torch.cat(list(weights))) if joins else None
        self.parts = _parts(self.whole, heights) if self.whole else [PackedWeight.pack(weight) for weight in weights]
        self.heights = heights


def _parts(whole: PackedWeight, heights: Sequence[int]) -> list[PackedWeight]:
    panels = torch.split(whole.panels, [height * whole.depth for height in heights])
    return [PackedWeight(part, (o, whole.shape[1])) for part, o in zip(panels, heights, strict=True)]


def pack_group(model: PreTrainedModel, paths: Sequence[str], *, give_up: bool) -> PackedGroup | None:
    """The weights of some layers, packed; None where they are quantized, or not all of one dtype that can be packed.

    ``give_up``: the layers become `PackedLinear`, and their own storage is free, but for a weight that is also a table
    of embeddings.
    """
    modules = [model.get_submodule(path) for path in paths]
    weights = [frozen_weight(module) for module in modules]
    dense = [weight.dense() for weight in weights if isinstance(weight, DenseWeight)]
    dtypes = {weight.dtype for weight in dense}
    if len(dense) < len(modules) or len(dtypes) > 1 or not dtypes <= set(ROWS) or dense[0].device.type != "cpu":
        return None
    group = PackedGroup(dense)
    table = model.get_input_embeddings()._parameters.get("weight")
    for path, module, part in zip(paths, modules, group.parts, strict=True):
        if give_up and module._parameters["weight"] is not table:
            model.set_submodule(path, PackedLinear(module, part))
    return group


def unpack(model: PreTrainedModel) -> None:
    """Give the layers of a model that gave their weights up their own again, to the bit."""
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(path, module.original())


def is_packed(module: nn.Module) -> bool:
    """Return True if a layer has no weight of its own but a packed one."""
    return isinstance(module, PackedLinear)
