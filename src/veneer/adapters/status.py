"""Status of a model: adapters by layer, active adapters, trainable adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.model.adapted.holder import Holder
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_places
from veneer.model.inplace import InPlace, base_of
from veneer.model.quantized.frozen_weight import frozen_weight

Mixed = bool | Literal["irregular"]


@dataclass(frozen=True)
class TunerLayerStatus:
    """Status of one adapted module. The fields are those of PEFT's class of this name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class TunerModelStatus:
    """Status of the whole model. The fields are those of PEFT's class of this name."""

    base_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of every adapted module. Raises ConfigError if the model has none."""
    state = _state(model)
    return [
        TunerLayerStatus(
            name=path,
            module_type=type(place).__name__,
            enabled=not state.disabled,
            active_adapters=list(state.active),
            merged_adapters=[name for name in state.merged if held[name]],
            requires_grad={name: _one(t.requires_grad for t in tensors) for name, tensors in held.items() if tensors},
            available_adapters=sorted(name for name, tensors in held.items() if tensors),
            devices={name: sorted({t.device.type for t in tensors}) for name, tensors in held.items() if tensors},
        )
        for path, place in adapted_places(model).items()
        for held in [{name: _tensors(place, name) for name in state.configs}]
    ]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of the model. Raises ConfigError if it has no adapters."""
    state, layers = _state(model), get_layer_status(model)
    trainable, total = count_parameters(model)
    names = sorted(state.configs)
    return TunerModelStatus(
        base_model_type=base_of(type(model)).__name__ if isinstance(model, InPlace) else type(model).__name__,
        peft_types={name: config.peft_type for name, config in state.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=not state.disabled,
        active_adapters=list(state.active),
        merged_adapters=sorted(state.merged),
        requires_grad={n: _one(x.requires_grad[n] for x in layers if n in x.requires_grad) for n in names},
        available_adapters=names,
        devices={n: sorted({d for x in layers for d in x.devices.get(n, [])}) for n in names},
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the trainable parameters, and all parameters. A quantized weight counts with the number of its dense
    values.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    for module in model.modules():
        if hasattr(module, "frozen_format"):
            rows, columns = frozen_weight(module).shape
            total += rows * columns
    return trainable, total


def describe_targets(model: nn.Module, state: AdapterState) -> str:
    """Return one line for each adapter: the modules that it changes, counted by the last part of their paths."""
    places = adapted_places(model)
    lines = []
    for name, config in state.configs.items():
        changed = Counter(path.rpartition(".")[2] for path, place in places.items() if name in place.adapters)
        whole = sorted(path for path, place in places.items() if place.trains_whole(name))
        parts = ", ".join(f"{ending} ×{n}" for ending, n in changed.items())
        also = f"; trained whole: {', '.join(whole)}" if whole and len(whole) <= 8 else ""
        also = f"; parameters of {len(whole)} modules trained whole" if len(whole) > 8 else also
        lines.append(f"adapter {name!r} ({config.peft_type}) on {changed.total()} modules: {parts}{also}")
    return "\n".join(lines)


def _state(model: nn.Module) -> AdapterState:
    state = vars(model).get("adapter_state")
    if not isinstance(state, AdapterState) or not state.configs:
        raise ConfigError(f"this {type(model).__name__} has no adapters: attach one with get_peft_model first")
    return state


def _tensors(place: Holder, name: str) -> list[Tensor]:
    return [tensor for held in place.holdings if name in held for tensor in held[name].parameters()]


def _one(values: Iterable[Mixed]) -> Mixed:
    seen = set(values)
    return seen.pop() if len(seen) == 1 else "irregular"
