"""rsLoRA: the scale is alpha / √r instead of alpha / r (Kalajdzievski 2023, arXiv:2312.03732, eq. 4).

With alpha / r the update of each step shrinks as r grows; with alpha / √r forward and gradient keep their size in r.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.core.method import Params
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite

if TYPE_CHECKING:
    from veneer.core.method import LinearMethod

SWITCH = "use_rslora"
ORDER = 0


def lower(config: LinearMethod, site: LinearSite, params: Params, record: LinearDelta) -> LinearDelta:
    """The record with its scale multiplied by √r."""
    return replace(record, scale=record.scale * math.sqrt(record.rank))
