"""Sampler whose order in an epoch depends on the seed and the epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import BatchSampler, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Sampler of the indices of ``lengths``, reshuffled in each epoch.

    If ``group`` (the number of examples in an optimizer step) is given, examples of similar length are together. The
    shuffled indices are cut into parts of 50 groups, each sorted by length. The longest example of all is in the first
    batch, so that running out of memory shows at once.
    """

    def __init__(self, lengths: Sequence[int], seed: int, group: int | None = None) -> None:
        self.lengths, self.seed, self.group = lengths, seed, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class FilledSampler(Sampler[int]):
    """Sampler that yields another sampler's indices, and then those from ``start`` to ``stop``, in every epoch."""

    def __init__(self, sampler: Sampler[int], start: int, stop: int) -> None:
        self.sampler, self.rest = sampler, range(start, stop)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the other sampler, if it has one."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) + len(self.rest)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from self.rest


class EvenBatches(BatchSampler):
    """Batch sampler for ``n`` processes, which take batches of ``batch_size`` in turn.

    If the last rows do not fill a batch for each process, every one of these rows is repeated equally often over the
    last ``n`` batches. Means over the processes are then means over these rows.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, n: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.n = n

    def __len__(self) -> int:
        return self.n * -(-len(self.sampler) // (self.batch_size * self.n))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        left = len(order) % (self.batch_size * self.n)
        yield from _cut(order[: len(order) - left], self.batch_size)
        size = last_size(left, self.n)
        yield from _cut(order[len(order) - left :] * (size * self.n // max(left, 1)), size)


def last_size(left: int, n: int) -> int:
    """Return the smallest batch size with which ``n`` equal batches hold each of ``left`` rows equally often."""
    return left // math.gcd(left, n)


def _cut(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), max(size, 1)):
        yield list(order[start : start + size])
