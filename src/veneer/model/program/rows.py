"""Rows of one pass of a program: tokens of many sequences, each with its adapter version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from veneer.model.blueprint.parts import Attention
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.paged_attention import Heads
from veneer.ops.pairs import Segments
from veneer.ops.state.conv import ConvKernel, GatedInput
from veneer.ops.state.delta import DeltaInput, DeltaWeights


class PagedCache(Protocol):
    """Pages that store the keys and values of all attention layers, the inputs of short convolutions, and the states of
    scans.
    """

    def append(self, layer: int, keys: Tensor, values: Tensor, rows: Any) -> None:
        """Write the keys and values (n, kv_heads, width) of a pass's rows to their positions in the pages."""

    def append_turned(
        self, layer: int, heads: Heads, rows: Any, tables: tuple[Tensor, Tensor], *, interleaved: bool
    ) -> None:
        """Rotate queries and keys (n, heads, width) in place by ``tables``, and write keys and values as `append` does.

        The keys' memory may hold anything afterwards.
        """

    def attend(
        self, layer: int, queries: Tensor, rows: Any, part: Attention, extra: tuple[Tensor | None, Tensor | None]
    ) -> Tensor:
        """Return the attention of queries (n, heads, width) to their sequences, as (n, heads · width).

        The rows' own keys must have been appended. ``extra`` holds the bias (heads, positions) of `Alibi.bias`, and the
        sinks (heads,) of the softmax, both float32.
        """

    def convolve(self, layer: int, given: GatedInput, weights: ConvKernel, rows: Any) -> Tensor:
        """Return the short convolution (n, width) of a pass's rows, whose inputs are written into the pages."""

    def scan(self, layer: int, given: DeltaInput, weights: DeltaWeights, rows: Any) -> Tensor:
        """Return the gated delta rule (n, width) of a pass's rows, whose states are written into the pages."""


@dataclass(slots=True)
class PassRows:
    """Rows of one pass: ``positions`` (n,) for embeddings and rotations, and ``rows``, the ``cache``'s data for them.

    ``versions`` are the adapters that occur, ``runs`` the rows of each. ``kept`` are the rows whose logits are wanted,
    ``picked`` those whose likeliest token is wanted, ``read`` those whose hidden states are wanted; each has its own
    ``…_runs``. The likeliest tokens are written to ``tokens`` (-1 if a logit is not finite). ``written``, if it is a
    list, receives the keys and values of every layer. ``segments`` say how rows are divided by version for low-rank
    pairs, if that was computed before the pass, see `Interpreter.segments`.
    """

    cache: PagedCache
    rows: Any
    positions: Tensor
    versions: tuple[str, ...]
    runs: AdapterRuns
    kept: Tensor
    kept_runs: AdapterRuns
    picked: Tensor
    picked_runs: AdapterRuns
    tokens: Tensor
    read: Tensor
    read_runs: AdapterRuns
    written: list[tuple[Tensor, Tensor]] | None = None
    segments: Mapping[tuple[int, AdapterRuns], Segments] = field(default_factory=dict)
    _turns: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def turns(self, tables: tuple[Tensor, Tensor], rotation: Any) -> tuple[Tensor, Tensor]:
        """Return the cos and sin of the rows (1, n, half), by the tables of a rotation."""
        if rotation not in self._turns:
            cos, sin = (table[self.positions][None] for table in tables)
            self._turns[rotation] = (cos, sin)
        return self._turns[rotation]
