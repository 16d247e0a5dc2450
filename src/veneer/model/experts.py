"""Experts of a mixture: torch groups their products only if the size of every row is a multiple of 16 bytes."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ROW_BYTES = 16
STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""The names under which transformers keeps the weights of all experts of a layer in one parameter (n, o, i)."""


def fit_experts(model: nn.Module) -> None:
    """Run experts one by one if grouped products do not support their widths; transformers has both ways.

    Otherwise torch would raise in the first forward pass. Experts that run one by one are logged.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or "grouped_mm" not in model.get_experts_implementation().values():
        return
    widths = sorted(
        {
            n
            for name, weight in model.named_parameters()
            if weight.ndim == 3 and name.rpartition(".")[2] in STACKS
            for n in weight.shape[1:]
            if n * weight.element_size() % ROW_BYTES
        }
    )
    if widths:
        model.set_experts_implementation("eager")
        log.warning(
            "%s: experts run one by one, which takes longer: grouped products take rows of a multiple of %d bytes, and "
            "theirs hold %s numbers",
            config.model_type, ROW_BYTES, " and ".join(map(str, widths)),
        )  # fmt: skip
