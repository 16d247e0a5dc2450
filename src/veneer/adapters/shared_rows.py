"""Joins the rows of a batch into one row, in which a prompt that several rows share occurs only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from veneer.data.encoding import IGNORED
from veneer.model.fused.layout import LayoutMask, forked_layout
from veneer.ops.forks import Fork

MOST = 0.9  # of the batch's tokens, padding among them, that are left if it pays to put rows together
FEWEST = 4  # tokens of a prompt that is shared: a first token that all rows have is not worth it


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Batch (b, t) as one row of n tokens, without padding and without tokens that no label needs.

    Token ``predicting[i]`` of the row predicts ``labels[i]``. The score of that label belongs at index ``places[i]`` of
    the batch's flattened scores (b, t - 1).
    """

    input_ids: Int[Tensor, "1 n"]
    position_ids: Int[Tensor, "1 n"]
    layout: LayoutMask
    predicting: Int[Tensor, " m"]
    labels: Int[Tensor, " m"]
    places: Int[Tensor, " m"]


def shared_rows(
    input_ids: Int[Tensor, "b t"], mask: Int[Tensor, "b t"], labels: Int[Tensor, "b t"]
) -> SharedRows | None:
    """Join the rows of a batch. Return None if this saves less than a tenth of the tokens, or if padding splits a row.

    A row's prompt is the tokens before its first label that counts. Rows with equal prompts share them.
    """
    rows = [_Row.of(*row) for row in zip(input_ids.tolist(), mask.tolist(), labels.tolist(), strict=True)]
    if any(row is None for row in rows):
        return None
    groups: dict[tuple[int, ...], list[tuple[int, _Row]]] = {}
    for number, row in enumerate(rows):
        if row is not None and row.counted:
            key = tuple(row.ids[: row.first]) if row.first >= FEWEST else (-number - 1,)
            groups.setdefault(key, []).append((number, row))
    built = _Building(input_ids.shape[1])
    for members in groups.values():
        built.add(members)
    if not built.ids or len(built.ids) > MOST * input_ids.numel():
        return None
    return built.done(input_ids.device)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row without padding: its token ids and labels.

    ``before`` is the number of padding tokens in front of it. ``counted`` are the indices of the labels that are
    trained.
    """

    ids: list[int]
    labels: list[int]
    before: int
    counted: list[int]

    @classmethod
    def of(cls, ids: list[int], mask: list[int], labels: list[int]) -> _Row | None:
        """Return the row without its padding, or None if padding lies between its tokens."""
        real = [place for place, own in enumerate(mask) if own]
        before = real[0] if real else 0
        if real and real[-1] - before + 1 != len(real):
            return None
        own = slice(before, before + len(real))
        counted = [place for place in range(1, len(real)) if labels[before + place] != IGNORED]
        return cls(ids[own], labels[own], before, counted)

    @property
    def first(self) -> int:
        """Return the number of the prompt's tokens."""
        return self.counted[0]


@dataclass(slots=True)
class _Building:
    """The joined row under construction. ``width`` is the number of columns of the batch."""

    width: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    forks: list[Fork] = field(default_factory=list)
    predicting: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def add(self, members: Sequence[tuple[int, _Row]]) -> None:
        """Add the rows of one prompt. The prompt is added once, then the rest of each row; only the first of these is a
        plain continuation, and the others fork from the prompt.
        """
        start, n = len(self.ids), members[0][1].first
        self._extend(members[0][1].ids[:n], 0)
        forked = start
        for place, (number, row) in enumerate(members):
            own = len(self.ids)
            self._extend(row.ids[n : row.counted[-1]], n)  # the last label predicts nothing
            if len(self.ids) > self.bounds[-1]:
                self.bounds.append(len(self.ids))
            forked = len(self.ids) if place == 0 else forked
            for each in row.counted:
                self.predicting.append(start + each - 1 if each <= n else own + each - 1 - n)
                self.labels.append(row.labels[each])
                self.places.append(number * (self.width - 1) + row.before + each - 1)
        if len(self.ids) > forked:
            self.forks.append(Fork(slice(start, start + n), slice(forked, len(self.ids))))

    def _extend(self, ids: Sequence[int], position: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))

    def done(self, device: torch.device) -> SharedRows:
        """Return the finished row as tensors."""
        numbers = (self.predicting, self.labels, self.places)
        predicting, labels, places = (torch.tensor(each, device=device) for each in numbers)
        ids, positions = (torch.tensor([each], device=device) for each in (self.ids, self.positions))
        layout = forked_layout(positions, self.bounds, self.forks)
        return SharedRows(ids, positions, layout, predicting, labels, places)
