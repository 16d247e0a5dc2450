"""Packing: several sequences in one row, independent of one another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from datasets import Dataset

from veneer.data.encoding import IGNORED
from veneer.errors import ConfigError, DataError

_TRAIN_MORE = "Train on more of each row, such as all of it: in a recipe by `data.train_on: everything`"


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return indices in bins whose lengths sum to at most ``capacity``, by best-fit decreasing.

    Items are placed from the longest to the shortest, each into the bin with the least room that still holds it. There
    are at most about 11/9 as many bins as the fewest possible (Johnson 1973). Bins, and the items of each, are ordered
    by their first index, so that a shuffled set stays shuffled.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (space left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] > capacity:
            raise ConfigError(
                f"a sequence of {lengths[item]} tokens does not fit in a row of {capacity}: cut it, or raise max_length"
            )
        at = bisect_left(room, (lengths[item], -1))
        space, chosen = room.pop(at) if at < len(room) else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        insort(room, (space - lengths[item], chosen))
    return sorted(sorted(members) for members in bins)


def pack(dataset: Dataset, capacity: int, *, split: bool = False) -> Dataset:
    """Return rows of up to ``capacity`` tokens made of whole sequences, with their ``seq_lengths``.

    If ``split``, too long sequences are cut into several; otherwise all must fit. Raises DataError if no trained token
    is left: the first token of each sequence or piece has nothing to predict it.
    """
    rows = [(row["input_ids"], row["labels"]) for row in dataset]
    if split:
        rows = [piece for row in rows for piece in _pieces(*row, capacity)]
    rows = [row for row in rows if any(label != IGNORED for label in row[1])]
    if not rows:
        raise DataError(
            f"no trained token is left in rows of {capacity} tokens, and nothing would be learned. "
            + (
                "Raise max_length: each trained token begins a piece, where nothing predicts it"
                if split
                else _TRAIN_MORE
            )
        )
    bins = best_fit([len(ids) for ids, _ in rows], capacity)
    return Dataset.from_list(
        [
            {
                "input_ids": [token for i in members for token in rows[i][0]],
                "labels": [label for i in members for label in rows[i][1]],
                "seq_lengths": [len(rows[i][0]) for i in members],
            }
            for members in bins
        ]
    )


def _pieces(ids: list[int], labels: list[int], capacity: int) -> list[tuple[list[int], list[int]]]:
    starts = range(0, len(ids), capacity)
    return [(ids[s : s + capacity], [IGNORED, *labels[s + 1 : s + capacity]]) for s in starts]
