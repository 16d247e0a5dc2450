"""Runs as coroutines in one thread. Each has its own random numbers and its own position in accelerate's steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import greenlet
import numpy as np
import torch
from accelerate.state import GradientState
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProcessState:
    """State of the process that belongs to one run: random states, and accelerate's position within a step.

    It is restored when the run resumes.
    """

    python: tuple[Any, ...]
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None
    steps: dict[str, Any]

    @classmethod
    def now(cls) -> ProcessState:
        """Return the current state."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        steps = dict(GradientState._shared_state)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, steps)

    def generator(self) -> torch.Generator:
        """Return a generator that continues the CPU's random numbers from this state."""
        generator = torch.Generator()
        generator.set_state(self.cpu)
        return generator

    def after(self, generator: torch.Generator) -> ProcessState:
        """Return the state with the CPU's random numbers as far advanced as ``generator``, which `generator` made."""
        return replace(self, cpu=generator.get_state())

    def restore(self) -> None:
        """Make this the state of the process."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.steps)


class Coroutine(Generic[T]):
    """A run as a coroutine: a function that calls `ask` to return a request to its caller, and continues with the
    caller's answer.
    """

    def __init__(self, run: Callable[[], T]) -> None:
        self._greenlet = greenlet.greenlet(run)
        self.state = ProcessState.now()

    def resume(self, answer: Any = None) -> Any:
        """Continue the run with ``answer`` until its next request or its end, and return the request or the result.

        An error of the run is raised here.
        """
        outside = ProcessState.now()
        self.state.restore()
        try:
            return self._greenlet.switch() if not self._greenlet else self._greenlet.switch(answer)
        finally:
            self.state = ProcessState.now()
            outside.restore()

    @property
    def ended(self) -> bool:
        """True once the run is over."""
        return bool(self._greenlet.dead)

    def close(self) -> None:
        """End the run where it is. Its ``finally`` blocks run."""
        if self._greenlet and not self.ended:
            self._greenlet.throw()


def ask(question: Any) -> Any:
    """Suspend the run that calls this, and return ``question`` from its `Coroutine.resume`. Return the answer that the
    next `resume` gives.
    """
    outside = greenlet.getcurrent().parent
    assert outside is not None  # only a run asks
    return outside.switch(question)
