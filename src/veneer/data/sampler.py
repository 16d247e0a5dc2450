"""The order of the examples of an epoch: a function of seed and epoch alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Indices of ``lengths`` shuffled anew in each epoch.

    With ``group`` (the examples of one optimizer step), examples of like length come together: the shuffled indices
    are cut into stretches of 50 groups, each sorted by length, with the longest example of all in the first batch, so
    that running out of memory shows at once.
    """

    def __init__(self, lengths: Sequence[int], seed: int, group: int | None = None) -> None:
        self.lengths, self.seed, self.group = lengths, seed, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class FilledSampler(Sampler[int]):
    """Another sampler's indices, then those from ``start`` to ``stop``, in every epoch."""

    def __init__(self, sampler: Sampler[int], start: int, stop: int) -> None:
        self.sampler, self.rest = sampler, range(start, stop)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the other sampler, where it has any."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) + len(self.rest)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from self.rest
