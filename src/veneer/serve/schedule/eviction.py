"""Eviction: the value of cached pages and idle adapters; the least valuable is evicted first. No torch.

The value of an entry is Greedy-Dual-Size with Frequency (Cherkasova 1998, HPL-98-69R1): uses times seconds to recreate
it, divided by its bytes, plus the age at its last use. The age is the value of the entry evicted last. An entry that
was used often long ago is therefore evicted in the end.
"""

from __future__ import annotations


class Eviction:
    """Value of the entries of a memory. Each value includes the memory's age, which only grows.

    ``token_seconds`` is the measured time to compute a prompt's token.
    """

    def __init__(self, token_seconds: float = 2e-3) -> None:
        self.token_seconds = token_seconds
        self.age = 0.0

    def of(self, n_uses: int, seconds: float, n_bytes: int) -> float:
        """Return the value of an entry of ``n_bytes`` that is used now for the ``n_uses``-th time and took ``seconds``
        to compute or load.
        """
        return self.age + n_uses * seconds / max(1, n_bytes)

    def went(self, worth: float) -> None:
        """Advance the age: an entry of this value has been evicted."""
        self.age = max(self.age, worth)
