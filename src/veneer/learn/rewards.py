"""Reward functions of GRPO and RLOO as a trainer calls them, with limits and checked return values."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch

from veneer.errors import ConfigError, TrainingError, VeneerError
from veneer.learn.limited import EndedError, awaited, begun, hangs, left
from veneer.plain.units import count

Opinion = float | None
_WINDOW = 10  # calls over which failures are counted


class RewardError(TrainingError):
    """Error of a reward function, or of the values that it returned."""


@dataclass(frozen=True, slots=True)
class RewardLimits:
    """Limits of reward functions.

    ``seconds``: the time of one call. If None, there is no limit, and the function is called on the trainer's own
    thread. ``on_error``: "stop" ends the run at the first failure; "none" gives a failed answer no reward.
    ``most_failed``: the largest share of failed answers in a function's last ten calls; the run ends if more fail.
    """

    seconds: float | None = 60.0
    on_error: Literal["stop", "none"] = "stop"
    most_failed: float = 0.1


def reward_functions(given: Any, *, needed: bool) -> list[Any]:
    """Return the reward functions as a list.

    Raises ConfigError if one is not a function, or if there is none and one is ``needed``.
    """
    functions = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not functions and needed:
        raise ConfigError("reward_funcs is empty: give at least one function that rewards completions")
    wrong = [each for each in functions if not (callable(each) or isinstance(each, str))]
    if wrong:
        raise ConfigError(f"reward_funcs holds {wrong[0]!r:.60}: a reward function is a function, a model or its name")
    return functions


def checked_reward(
    function: Any, limits: RewardLimits, *, alone: bool, name: str | None = None, left_out: Collection[int] = ()
) -> Any:
    """Wrap a reward function with limits and a check that it returns a finite number for each completion.

    It may return None, for no opinion, if there are several functions (``alone`` is False). An error counts as no
    opinion if the limits say so. Rows in ``left_out`` at the time of a call get None. A model is returned as it is,
    since TRL calls models itself. The wrapper raises RewardError, with the function's ``name``, also if the function
    raises.
    """
    if not callable(function) or isinstance(function, type) or _is_module(function):
        return function
    judge = _Judge(function, name or _name(function), limits, alone, left_out)

    @functools.wraps(function)
    def now(**row: Any) -> list[Opinion]:
        return judge.now(row)

    @functools.wraps(function)
    async def later(**row: Any) -> list[Opinion]:
        return await judge.later(row)

    wrapper = later if _is_asynchronous(function) else now
    wrapper.__name__ = judge.name  # an object with __call__ has none
    return wrapper


@dataclass(slots=True)
class _Judge:
    """A reward function with its limits. ``shares`` are the shares of answers on which its last calls failed."""

    function: Callable[..., Any]
    name: str
    limits: RewardLimits
    alone: bool
    left_out: Collection[int]
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def now(self, row: Mapping[str, Any]) -> list[Opinion]:
        """Call a plain function and return its opinion on each answer."""
        places, seconds = self._places(row), self.limits.seconds
        until = None if seconds is None else time.monotonic() + seconds
        found: list[Opinion | RewardError] = []
        try:
            found = self._checked(self._called(_chosen(row, places), seconds), places) if places else []
        except RewardError as error:
            found = [error] * len(places)
            if self.limits.on_error == "none" and len(places) > 1:
                found = [self._alone(row, place, until, error) for place in places]
        return self._opinions(row, places, found)

    async def later(self, row: Mapping[str, Any]) -> list[Opinion]:
        """Call an asynchronous function and return its opinion on each answer.

        The time limit acts only when the function awaits something.
        """
        places = self._places(row)
        found: list[Opinion | RewardError] = []
        try:
            found = self._checked(await self._awaited(_chosen(row, places)), places) if places else []
        except RewardError as error:
            found = [error] * len(places)
        return self._opinions(row, places, found)

    @property
    def _told(self) -> str:
        return f"the reward function {self.name}"

    def _places(self, row: Mapping[str, Any]) -> list[int]:
        return [place for place in range(len(row["completions"])) if place not in self.left_out]

    def _alone(self, row: Mapping[str, Any], place: int, until: float | None, whole: RewardError) -> Any:
        """Judge one answer by itself, after the call for all answers failed with the error ``whole``.

        Return its opinion, or the error if this call fails too. If the time ``until`` is already over, return
        ``whole``.
        """
        seconds = left(until)
        if seconds == 0:
            return whole
        try:
            return self._checked(self._called(_chosen(row, [place]), seconds), [place])[0]
        except RewardError as error:
            return error

    def _called(self, row: Mapping[str, Any], seconds: float | None) -> Any:
        """Call the function with the arguments ``row`` and return its result.

        Raises RewardError if the function raises, or does not return within ``seconds``.
        """
        try:
            if seconds is None:
                return _listed(self.function(**row), _n_answers(row))
            told = begun(lambda **given: _listed(self.function(**given), _n_answers(row)), row)
            if not wait([told], timeout=seconds).done:
                raise RewardError(hangs(self._told, seconds, "reward_timeout"))
            error = told.exception()
            if error is not None and not isinstance(error, Exception):
                raise RewardError(f"{self._told} raised {type(error).__name__}, which ends a program") from error
            return told.result()
        except VeneerError:
            raise
        except Exception as error:  # whatever the user's own code raises
            raise RewardError(f"{self._told} raised {_raised(error)}") from error

    async def _awaited(self, row: Mapping[str, Any]) -> Any:
        """Call an asynchronous function and return its result. Raises RewardError under the same conditions as
        `_called`.
        """
        ends = asyncio.timeout(self.limits.seconds)
        try:
            async with ends:
                return await awaited(self._listed_later, row)
        except VeneerError:
            raise
        except EndedError as error:
            raise RewardError(f"{self._told} raised {type(error.__cause__).__name__}, which ends a program") from error
        except Exception as error:  # whatever the user's own code raises
            if ends.expired():
                raise RewardError(hangs(self._told, self.limits.seconds or 0, "reward_timeout")) from error
            raise RewardError(f"{self._told} raised {_raised(error)}") from error

    async def _listed_later(self, **row: Any) -> Any:
        """Await an asynchronous reward function, and return its result.

        If the result is a generator, it is run on a thread, off the event loop.
        """
        found = await self.function(**row)
        if not isinstance(found, Iterator):
            return found
        return await asyncio.wrap_future(begun(_listed, {"found": found, "n": _n_answers(row)}))

    def _checked(self, found: Any, places: Sequence[int]) -> list[Opinion | RewardError]:
        """Check a function's result ``found``: return each answer's number or None, or a RewardError for an invalid
        value.

        ``places`` are the answers' indices. Raises RewardError if the result is not a list with one value for each
        answer.
        """
        if found is None or isinstance(found, str) or not hasattr(found, "__iter__"):
            raise RewardError(
                f"{self._told} returned {found!r:.60}: it must return a list with one number for each completion"
            )
        values = [value.item() if hasattr(value, "item") else value for value in found]
        if len(values) != len(places):
            raise RewardError(
                f"{self._told} returned {len(values)} rewards for {len(places)} completions: "
                "it must return one for each"
            )
        return [self._value(value, place) for value, place in zip(values, places, strict=True)]

    def _value(self, value: Any, place: int) -> Opinion | RewardError:
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return value
        if value is None and not (self.alone and self.limits.on_error == "stop"):
            return None
        more = "" if value is not None else " (None, for no opinion, is for one of several reward functions)"
        return RewardError(
            f"{self._told} returned {value!r} for completion {place + 1}: a reward is a finite number{more}"
        )

    def _opinions(self, row: Mapping[str, Any], places: Sequence[int], found: Sequence[Any]) -> list[Opinion]:
        """Return an opinion for every answer: ``found`` at the indices ``places``, None elsewhere and for errors.

        Raises RewardError if ``found`` holds an error and errors stop the run, or if too many answers failed in the
        last calls.
        """
        errors = [each for each in found if isinstance(each, RewardError)]
        if self.limits.on_error == "stop":
            if errors:
                raise errors[0]
        elif places:
            self._count(row, len(errors) / len(places), errors)
        opinions: list[Opinion] = [None] * len(row["completions"])
        for place, value in zip(places, found, strict=True):
            opinions[place] = None if isinstance(value, RewardError) else value
        return opinions

    def _count(self, row: Mapping[str, Any], share: float, errors: Sequence[RewardError]) -> None:
        self.shares.append(share)
        if "log_metric" in row:
            row["log_metric"](f"rewards/{self.name}/failed", share)
        if errors and sum(self.shares) > self.limits.most_failed * _WINDOW:
            n, mean = len(self.shares), sum(self.shares) / len(self.shares)
            raise RewardError(
                f"{self._told} failed on {mean:.0%} of the answers of its last {count(n, 'call')}: of those of "
                f"{_WINDOW} calls, at most {self.limits.most_failed:.0%} may fail (reward_most_failed). "
                f"The last failure: {errors[-1]}"
            ) from errors[-1]


def _chosen(row: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Return a reward function's keyword arguments for the answers with indices ``places`` alone.

    A list with one entry for each answer keeps only the entries at ``places``; other values are passed on unchanged.
    """
    n = len(row["completions"])
    if len(places) == n:
        return dict(row)
    return {
        key: [value[place] for place in places] if isinstance(value, list) and len(value) == n else value
        for key, value in row.items()
    }


def _n_answers(row: Mapping[str, Any]) -> int:
    return len(row["completions"])


def _listed(found: Any, n: int) -> Any:
    """Return a generator's first ``n + 1`` values as a list, and any other object unchanged."""
    return [*islice(found, n + 1)] if isinstance(found, Iterator) else found


def _raised(error: Exception) -> str:
    """Return an error's type and message, with the file and line that raised it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def _call_of(function: Any) -> Any:
    return function.func if isinstance(function, functools.partial) else function


def _is_module(function: Any) -> bool:
    return isinstance(_call_of(function), torch.nn.Module)


def _is_asynchronous(function: Any) -> bool:
    call = _call_of(function)
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
