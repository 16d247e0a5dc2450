"""Computation of plans: the runners' interface, and their common part, the drawing of tokens from logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from veneer.errors import FormatError
from veneer.serve.adapters.mix import Parts
from veneer.serve.adapters.versions import Versions
from veneer.serve.runners.sampler import DrawRule, Row, Sampler, not_finite
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.step_plan import DrawnToken, PlannedSequence, Sampled, StepPlan


class Runner(Protocol):
    """Computation of plans.

    Adapters are read at any time, and loaded and unloaded between plans, under the ids of their versions.
    """

    def read(self, folder: Path) -> Any:
        """Read an adapter for `load`; the result has its size as ``n_bytes``. Any thread may call it.

        Raises VeneerError if the adapter does not fit.
        """

    def read_mix(self, parts: Parts) -> Any:
        """Read adapters as `read` does, and return their weighted sum. Raises CompositionError for adapters that have
        no sum.
        """

    def kept(self, version: str) -> Any:
        """Return a version as `read` does if its packed tensors are on disk; None otherwise.

        Called on the thread that reads.
        """

    def keep(self, version: str, adapter: Any) -> None:
        """Write a version's packed tensors to disk, if that is possible and requested.

        Called on the thread that reads.
        """

    def load(self, version: str, adapter: Any) -> None:
        """Load an adapter that was read. Raises VeneerError if it does not fit; the runner is then unchanged."""

    def unload(self, version: str) -> None:
        """Unload an adapter, if it is loaded."""

    def discard(self, pages: Sequence[int]) -> None:
        """Free the memory of pages that are not held."""

    def release(self, request_ids: Sequence[Hashable]) -> None:
        """Free the memory besides pages that is kept for these sequences. They have released their pages, because they
        begin again or have ended.
        """

    def keeps_apart(self, version: str | None) -> bool:
        """Return True if requests of this version hold nothing in their pages, so that none can share them."""

    @property
    def loaded(self) -> frozenset[str]:
        """Versions that are loaded."""

    def begin(self, request_id: str, rule: DrawRule) -> None:
        """Begin a request whose tokens are drawn by a rule."""

    def end(self, request_id: str) -> None:
        """End a request."""

    def run(self, plan: StepPlan) -> Sampled:
        """Compute a plan, and draw the tokens that it requests. Running a plan twice gives equal results."""

    def take(self, request_id: str, token: int) -> None:
        """Append a drawn token to the request's answer."""


def read_version(
    runner: Runner, versions: Versions, version: AdapterVersion, later: Callable[[Callable[[], None]], None]
) -> Any:
    """Return an adapter for ``runner`` to load: from disk if its packed tensors are there, else read and packed.

    ``later`` takes a function that writes the packed tensors to disk. Raises FormatError if the adapter's files have
    changed since the version was identified.
    """
    try:
        versions.require_unchanged(version)
        kept = runner.kept(version.id)
        if kept is not None:
            return kept
        if version.parts:
            found = runner.read_mix([(Path(part.folder), weight) for part, weight in version.parts])
        else:
            found = runner.read(Path(version.folder))
        versions.require_unchanged(version)  # it may have been replaced meanwhile
        later(partial(runner.keep, version.id, found))  # holds it, also if it goes out of memory meanwhile
    except OSError as error:
        raise FormatError(f"the adapter in {version.told} cannot be read: {error}. Put its files back") from error
    return found


class Computed(NamedTuple):
    """Result of a pass: blocks of logits, and by request the likeliest tokens and the hidden states (n, width)."""

    blocks: Iterable[Tensor]
    tokens: dict[str, list[int]]
    hidden: dict[str, Tensor]


class DrawingRunner(ABC):
    """Part of a `Runner` that does not depend on the model."""

    def __init__(self) -> None:
        self.sampler = Sampler()

    @abstractmethod
    def compute(self, plan: StepPlan, greedy: Collection[str]) -> Computed:
        """Run the tokens of a plan through the model.

        Return likeliest tokens for any number of the ``greedy`` requests, at the runner's choice: one in place of
        each drafted token and one after the last. Return logits for the `wanted` tokens of all other requests, in the
        plan's order, as an iterable of blocks. A block may be computed only when it is iterated. Return hidden states
        for the tokens that `read` names.
        """

    def release(self, request_ids: Sequence[Hashable]) -> None:  # noqa: B027
        """Do nothing: all memory is in pages."""

    def keeps_apart(self, version: str | None) -> bool:
        return False

    def begin(self, request_id: str, rule: DrawRule) -> None:
        self.sampler.begin(request_id, rule)

    def end(self, request_id: str) -> None:
        self.sampler.end(request_id)

    def take(self, request_id: str, token: int) -> None:
        self.sampler.take(request_id, token)

    def run(self, plan: StepPlan) -> Sampled:
        blocks, tokens, hidden = self.compute(plan, self.sampler.greedy(plan))
        sampled = Sampled(hidden=hidden)
        for id in [id for id, states in hidden.items() if not states.isfinite().all()]:
            del hidden[id]
            sampled.failed[id] = not_finite("hidden states", id)
        for s in plan.sequences:
            if s.request_id in tokens:
                sampled.drawn[s.request_id] = [
                    DrawnToken(token) for token in _as_drafted(s.drafted, tokens[s.request_id])
                ]
        rows = iter([row for s in plan.sequences if s.request_id not in tokens for row in _rows(s)])
        for logits in blocks:
            self.sampler.fill(sampled, list(islice(rows, len(logits))), logits)
        return sampled


def wanted(sequence: PlannedSequence) -> list[int]:
    """Return the tokens of a sequence whose logits are needed, counted from its first in the plan."""
    return [] if sequence.reads_only else _asked_for(sequence)


def read(sequence: PlannedSequence) -> list[int]:
    """Return the tokens of a sequence whose hidden states are needed, counted from its first in the plan."""
    return _asked_for(sequence) if sequence.reads_only else []


def by_request(sequences: Sequence[PlannedSequence], hidden: Tensor) -> dict[str, Tensor]:
    """Return the hidden states of all `read` tokens (n, width) by request."""
    counts = {s.request_id: len(read(s)) for s in sequences}
    parts = torch.split(hidden, list(counts.values())) if counts else ()
    return {id: part for id, part in zip(counts, parts, strict=True) if len(part)}


def _asked_for(sequence: PlannedSequence) -> list[int]:
    scored = range(sequence.first_scored, sequence.first_scored + len(sequence.targets))
    n = len(sequence.tokens)
    return [*scored, *(range(n - 1 - sequence.n_drafted, n) if sequence.samples else ())]


def _rows(sequence: PlannedSequence) -> list[Row]:
    """Return the rows of logits that `wanted` requests."""
    id, drafted = sequence.request_id, sequence.drafted
    if sequence.reads_only:
        return []
    drawn = [Row(id, after=drafted[:n]) for n in range(1 + len(drafted))] if sequence.samples else []
    return [*(Row(id, target) for target in sequence.targets), *drawn]


def _as_drafted(drafted: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
    """Return the drawn tokens up to the first that differs from the draft, that one included."""
    wrong = (n for n, (guess, token) in enumerate(zip(drafted, tokens, strict=False), start=1) if guess != token)
    return tokens[: next(wrong, len(tokens))]
