"""Time that a test waits for something that must come: longer than it takes on any machine, whatever else runs there.

No test fails since the machine is busy. A wait ends as soon as it may; the limit only tells a wait for something that
never comes, and is below the time that a test may take (``timeout`` in pyproject.toml, ``PYTEST_TIMEOUT`` in .ci/run).
In CI nothing else runs, and a wait for something that never comes is to end before the run is ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PATIENCE = 200.0 if "CI" in os.environ else 600.0  # seconds


def wait_until(reached: Callable[[], object]) -> None:
    """Return when ``reached()`` is true; AssertionError after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, f"not reached within {PATIENCE:g} s"
        time.sleep(0.01)
