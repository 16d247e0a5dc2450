"""Quantized weights of a layer's experts, as a module that replaces the parameter with all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.cut_weight import is_part
from veneer.model.quantized.module import CodedModule
from veneer.ops.experts import PackedStack
from veneer.quant.packed import PackedExperts
from veneer.quant.spec import StorageSpec
from veneer.quant.stack import DenseStack, StackSpec
from veneer.records.frozen import FrozenStack

ORDER = "parameter_order"
"""Attribute of experts in codes: the names of their parameters in the order of the class, which files rely on."""


class CodedStack(CodedModule):
    """Weights W (experts, o, i) in the storage format of ``spec``. It is a child of the module of experts, under the
    name of the parameter that it replaces.

    ``merged`` are dense weights with adapters merged in, which the quantized codes cannot hold.
    """

    def __init__(self, spec: StackSpec) -> None:
        super().__init__(cast(StorageSpec, spec))
        self.merged: Tensor | None = None

    @property
    def stack_spec(self) -> StackSpec:
        """The specification of the weights."""
        return cast(StackSpec, self.spec)

    def stack(self) -> FrozenStack:
        """Return the weights in use: the merged ones if there are any."""
        return self.coded() if self.merged is None else DenseStack(self.merged)

    def coded(self) -> FrozenStack:
        """Return the quantized weights."""
        return self.stack_spec.bind(self.parts())

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights from the storage format's tensors. Their names start below the path of the experts.

        Raises FormatError, which lists everything that does not fit.
        """
        spec, parts = self.stack_spec.from_disk(tensors)
        self.fill(cast(StorageSpec, spec), parts)
        self.carried = {key: tensor for key, tensor in tensors.items() if not spec.owns(key)}

    def freeze_parts(self) -> None:
        """Register the tensors as frozen, flattened parameters, so that processes get equal shares for any number of
        experts.
        """
        super().freeze_parts()
        for part in self._parameters.values():
            cast(Tensor, part).data = cast(Tensor, part).flatten()

    def _shaped(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        layout = self.spec.part_layout()
        return {name: part if is_part(part) else part.view(layout[name][1]) for name, part in parts.items()}

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.stack_spec.shape))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the format's tensors under keys below the experts' path."""
        own = prefix.removesuffix(".")
        front = own[: own.rfind(".") + 1]
        if not self.is_filled:
            destination[own] = self.weight
            return
        if is_part(self.weight):  # as FSDP2 has it: each process its own part
            destination |= {prefix + name: part for name, part in self.parts().items()}
            return
        disk = self.stack_spec.to_disk(self.parts()) | self.carried
        destination |= {front + key: tensor for key, tensor in disk.items()}

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load nothing here: the stack's keys lie under the path of the module of experts, so that module loads them
        and calls `take`.
        """


class PackedExpertStack(nn.Module):
    """Packed weights W (experts, o, i). It is a child of the module of experts, under the name of the parameter that it
    replaces.

    Serving puts it into models that no one else uses.
    """

    def __init__(self, packed: PackedStack) -> None:
        super().__init__()
        self.packed_stack = packed

    def stack(self) -> FrozenStack:
        """Return the weights."""
        return PackedExperts(self.packed_stack)

    def put_back(self, experts: nn.Module, name: str) -> None:
        """Replace this child module of the experts by the weights that were packed, unpacked again with the same
        values.
        """
        raise NotImplementedError


class PackedParameterStack(PackedExpertStack):
    """Packed weights that replace a dense parameter. ``like`` is the parameter without values."""

    def __init__(self, parameter: nn.Parameter, packed: PackedStack) -> None:
        super().__init__(packed)
        self.like, self._learns = torch.empty_like(parameter, device="meta"), parameter.requires_grad

    def put_back(self, experts: nn.Module, name: str) -> None:
        weights = as_maps(experts, self.stack().dense()).contiguous()
        give_parameter(experts, name, nn.Parameter(weights, requires_grad=self._learns))


def holds_stacks(module: nn.Module) -> bool:
    """Return True if a module has stacks of experts that are modules instead of parameters."""
    return any(isinstance(child, CodedStack | PackedExpertStack) for child in module._modules.values())


def give_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the child module that holds a parameter's values by the parameter."""
    del module._modules[name]
    module._parameters[name] = parameter


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters in its order, including those that are quantized stacks."""
    return tuple(vars(module).get(ORDER, module._parameters))


def coded_stacks(module: nn.Module) -> dict[str, CodedStack]:
    """Return a module's quantized stacks, by the names of the parameters that they replace."""
    return {name: child for name, child in module._modules.items() if isinstance(child, CodedStack)}


def stack_of(module: nn.Module, name: str) -> FrozenStack:
    """Return the weights (experts, o, i) of one of the module's stacks, dense or quantized."""
    child = module._modules.get(name)
    if isinstance(child, CodedStack | PackedExpertStack):
        return child.stack()
    return DenseStack(as_maps(module, cast(Tensor, module._parameters[name])))


def as_maps(module: nn.Module, value: Tensor) -> Tensor:
    """Return a parameter of experts as (experts, o, i) if the module stores it as (experts, i, o), by a transposition,
    which is also the inverse. Return any other parameter unchanged.
    """
    return value.mT if value.ndim == 3 and getattr(module, "is_transposed", False) else value


def map_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of one of the module's parameters as (o, i) or (experts, o, i)."""
    child = module._modules.get(name)
    if isinstance(child, CodedStack):
        return child.stack_spec.shape
    if isinstance(child, PackedExpertStack):
        return child.packed_stack.shape
    return tuple(as_maps(module, cast(Tensor, module._parameters[name])).shape)


def place_of(module: nn.Module, name: str) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of one of the module's parameters. For a quantized one, the dtype is that of decoded
    values.
    """
    child = module._modules.get(name)
    if isinstance(child, CodedStack):
        return child.weight.device, child.stack_spec.dtype
    if isinstance(child, PackedExpertStack):
        return child.packed_stack.panels.device, child.packed_stack.dtype
    value = cast(Tensor, module._parameters[name])
    return value.device, value.dtype
