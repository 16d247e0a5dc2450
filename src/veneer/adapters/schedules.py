"""Training hooks for methods that need them: a penalty in the loss, an update after each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from veneer.contract import Params
from veneer.contract.training import Training
from veneer.model.adapted.holder import tensors_of
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_places

_JOINT = "::"  # in no adapter's name


def penalty(model: nn.Module, state: AdapterState) -> Tensor | None:
    """Return the penalty that the active adapters add to a training loss, or None."""
    found = (training.penalty(list(layers_of(model, name).values())) for name, training in _acting(state).items())
    terms = [term for term in found if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def with_penalty(model: nn.Module, state: AdapterState, output: Any) -> Any:
    """Return a model's training output with the penalty added to its loss, as PEFT's AdaLoRA does."""
    loss = getattr(output, "loss", None)
    if model.training and isinstance(loss, Tensor):
        term = penalty(model, state)
        if term is not None:
            output.loss = loss + term.to(loss.device)
    return output


def begin(model: nn.Module, state: AdapterState, n_steps: int | None = None) -> None:
    """Create the schedules of the active adapters that train. ``n_steps`` is the number of steps of the run, for
    methods that need it.
    """
    for name, training in _acting(state).items():
        if name in state.schedules:
            continue
        layers = layers_of(model, name)
        if any(value.requires_grad for params in layers.values() for value in params.values()):
            config = state.configs[name]
            changed = {} if n_steps is None else training.fields_for(n_steps)
            config = replace(config, **changed) if changed else config  # type: ignore[arg-type]
            schedule = cast(Training, config.training).schedule(layers)
            if schedule is not None:
                state.configs[name], state.schedules[name] = config, schedule


def has_schedule(state: AdapterState) -> bool:
    """Return True if a method of the active adapters may act on its parameters between steps."""
    return any(type(training).schedule is not Training.schedule for training in _acting(state).values())


def advance(state: AdapterState, step: int) -> bool:
    """Advance the active adapters' schedules after optimizer step ``step``. Return False if they have none."""
    present = [schedule for name, schedule in state.schedules.items() if name in state.acting()]
    for schedule in present:
        schedule.step(step)
    return bool(present)


def tensors(state: AdapterState) -> dict[str, Tensor]:
    """Return the state of all schedules. After `restore`, they continue from it."""
    return {
        f"{n}{_JOINT}{key}": value for n, schedule in state.schedules.items() for key, value in schedule.state().items()
    }


def restore(state: AdapterState, saved: Mapping[str, Tensor]) -> None:
    """Restore the state that `tensors` returned into schedules that were created by `begin`."""
    for name, schedule in state.schedules.items():
        prefix = f"{name}{_JOINT}"
        schedule.restore({key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)})


def layers_of(model: nn.Module, name: str) -> dict[str, Params]:
    """Return the parameters of an adapter in each module that it changes, by the module's path."""
    return {p: tensors_of(place.adapters[name]) for p, place in adapted_places(model).items() if name in place.adapters}


def _acting(state: AdapterState) -> dict[str, Training]:
    found = {name: state.configs[name].training for name in state.acting()}
    return {name: training for name, training in found.items() if training is not None}
