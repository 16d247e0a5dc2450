"""Linear layers that hold only a packed weight. Serving puts them in place of the layers of a model that it owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.model.quantized.frozen_weight import frozen_weight
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.quantized.stack import PackedExpertStack
from veneer.ops.dispatch import backends
from veneer.ops.matmul import add_matmul
from veneer.ops.packed import BLOCK, BLOCKS, ROWS, PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.quant.blocks import BlockWeight
from veneer.quant.dense import DenseWeight
from veneer.quant.ggml import GgmlWeight
from veneer.quant.packed import PackedCoded, PackedDense
from veneer.quant.packing import packed_codes, unpacked_codes
from veneer.quant.product import CodedWeight
from veneer.records.frozen import FrozenWeight

Packed = PackedWeight | PackedCodes

PANEL = BLOCK * BLOCKS
"""Outputs of a whole panel: weights joined at its multiples are parts of one packed weight."""


class _Packed(nn.Module):
    """Linear layer ``y = W x + bias`` that holds only a packed weight and replaces the original layer."""

    bias: nn.Parameter | None
    packed_weight: PackedDense | PackedCoded

    def frozen_format(self) -> FrozenWeight:
        """Return the layer's packed weight."""
        return self.packed_weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed_weight.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def original(self) -> nn.Module:
        """Return the layer that this one replaced, with its weight unpacked if that had been freed."""
        raise NotImplementedError


class PackedLinear(_Packed):
    """Linear layer ``y = W x + bias`` with W packed. It replaces a layer whose weight is freed.

    ``source`` is that layer's class, ``like`` its weight without values. Adapting puts the mixin `AdaptedSite` in front
    of this class. So this class must not define methods with the mixin's names, such as `packed`, because the mixin's
    methods would hide them.
    """

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
        """Return True if the replaced layer stores Wᵀ (GPT-2's)."""
        return issubclass(self.source, Conv1D)

    @property
    def weight(self) -> Tensor:
        """The weight in the layout of the replaced layer, as an unpacked copy."""
        dense = self.packed_weight.dense()
        return dense.T if self.is_transposed else dense

    def original(self) -> nn.Module:
        [module] = self._stands_for
        learns = cast(Tensor, module._parameters["weight"]).requires_grad
        module._parameters["weight"] = nn.Parameter(self.weight.contiguous(), requires_grad=learns)
        return module


class PackedQuantLinear(_Packed):
    """Linear layer ``y = W x + bias`` with the codes of W packed. It replaces a quantized layer whose codes are freed.

    Blocks of ggml's formats are not freed, because they hold the scales too, and are usually pages of a mapped file.
    """

    packed_weight: PackedCoded

    def __init__(self, module: QuantLinear, packed: PackedCodes) -> None:
        super().__init__()
        self.bias = module.bias
        self._stands_for = (module,)
        if not isinstance(module.bound(), GgmlWeight):
            module.weight = torch.empty_like(module.weight, device="meta")
        self.is_transposed, self.packed_weight = module.is_transposed, PackedCoded(packed)
        self.out_features, self.in_features = packed.shape

    def original(self) -> QuantLinear:
        [module] = self._stands_for
        codes = unpacked_codes(cast(CodedWeight, module.bound()), self.packed_weight.packed)
        if codes is not None:
            module.weight = codes.view(module.weight.dtype).view(module.weight.shape)
        return module


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """Frozen weight in its own layout with the methods of a packed one, for rows of a dtype on a device other than a
    CPU.
    """

    weight: FrozenWeight
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i)."""
        return self.weight.shape

    def matmul(self, x: Tensor, *, onto: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Return ``onto + W x``, written into ``out`` if given. If ``out`` is ``onto`` and W is dense, one launch does
        both.
        """
        if out is not None and out is onto and isinstance(self.weight, DenseWeight):
            return add_matmul(out, x, self.weight.dense(x.dtype).T)
        y = self.weight.matmul(x)
        y = y if onto is None else y + onto
        return y if out is None else out.copy_(y)


class PackedGroup:
    """Layers that read the same x: each layer's packed weight and, if they fill whole panels, all of them joined
    (``whole``).
    """

    whole: Packed | None

    def __init__(self, parts: Sequence[Packed]) -> None:
        self.heights = [part.shape[0] for part in parts]
        joins = len(parts) > 1 and all(height % PANEL == 0 for height in self.heights)
        self.whole = joined(parts) if joins and len({kind_of(part) for part in parts}) == 1 else None
        self.parts = list(parts) if self.whole is None else parts_of(self.whole, self.heights)

    @classmethod
    def plain(cls, parts: Sequence[PlainProduct], whole: PlainProduct | None) -> PackedGroup:
        """Build a group from weights that are not packed, for a device other than a CPU.

        ``whole`` is the product with all weights at once, if they lie in one tensor; otherwise None.
        """
        group = cls(())
        group.heights = [part.shape[0] for part in parts]
        # the step in C++, which reads panels, is of the CPU alone
        group.parts, group.whole = list(cast("Sequence[Packed]", parts)), cast("Packed | None", whole)
        return group


def kind_of(packed: Packed) -> tuple[torch.dtype, int, int]:
    """Return the dtype, the coding and the unit of scales of a packed weight. `joined` can join packed weights only if
    these are equal.
    """
    coding, unit = (packed.coding_number, packed.unit) if isinstance(packed, PackedCodes) else (0, 0)
    return packed.dtype, coding, unit


def joined(parts: Sequence[Packed]) -> Packed:
    """Join packed weights of one kind, of which all but the last fill whole panels, as a copy."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    return replace(parts[0], panels=torch.cat([part.panels for part in parts]), shape=shape)


def parts_of(whole: Packed, heights: Sequence[int]) -> list[Packed]:
    """Return the parts of a packed weight with these numbers of rows, which share its memory."""
    if len(heights) == 1:
        return [whole]
    row = whole.panels.numel() // whole.shape[0]
    panels = torch.split(whole.panels, [height * row for height in heights])
    return [replace(whole, panels=part, shape=(o, whole.shape[1])) for part, o in zip(panels, heights, strict=True)]


def pack_group(model: PreTrainedModel, paths: Sequence[str], *, give_up: bool) -> PackedGroup | None:
    """Pack the weights of layers that read the same input. Return None if some weight cannot be packed, or if the
    packed weights differ in dtype.

    On another device than a CPU they keep their layout, and the result is None if the device has no kernel for low-rank
    pairs. If ``give_up``, the layers become `PackedLinear` or `PackedQuantLinear`, and their own storage is freed,
    except for a weight that is also an embedding table, and for a router. On another device dense weights become views
    of one.
    """
    modules = [model.get_submodule(path) for path in paths]
    if model.device.type != "cpu":
        if model.dtype not in ROWS or "triton" not in backends("pairs.add"):
            return None
        whole = _in_one_memory(modules) if give_up else None
        plain = [PlainProduct(frozen_weight(module), model.dtype) for module in modules]
        return PackedGroup.plain(plain, None if whole is None else PlainProduct(DenseWeight(whole), model.dtype))
    parts = [_packed(frozen_weight(module), model.dtype) for module in modules]
    found = [part for part in parts if part is not None]
    if len(found) < len(modules) or len({part.dtype for part in found}) > 1:
        return None
    group = PackedGroup(found)
    table = model.get_input_embeddings()._parameters.get("weight")
    for path, module, part in zip(paths, modules, group.parts, strict=True) if give_up else ():
        if isinstance(module, QuantLinear):
            if isinstance(part, PackedCodes):
                model.set_submodule(path, PackedQuantLinear(module, part))
        elif not isinstance(module, nn.Linear | Conv1D):
            continue  # a router, whose own code reads its weight
        elif isinstance(part, PackedWeight) and module._parameters["weight"] is not table:
            model.set_submodule(path, PackedLinear(module, part))
    return group


def _in_one_memory(modules: Sequence[nn.Module]) -> Tensor | None:
    """Copy the weights (o, i) of several linear layers into one tensor, make each layer's weight a view of its rows,
    and return the tensor. One product can then compute all layers.

    Return None, and change nothing, for a single layer, for a layer of another class than `nn.Linear`, or for different
    dtypes.
    """
    weights = [cast(nn.Parameter, module._parameters["weight"]) for module in modules if type(module) is nn.Linear]
    if len(weights) < max(2, len(modules)) or len({weight.dtype for weight in weights}) > 1:
        return None
    whole = torch.cat([weight.detach() for weight in weights])
    parts = torch.split(whole, [len(weight) for weight in weights])
    for module, own, part in zip(modules, weights, parts, strict=True):
        module._parameters["weight"] = nn.Parameter(part, requires_grad=own.requires_grad)
    return whole


def _packed(weight: FrozenWeight, dtype: torch.dtype) -> Packed | None:
    """Pack a weight for rows of ``dtype``, or return None if it cannot be packed.

    Codes whose width is not a multiple of 16 cannot be packed; their decoded values are packed instead. A narrow
    `BlockWeight` then stays as it is, since it is decoded in tiles.
    """
    if isinstance(weight, DenseWeight):
        dense = weight.dense()
        return PackedWeight.pack(dense) if dense.dtype in ROWS else None
    if not isinstance(weight, CodedWeight) or dtype not in ROWS or weight.compute_dtype not in (None, dtype):
        return None
    packed = packed_codes(weight, dtype)
    stays = isinstance(weight, BlockWeight) and weight.is_narrow
    return PackedWeight.pack(weight.dense(dtype)) if packed is None and not stays else packed


def unpack(model: PreTrainedModel) -> None:
    """Restore the weights of a model's layers and experts that were replaced by packed ones, bit for bit."""
    for path, module in list(model.named_modules()):
        if isinstance(module, _Packed):
            model.set_submodule(path, module.original())
        elif isinstance(module, PackedExpertStack):
            experts, _, name = path.rpartition(".")
            module.put_back(model.get_submodule(experts), name)


def is_packed(module: nn.Module) -> bool:
    """Return True if a layer, or a stack of experts, has only packed weights."""
    return isinstance(module, _Packed | PackedExpertStack)
