"""Parameters that an adapter changes by name (``target_parameters``): experts stacked in one tensor, routers.

No linear layer holds them, so they are changed when the module's own code reads them. Experts that follow transformers'
convention are run here instead, expert by expert. No updated copy of the stack is made, and the update is rounded once,
at the output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.contract import LinearMethod, MethodConfig
from veneer.errors import CompositionError, TargetError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.convolution import is_convolution
from veneer.model.adapted.embedding import is_embedding
from veneer.model.adapted.experts import run_experts, runs_by_convention, stacks_by_convention
from veneer.model.adapted.holder import tensors_of
from veneer.model.adapted.linear import is_linear
from veneer.model.adapted.site import Adapted, swap_reading
from veneer.model.quantized.stack import (
    CodedStack,
    PackedExpertStack,
    as_maps,
    coded_stacks,
    map_shape,
    parameter_names,
    place_of,
)
from veneer.plain.autocast import without_autocast
from veneer.plain.module_names import matches_any
from veneer.plain.nearest import nearest
from veneer.records.deltas import LinearDelta
from veneer.records.linear import compose_linear, fold_blocks, fold_linear
from veneer.records.sites import LinearSite


class AdaptedParameters(Adapted):
    """Mixin before the class of a module whose own parameters adapters change.

    ``adapters[name][parameter]`` holds the tensors with which adapter ``name`` changes the module's parameter
    ``parameter``.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self.adapter_state.routed()
        if routing is not None and any(name in self.adapters for name in routing.adapters):
            raise CompositionError(
                f"{self.site_name} is one weight for all rows: rows of one batch cannot take different adapters there. "
                "Run the adapters one after another."
            )
        if not self.acting_here():
            return super().forward(*args, **kwargs)
        if runs_by_convention(self) and not kwargs and len(args) == 3:
            records = {name: acting_record(self, name) for name in stacks_by_convention(self)}
            return run_experts(self, *args, {name: each for name, each in records.items() if each is not None})
        with self.kept.reading():  # the module's code may read a parameter once for each expert
            return super().forward(*args, **kwargs)

    def acting_here(self) -> list[str]:
        """Return the adapters that now change parameters of this module."""
        return [name for name in self.adapter_state.acting() if name in self.adapters]

    def changed(self, name: str) -> tuple[str, ...]:
        """Return the parameters that an adapter changes, in the module's order."""
        return tuple(cast(nn.ModuleDict, self.adapters[name])) if name in self.adapters else ()

    def site(self, parameter: str) -> LinearSite:
        """Describe one of the module's parameters as a linear map."""
        return site_of(f"{self.site_name}.{parameter}", self, parameter)

    def record(self, parameter: str, names: Sequence[str]) -> LinearDelta | None:
        """Return the joint change of a parameter by these adapters, or None if they do not change it."""
        with without_autocast(place_of(self, parameter)[0]):
            records = [
                cast(LinearMethod, self.adapter_state.configs[name]).lower(
                    self.site(parameter), tensors_of(cast(nn.ModuleDict, self.adapters[name])[parameter])
                )
                for name in names
                if parameter in self.changed(name)
            ]
        return compose_linear(records) if records else None

    def effective(self, parameter: str, names: Sequence[str] | None = None) -> Tensor | None:
        read = self.kept.read if names is None else None
        if read is not None and parameter in read:
            return read[parameter]
        value = super().effective(parameter, names)
        record = self.record(parameter, self.adapter_state.acting() if names is None else names)
        if record is not None and value is not None:
            folded, _ = fold_linear(record, as_maps(self, value))
            value = as_maps(self, folded)
        if read is not None:
            read[parameter] = value
        return value

    def folded(self, names: Sequence[str]) -> dict[str, Tensor]:
        values = super().folded(names)
        stacks = coded_stacks(self)
        for parameter in dict.fromkeys(parameter for name in names for parameter in self.changed(name)):
            stack = stacks.get(parameter)
            if stack is None:
                values[parameter] = cast(Tensor, self.effective(parameter, names)).contiguous()
            else:
                values[parameter] = self.folded_stack(parameter, names, stack.stack_spec.dtype)
        return values

    def folded_stack(self, parameter: str, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        """Return a quantized stack of experts as dense weights (experts, o, i) with these adapters merged in, rounded
        once to ``dtype``.
        """
        coded, record = coded_stacks(self)[parameter].coded(), cast(LinearDelta, self.record(parameter, names))
        experts = (coded.expert(number).dense(torch.float32)[None] for number in range(coded.shape[0]))
        return torch.cat(list(fold_blocks(record, experts, dtype)))

    def replace(self, values: dict[str, Tensor]) -> None:
        stacks = coded_stacks(self)
        for name in values.keys() & stacks.keys():
            stacks[name].merged = values[name]
        super().replace({name: value for name, value in values.items() if name not in stacks})

    def put_back(self) -> None:
        for stack in coded_stacks(self).values():
            stack.merged = None
        super().put_back()

    def folded_rows(
        self, key: str, names: Sequence[str], own: Iterable[Tensor], dtype: torch.dtype
    ) -> Iterator[Tensor] | None:
        parameter, record = self._parameters[key], self.record(key, names)
        stacked = parameter is not None and parameter.ndim == 3
        if not stacked or record is None or any(self.has_own(name, key) for name in names):
            return None
        maps = (as_maps(self, experts) for experts in own)
        return (as_maps(self, experts).contiguous() for experts in fold_blocks(record, maps, dtype))

    def add_adapter(self, name: str, allocation: Allocation, keys: Mapping[str, Mapping[str, str]]) -> None:
        """Give a new adapter its parameters.

        ``keys`` has an entry for each of the module's parameters that the adapter changes. The entry maps the names of
        the adapter's tensors to their keys in a file.
        """
        method, held = self.adapter_state.configs[name], nn.ModuleDict()
        for parameter in keys:
            held[parameter] = allocation.parameters(method, self.site(parameter), *place_of(self, parameter))
            if parameter in self._parameters:  # codes have no form that the module's own code reads
                swap_reading(self, parameter)
        self.hold(name, held, {f"{parameter}.{own}": key for parameter in keys for own, key in keys[parameter].items()})


def acting_record(module: nn.Module, parameter: str) -> LinearDelta | None:
    """Return the change of a module's parameter by the adapters that act now, or None if none does."""
    return module.record(parameter, module.adapter_state.acting()) if isinstance(module, AdaptedParameters) else None


def site_of(path: str, module: nn.Module, parameter: str) -> LinearSite:
    """Describe a parameter as a linear map (o, i), or as one for each expert (experts, o, i), by its shape. A shape
    that the module stores transposed is turned first.
    """
    *experts, o, i = map_shape(module, parameter)
    return LinearSite(name=path, in_features=i, out_features=o, experts=experts[0] if experts else 1)


def parameter_places(
    modules: Mapping[str, nn.Module], config: MethodConfig, taken: Collection[str]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Find the parameters that a config's ``target_parameters`` names. Return those of linear layers as the layers'
    paths (second), and all others as names by module path (first).

    ``taken``: paths of modules that the config adapts or trains whole. Raises TargetError with every problem.
    """
    wanted = config.extras.parameters
    known = {f"{path}.{key}": (path, key) for path, m in modules.items() for key in parameter_names(m)}
    found = {name: place for name, place in known.items() if any(matches_any(name, (w,)) for w in wanted)}
    problems = [_unknown(w, known) for w in wanted if not any(matches_any(name, (w,)) for name in found)]
    problems += [p for n, (path, key) in found.items() if (p := _refusal(n, modules[path], key, path in taken))]
    if problems:
        raise TargetError("; ".join(problems))
    layers = tuple(path for path, _ in found.values() if is_linear(modules[path]))
    places: dict[str, tuple[str, ...]] = {}
    for path, key in found.values():
        if path not in layers:
            places[path] = (*places.get(path, ()), key)
    return places, layers


def _unknown(name: str, known: Mapping[str, object]) -> str:
    hints = nearest(name.rpartition(".")[2], (n.rpartition(".")[2] for n in known))
    return f"target_parameters names {name!r}, which is no parameter of the model" + (
        f" (nearest: {', '.join(hints)})" if hints else ""
    )


def _refusal(name: str, module: nn.Module, key: str, taken: bool) -> str | None:
    """Return why a parameter cannot be adapted by name, or None if it can."""
    value = module._parameters.get(key)
    if taken:
        return f"target_parameters names {name!r}, whose module target_modules or modules_to_save takes too: drop one"
    if (
        is_embedding(module)
        or is_convolution(module)
        or (is_linear(module) and (not isinstance(module, nn.Linear) or key != "weight"))
    ):
        return f"target_parameters names {name!r} of a {type(module).__name__}: name the module in target_modules"
    if isinstance(module._modules.get(key), CodedStack | PackedExpertStack):
        return None
    if value is None or value.ndim not in (2, 3) or not value.is_floating_point():
        shape = None if value is None else tuple(value.shape)
        return (
            f"target_parameters names {name!r} of shape {shape}: it must be a matrix (o, i), or (experts, o, i), of "
            "floating-point numbers"
        )
    return None
