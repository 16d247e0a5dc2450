"""Mixed batch: every row uses the adapter that it names, for one forward pass or one generation."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.errors import AdapterNameError, CompositionError, ConfigError, ShapeError
from veneer.model.adapted.parameters import AdaptedParameters
from veneer.model.adapted.routing import BASE, Routing
from veneer.model.adapted.site import Adapted
from veneer.model.adapted.state import AdapterState
from veneer.model.sites.virtual_tokens import require_mixable, virtual_tokens
from veneer.plain.field_types import fits, plain

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
Inputs = tuple[Sequence[Any], Mapping[str, Any]]
TaskIds = Tensor | Sequence[int]


@contextmanager
def mixed_batch(
    model: nn.Module, state: AdapterState, names: Sequence[str] | None, inputs: Inputs, task_ids: TaskIds | None = None
) -> Iterator[None]:
    """Enter a context in which row n of the batch uses the adapter ``names[n]``, or none if that is ``"__base__"``.

    ``task_ids`` holds the task of each row, for adapters that have several. Without ``names``, all rows use the active
    adapter. ``inputs`` are the arguments of the call. Checkpointed blocks are computed again with the same rows, also
    after the context has ended.

    Raises AdapterNameError for a name that is not loaded, and ShapeError if there is not one name for each row. Raises
    CompositionError if adapters are merged, or if a module cannot use different adapters for rows. Raises ConfigError
    for unusable tasks, or for a frozen adapter in training.
    """
    tasks = None if task_ids is None else _whole_numbers(task_ids)
    routing = checked(model, state, _acting_names(state, inputs, tasks) if names is None else names, inputs)
    if tasks is not None:
        routing = replace(routing, tasks=_tasks(state, routing.names, tasks))
    with routed(model, state, routing):
        yield


def _whole_numbers(task_ids: TaskIds) -> list[int]:
    given = plain(task_ids)
    if not fits(given, Collection[int]):
        raise ConfigError(f"task_ids={given!r} must be a list of whole numbers, one for each row of the batch")
    return list(given)


def _acting_names(state: AdapterState, inputs: Inputs, tasks: Sequence[int] | None) -> tuple[str, ...]:
    """Return the name of the active adapter, once for each row."""
    if len(state.active) != 1:
        raise CompositionError(
            f"task_ids names tasks of one adapter, but the active adapters are {list(state.active)}: activate exactly "
            "one, or give adapter_names, one for each row"
        )
    return state.active * _n_rows(inputs, len(tasks or ()))


def _tasks(state: AdapterState, names: Sequence[str], given: Sequence[int]) -> tuple[int | None, ...]:
    """Return each row's task, or None for a row whose adapter has no tasks.

    Raises ShapeError if there is not one task for each row. Raises ConfigError if no adapter has tasks, or an adapter
    does not have the given one.
    """
    if len(given) != len(names):
        raise ShapeError(f"task_ids holds {len(given)} tasks for a batch of {len(names)} rows: give one for each row")
    counts = {name: 0 if name == BASE else state.configs[name].n_tasks for name in names}
    if not any(counts.values()):
        raise ConfigError(f"task_ids has no effect: {list(counts)} have no tasks. Leave it out")
    for name, task in zip(names, given, strict=True):
        if counts[name] and not 0 <= task < counts[name]:
            raise ConfigError(f"task_ids holds {task}, and the adapter {name!r} has the tasks 0 to {counts[name] - 1}")
    return tuple(task if counts[name] else None for name, task in zip(names, given, strict=True))


def _n_rows(inputs: Inputs, otherwise: int) -> int:
    args, kwargs = inputs
    return next((x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1), otherwise)


@contextmanager
def routed(model: nn.Module, state: AdapterState, routing: Routing) -> Iterator[None]:
    """Enter the context of `mixed_batch`, with a routing that has been checked."""
    kept = {module: module._gradient_checkpointing_func for module in _checkpointing(model)}
    for module, checkpoint in kept.items():
        module._gradient_checkpointing_func = _routed(checkpoint, state, routing)
    try:
        with state.route(routing):
            yield
    finally:
        for module, checkpoint in kept.items():
            module._gradient_checkpointing_func = checkpoint


def checked(model: nn.Module, state: AdapterState, names: Sequence[str], inputs: Inputs) -> Routing:
    """Check that the rows of a batch can use these adapters, and return the names as a routing. Raises as `mixed_batch`
    does.
    """
    if isinstance(names, str) or not names:
        raise ConfigError(f"adapter_names={names!r} must be a list with one adapter name for each row of the batch")
    routing = Routing(tuple(names))
    unknown = sorted({str(name) for name in routing.adapters if name not in state.configs})
    if unknown:
        raise AdapterNameError(
            f"adapter_names holds {unknown}, which are not loaded; loaded: {sorted(state.configs)}, and {BASE!r} for "
            "rows that no adapter changes"
        )
    if state.merged:
        raise CompositionError(
            f"{list(state.merged)} are merged into the weights, which all rows share: call unmerge_adapter() before "
            "rows take adapters of their own"
        )
    training = model.training and torch.is_grad_enabled() and inputs[1].get("labels") is not None
    waiting = [n for n in routing.adapters if training and n in state.trainable and not _trains(model, n)]
    if waiting:
        raise ConfigError(
            f"rows name {waiting}, which are frozen because they are not active: they would learn nothing. Call "
            f"set_requires_grad({list(routing.adapters)}) before you make the optimizer, or model.eval()"
        )
    n_rows = _n_rows(inputs, len(names))
    if n_rows != len(names):
        raise ShapeError(f"adapter_names holds {len(names)} names for a batch of {n_rows} rows: give one for each row")
    for path, module in model.named_modules():
        if isinstance(module, Adapted) and _is_of_experts(path, module) and any(map(module.holds, routing.adapters)):
            raise CompositionError(
                f"{path} belongs to one of several experts, and an expert gets single tokens of any row: per-row "
                "adapters are not supported for experts. Run the adapters one after another."
            )
    if virtual_tokens(model):
        require_mixable(cast(PreTrainedModel, model), routing)
    return routing


def _trains(model: nn.Module, name: str) -> bool:
    parameters = (p for key, p in model.named_parameters() if f"adapters.{name}." in key or f"copies.{name}." in key)
    return any(p.requires_grad for p in parameters)


def _is_of_experts(path: str, module: Adapted) -> bool:
    return _EXPERT.search(f"{path}.") is not None or (isinstance(module, AdaptedParameters) and bool(module.adapters))


def _checkpointing(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if "_gradient_checkpointing_func" in vars(m)]


def _routed(checkpoint: Callable[..., Any], state: AdapterState, routing: Routing) -> Callable[..., Any]:
    """Wrap ``checkpoint`` so that a checkpointed function runs with these rows' adapters, in the forward pass and when
    the backward pass recomputes it.
    """

    @functools.wraps(checkpoint)
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept: list[dict[str, Tensor]] = []

        def again(*inner: Any, **named: Any) -> Any:
            with state.route(routing), _same_draws(routing, kept):
                return function(*inner, **named)

        return checkpoint(again, *args, **kwargs)

    return run


@contextmanager
def _same_draws(routing: Routing, kept: list[dict[str, Tensor]]) -> Iterator[None]:
    """Enter a context in which a checkpointed function gets the same random numbers for adapters each time it runs.

    If ``kept`` is empty, this is the first run, and the generators' states are stored in it. A later run starts from
    the stored states.
    """
    now = {name: generator.get_state() for name, generator in routing.generators.items()}
    again = bool(kept)
    if again:
        _set_streams(routing, kept[0])
    else:
        kept.append(now)
    try:
        yield
    finally:
        if again:
            _set_streams(routing, now)


def _set_streams(routing: Routing, states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        routing.generators[name].set_state(state)
