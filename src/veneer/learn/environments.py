"""TRL's environments, whose ``reset`` has a limit of seconds and whose errors are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veneer.learn.limited import begun, result_within

Factory = Callable[[], Any]


def limited_environments(given: Factory | dict[str, Factory], seconds: Callable[[], float]) -> Any:
    """Return the factory of environments, or those by name, with a limit on ``reset``.

    An environment whose ``reset`` raises, or takes more than ``seconds()``, raises TrainingError.
    """
    if isinstance(given, dict):
        return {name: _limited(factory, seconds) for name, factory in given.items()}
    return _limited(given, seconds)


def _limited(factory: Factory, seconds: Callable[[], float]) -> Factory:
    def make() -> Any:
        environment = factory()
        reset = getattr(environment, "reset", None)
        if callable(reset):  # else TRL refuses it
            name = f"{type(environment).__name__}.reset"

            def limited(**row: Any) -> Any:
                return result_within(begun(reset, row), seconds(), name)

            environment.reset = limited
        return environment

    return make
