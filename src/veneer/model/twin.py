"""A second model over the very same weights, so that each can carry adapters of its own."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A model of modules of its own that hold the parameters and buffers of ``model`` themselves, not copies."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(shared))
