"""Finds, by a trial, the layout of packed rows for which a model computes exact results."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from veneer.data.collating import Layout
from veneer.errors import ConfigError
from veneer.model.batch.invocation import PACKED, acting_tokens
from veneer.model.quantized.quant_linear import computing_dtypes
from veneer.model.sites.structure import evaluation

log = logging.getLogger(__name__)

FIRST, SECOND = 5, 6


def packing_layout(model: nn.Module) -> Layout:
    """Return the layout in which packed rows have exactly the logits of their sequences computed separately.

    Flash attention kernels take one row with restarting positions. Other models are tested: two short sequences run
    packed and apart. Some families ignore restarting positions (learned positions computed from the mask, ALiBi,
    recurrent layers, virtual tokens). Their rows are unpacked before the forward pass, which is as exact but saves no
    time. Raises ConfigError if the active adapter has invocation tokens, which belong to a row.
    """
    if acting_tokens(model):
        raise ConfigError(PACKED)
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation and "flash" in implementation:
        return "flat"
    if keeps_packed_apart(model):
        return "positions"
    log.warning(
        "%s does not keep packed sequences apart: packed rows are unpacked into padded ones before the forward pass",
        type(model).__name__,
    )
    return "padded"


@torch.no_grad()
def keeps_packed_apart(model: nn.Module) -> bool:
    """Return True if a sequence packed behind another has the same logits as alone, for two different
    first sequences.
    """
    try:
        with evaluation(model):
            vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            second = (torch.arange(SECOND) * 3 + 2) % vocabulary
            first, another = ((torch.arange(FIRST) * step + 1) % vocabulary for step in (2, 5))
            packed, other = (_logits(model, before, second)[FIRST:] for before in (first, another))
            # In front of a row of the same length, for products of other sizes round otherwise.
            alone = _logits(model, second, first)[:SECOND]
    except (TypeError, RuntimeError, ValueError) as error:
        log.info("%s fails on positions that start again within a row: %s", type(model).__name__, error)
        return False
    leak = (packed - other).abs().max() / alone.std()
    drift = (packed - alone).norm() / alone.norm()  # not the largest: in bfloat16 some logit of many is far off
    exact = computing_dtypes(model) <= {torch.float32, torch.float64}
    return bool(leak <= (1e-4 if exact else 2e-2)) and bool(drift <= (1e-3 if exact else 1e-1))


def _logits(model: nn.Module, *sequences: Tensor) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.cat(sequences)[None].to(device)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])[None].to(device)
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[0].float()
