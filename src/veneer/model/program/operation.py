"""Operation of a program. Each kind is one class in one file, which holds all that is particular to it.

An operation is plain data. The registers that it reads and writes have widths. `Operation.bind` finds its weights in a
model, and the other methods get these weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from veneer.model.blueprint.parts import Linear, Norm, Stack
from veneer.model.program.binding import Binding
from veneer.model.program.expert_stacks import ExpertStacks
from veneer.model.program.linears import Linears
from veneer.model.program.rows import PassRows
from veneer.model.program.version import Version
from veneer.ops.cpu.step import StepProgram
from veneer.ops.state.delta import StateShape

STREAM = "h"
Frame = dict[str, Any]
"""The tensors of a pass by the names of registers, with what is ``given`` to it and its ``logits``."""


class Register(NamedTuple):
    """Named place for tensors (n, width) that operations read and write, with the width of each tensor."""

    name: str
    widths: tuple[int, ...]

    def read(self, frame: Frame) -> list[Tensor]:
        """Return the register's tensors."""
        held = frame[self.name]
        return [held] if isinstance(held, Tensor) else list(held)

    def write(self, frame: Frame, ys: Sequence[Tensor]) -> None:
        """Put tensors into the register."""
        frame[self.name] = ys[0] if len(self.widths) == 1 else ys


class Keys(NamedTuple):
    """Values that a layer stores for each token: keys and values of ``n_heads`` heads, each ``width`` wide."""

    n_heads: int
    width: int

    @property
    def n_numbers(self) -> int:
        """Number of values of a token."""
        return 2 * self.n_heads * self.width


class Window(NamedTuple):
    """State that a short convolution stores for each token: its input, ``width`` values, which the next tokens read."""

    width: int

    @property
    def n_numbers(self) -> int:
        """Number of values of a token."""
        return self.width


class PageState(NamedTuple):
    """State of a scan, which is kept for each page: that after the last token written into the page."""

    shape: StateShape

    @property
    def n_bytes(self) -> int:
        """Bytes of a page's state."""
        return 4 * self.shape.n_numbers


class PassKind(NamedTuple):
    """Kind of a pass. ``in_pages``: keys are stored only in the pages of the C++ kernels. ``by_ids``: the pass begins
    with token ids, not with embeddings.
    """

    in_pages: bool
    by_ids: bool


class StepPlace(NamedTuple):
    """Place in the program in C++ (``step``) for a version's changes of an operation: the version's number, and the
    index (``at``) of the operation's first instruction.
    """

    step: StepProgram
    version: int
    at: int


class Operation(ABC):
    """Operation of a program. Operations with equal fields are equal."""

    read: ClassVar[tuple[str, ...]] = ("source",)
    """Names of the fields with the registers that it reads; those that it writes are in ``written``."""
    written: ClassVar[tuple[str, ...]] = ("target",)
    site: str = ""
    """Place of the bottlenecks that act here; empty if there are none."""
    takes_blocks: ClassVar[bool] = True
    """Return True if the C++ step supports what the blocks of versions change at its layers."""

    @property
    def reads(self) -> tuple[Register, ...]:
        """Registers that it reads."""
        return tuple(getattr(self, name) for name in self.read)

    @property
    def writes(self) -> tuple[Register, ...]:
        """Registers that it writes."""
        return tuple(getattr(self, name) for name in self.written)

    @property
    def layers(self) -> tuple[Linear, ...]:
        """Linear layers that the operation computes; they read the same input."""
        return ()

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Layers of all experts that it computes, packed together."""
        return ()

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Norms that a version may replace."""
        return ()

    @property
    def untrained(self) -> str | None:
        """The reason, in words, why the operation has no backward pass, or None if it has one (`Trained`)."""
        return "a part of it has no backward pass"

    @property
    def alone(self) -> tuple[Operation, ...]:
        """The operations that this one combines, or only itself if it combines none."""
        return (self,)

    @property
    def state(self) -> Keys | Window | PageState | None:
        """The values that the operation stores for each token or page, or None."""
        return None

    def bind(self, to: Binding) -> Any:
        """Return the operation's weights."""
        return None

    @abstractmethod
    def forward(self, weights: Any, rows: PassRows, frame: Frame) -> None:
        """Compute the registers that the operation writes, by torch and veneer's ops."""

    def emit(self, weights: Any, step: StepProgram) -> bool:
        """Add the operation to the program in C++. Return False if the C++ code does not support it: then `forward`
        runs the operation.
        """
        return False

    def fits(self, kind: PassKind) -> bool:
        """Return True if the operation's C++ instructions can run in a pass of a kind."""
        return True

    def group(self, weights: Any) -> Linears | ExpertStacks | None:
        """Return the layers that versions change here, with their weights, or None if there are none."""
        return None

    def take(self, weights: Any, version: Version, place: StepPlace) -> bool:
        """Add a version's changes of this operation to the program in C++, except those in the version's packed block,
        which are added elsewhere.

        Return False if the C++ code does not support one of the changes.
        """
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """Operation with its weights."""

    operation: Operation
    weights: Any

    def __call__(self, rows: PassRows, frame: Frame) -> None:
        self.operation.forward(self.weights, rows, frame)
