"""Choice of how a model without a program continues its sequences."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from veneer.errors import TargetError
from veneer.model.batch.encoded import encoded_bytes, proved_encoding
from veneer.model.batch.own_cache import KeptBytes, Way, kept_bytes, proved_way
from veneer.model.batch.paged import require_pageable
from veneer.plain.units import size

_LOG = logging.getLogger(__name__)


def way_of(model: PreTrainedModel) -> tuple[Way | None, KeptBytes]:
    """Return how a model without a program continues its sequences, and the bytes that each sequence holds.

    The first result is None if attention reads pages. Raises TargetError for a model that predicts no next token from
    token ids.
    """
    if model.config.is_encoder_decoder:
        way = proved_encoding(model)
        kept = encoded_bytes(model, way)
        _tell_own_caches(model, "an encoder reads its prompts, each in one pass", way, kept)
        return way, kept
    try:
        return None, KeptBytes(require_pageable(model))
    except TargetError as error:
        way = proved_way(model)
        kept = kept_bytes(model, way)
        _tell_own_caches(model, str(error), way, kept)
        return way, kept


def _tell_own_caches(model: PreTrainedModel, reason: str, way: Way, kept: KeptBytes) -> None:
    _LOG.warning(
        "%s keeps each sequence in a cache of transformers' own and computes it in a pass of its own. The reason: %s. "
        "A sequence takes %s, and %s for each token. After its first pass it computes %s. Prefix caching and "
        "speculation are off",
        type(model).__name__, reason, size(kept.sequence), size(kept.position), way.value,
    )  # fmt: skip
