"""Limits TRL's environments: their ``reset`` has a limit in seconds, and errors name the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veneer.learn.limited import begun, result_within

Factory = Callable[[], Any]
Observed = Callable[[Callable[[], Any]], Any]


def limited_environments(given: Factory | dict[str, Factory], seconds: Callable[[], float], observed: Observed) -> Any:
    """Return the environments' factory, or their factories by name, with a time limit on each ``reset``.

    TRL's calls of ``reset`` become calls of ``observed(reset)``, in the same order. ``observed`` may return a known
    first observation instead of calling ``reset``. If ``reset`` raises, or takes more than ``seconds()``, TrainingError
    is raised.
    """
    if isinstance(given, dict):
        return {name: _limited(factory, seconds, observed) for name, factory in given.items()}
    return _limited(given, seconds, observed)


def _limited(factory: Factory, seconds: Callable[[], float], observed: Observed) -> Factory:
    def make() -> Any:
        environment = factory()
        reset = getattr(environment, "reset", None)
        if callable(reset):  # else TRL refuses it
            name = f"{type(environment).__name__}.reset"

            def limited(**row: Any) -> Any:
                return observed(lambda: result_within(begun(reset, row), seconds(), name))

            environment.reset = limited
        return environment

    return make
