"""Columns of rows that nothing reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

log = logging.getLogger(__name__)


def tell_unused(name: str, columns: Sequence[str], advice: str = "") -> None:
    """Warn that these columns of a data set are not used, if there are any. ``advice`` ends the warning."""
    if columns:
        log.warning(
            "%s: not used: %s %s%s", name, "column" if len(columns) == 1 else "columns", ", ".join(columns), advice
        )
