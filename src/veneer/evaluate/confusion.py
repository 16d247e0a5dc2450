"""Confusion matrix: how often each class was predicted as each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.errors import DataError


@dataclass(frozen=True, slots=True)
class Confusion:
    """Confusion matrix. ``counts[i][j]``: the rows of class i predicted as class j, in the order of ``labels``."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, labels: Sequence[str], right: Sequence[str], predictions: Sequence[str]) -> Confusion:
        """Return the matrix of these rows. Raises DataError for a class that is not among the labels."""
        place = {label: at for at, label in enumerate(labels)}
        unknown = sorted({*right, *predictions} - place.keys())
        if unknown:
            raise DataError(
                f"the answers {unknown[:5]} are not among the labels {list(labels)}: add them to the labels"
            )
        counts = [[0] * len(labels) for _ in labels]
        for own, given in zip(right, predictions, strict=True):
            counts[place[own]][place[given]] += 1
        return cls(tuple(labels), tuple(map(tuple, counts)))

    def n_rows(self, at: int) -> int:
        """Return the number of rows of a class."""
        return sum(self.counts[at])

    def n_predicted(self, at: int) -> int:
        """Return the number of rows predicted as a class."""
        return sum(row[at] for row in self.counts)

    def n_right(self, at: int) -> int:
        """Return the number of a class's rows that were predicted right."""
        return self.counts[at][at]
