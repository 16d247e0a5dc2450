"""Combination of adapters: each file makes one update from several by one method. `combine` chooses it by name."""

from __future__ import annotations

from veneer.combine.choose import SPARSE, WAYS, Combination, combine

__all__ = ["SPARSE", "WAYS", "Combination", "combine"]
