"""A machine whose rates are known, and the bytes that a process starts with: nothing is measured.

The tests of the measurements are in ``unit/plan``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def know_the_machine(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    from veneer.plan import report, start
    from veneer.plan.machine import Rates

    replace(Rates, "_once", lambda rates, key, measure: 1e-9)
    replace(Rates, "is_new", False)
    replace(start, "known_start", lambda: 300_000_000)
    replace(report, "known_start", lambda: 300_000_000)
