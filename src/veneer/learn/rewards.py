"""Reward functions of GRPO and RLOO as a trainer calls them, with their return values checked."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from veneer.errors import ConfigError, TrainingError, VeneerError


def reward_functions(given: Any, *, needed: bool) -> list[Any]:
    """Return the reward functions as a list, with checked return values.

    Raises ConfigError if one is no function, and if one is ``needed`` and there is none.
    """
    functions = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not functions and needed:
        raise ConfigError("reward_funcs is empty: give at least one function that rewards completions")
    wrong = [each for each in functions if not (callable(each) or isinstance(each, str))]
    if wrong:
        raise ConfigError(f"reward_funcs holds {wrong[0]!r:.60}: a reward function is a function, a model or its name")
    return [checked_reward(each, alone=len(functions) == 1) for each in functions]


def checked_reward(function: Any, *, alone: bool, name: str | None = None) -> Any:
    """Return the function with a check of its return value: a finite number for each completion.

    None is no opinion on a completion. It is allowed only if there are several functions (``alone`` is False). TRL
    calls models and asynchronous functions itself. The wrapper raises TrainingError, with the ``name`` of the function,
    also if the function raises.
    """
    if not callable(function) or isinstance(function, type) or not _is_plain(function):
        return function

    @functools.wraps(function)
    def rewarded(*args: Any, completions: Sequence[Any], **row: Any) -> list[float | None]:
        told = name or _name(function)
        try:
            found = function(*args, completions=completions, **row)
        except VeneerError:
            raise
        except Exception as error:  # whatever the user's own code raises
            raise TrainingError(f"the reward function {told} raised {_raised(error)}") from error
        return _checked(told, found, len(completions), alone)

    return rewarded


def _raised(error: Exception) -> str:
    """Return an error's message with the place that raised it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def _checked(name: str, found: Any, n: int, alone: bool) -> list[float | None]:
    head = f"the reward function {name}"
    if found is None or isinstance(found, str) or not hasattr(found, "__iter__"):
        raise TrainingError(f"{head} returned {found!r:.60}: it must return a list with one number for each completion")
    values = [value.item() if hasattr(value, "item") else value for value in found]
    if len(values) != n:
        raise TrainingError(f"{head} returned {len(values)} rewards for {n} completions: it must return one for each")
    for number, value in enumerate(values, start=1):
        if value is None and not alone:
            continue
        if isinstance(value, bool | int | float) and math.isfinite(value):
            continue
        more = "" if value is not None else " (None, for no opinion, is for one of several reward functions)"
        raise TrainingError(f"{head} returned {value!r} for completion {number}: a reward is a finite number{more}")
    return values


def _is_plain(function: Any) -> bool:
    call = function.func if isinstance(function, functools.partial) else function
    if isinstance(call, torch.nn.Module):
        return False
    return not (inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__))


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
