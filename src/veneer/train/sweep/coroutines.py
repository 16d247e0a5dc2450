"""Runs that take turns in one thread, each with its own random numbers and its own place in accelerate's steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import greenlet
import numpy as np
import torch
from accelerate.state import GradientState
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run finds in the process as it left it: random states, and where accelerate is within a step."""

    python: tuple[Any, ...]
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None
    steps: dict[str, Any]

    @classmethod
    def now(cls) -> Surroundings:
        """As they are."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        steps = dict(GradientState._shared_state)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, steps)

    def generator(self, device: torch.device) -> torch.Generator:
        """One that goes on where the random numbers of this device are."""
        generator = torch.Generator(device)
        generator.set_state(cast(Tensor, self.cuda if device.type == "cuda" else self.cpu))
        return generator

    def drawn(self, generator: torch.Generator) -> Surroundings:
        """These, with the random numbers where a `generator` of theirs has come to."""
        if generator.device.type == "cuda":
            return replace(self, cuda=generator.get_state())
        return replace(self, cpu=generator.get_state())

    def restore(self) -> None:
        """Bring them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.steps)


class Turn(Generic[T]):
    """One run, as a function that may `ask` for something in the middle and goes on when it is answered."""

    def __init__(self, run: Callable[[], T]) -> None:
        self._greenlet = greenlet.greenlet(run)
        self.surroundings = Surroundings.now()

    def go_on(self, answer: Any = None) -> Any:
        """Let the run go on until it asks for something, which is returned, or ends: then what it gives back.

        What the run raises is raised here.
        """
        outside = Surroundings.now()
        self.surroundings.restore()
        try:
            return self._greenlet.switch() if not self._greenlet else self._greenlet.switch(answer)
        finally:
            self.surroundings = Surroundings.now()
            outside.restore()

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return bool(self._greenlet.dead)

    def abandon(self) -> None:
        """End a run where it is; its ``finally`` blocks run."""
        if self._greenlet and not self.ended:
            self._greenlet.throw()


def ask(question: Any) -> Any:
    """Within a run: hand the turn over with a question, and come back with the answer."""
    outside = greenlet.getcurrent().parent
    assert outside is not None  # only a run asks
    return outside.switch(question)
