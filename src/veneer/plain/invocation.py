"""First token of a row that its adapter acts on: the last occurrence of its invocation tokens (aLoRA). No torch."""

from __future__ import annotations

from collections.abc import Sequence

NEVER = 1 << 62  # behind every token


def acts_from(sequence: Sequence[int], tokens: Sequence[int]) -> int:
    """Return the index at which the last occurrence of ``tokens`` begins, or `NEVER` if there is none. If ``tokens`` is
    empty, return 0.
    """
    if not tokens:
        return 0
    wanted, n = tuple(tokens), len(tokens)
    ends = range(len(sequence) - n, -1, -1)
    return next((at for at in ends if sequence[at] == wanted[0] and tuple(sequence[at : at + n]) == wanted), NEVER)
