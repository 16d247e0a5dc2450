"""Stop tokens: the token ids at which an answer ends, and its least and largest length. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.serve.schedule.outputs import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """Rule for the end of an answer: at one of ``eos_ids`` or ``stop_ids`` if it has ``min_tokens``, or at
    ``max_tokens``.

    ``eos_ids`` are those of the model and its chat template, ``stop_ids`` those that a request adds.
    """

    max_tokens: int
    min_tokens: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()

    def stops(self, token: int) -> bool:
        """Return True if a token is one that ends answers."""
        return token in self.eos_ids or token in self.stop_ids

    def ends(self, n_tokens: int, token: int) -> FinishReason | None:
        """Return the reason why an answer of ``n_tokens`` ends with ``token``; None if it continues."""
        if n_tokens >= self.min_tokens and self.stops(token):
            return "stop"
        return "length" if n_tokens >= self.max_tokens else None

    def reported(self, reason: FinishReason | None, token: int) -> int | None:
        """Return the token if it ended the answer and is one of ``stop_ids`` alone; None otherwise."""
        return token if reason == "stop" and token not in self.eos_ids else None
