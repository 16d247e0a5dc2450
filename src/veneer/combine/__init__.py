"""Algebra of adapters: each file is one method to make one update from several. `combine` picks it by name."""

from __future__ import annotations

from veneer.combine.choose import SPARSE, WAYS, Combination, combine

__all__ = ["SPARSE", "WAYS", "Combination", "combine"]
