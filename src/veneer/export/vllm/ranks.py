"""Ranks of vLLM, which rounds an adapter's rank up to the next of these when it allocates memory."""

from __future__ import annotations

from veneer.errors import ConfigError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank, but for 1


def holding(rank: int) -> int:
    """Return the smallest of `RANKS` that is at least ``rank``, which is at most 512."""
    return next(each for each in RANKS if each >= rank)


def require_rank(rank: int | None) -> None:
    """Raise ConfigError for a rank that is not one of `RANKS`."""
    if rank is not None and rank not in RANKS:
        raise ConfigError(f"--rank {rank} is not a rank of vLLM: give one of {', '.join(map(str, RANKS))}")
