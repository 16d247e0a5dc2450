"""Facts about a model folder, read from its headers and described by transformers; no weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import DescriptionError
from veneer.model.blueprint.decoder import Decoder
from veneer.model.blueprint.describe import describe_config
from veneer.model.blueprint.summary import summary
from veneer.model.blueprint.tensor_parts import part_of
from veneer.store.checkpoint import Checkpoint, Stored
from veneer.store.counted import ModelFacts, bytes_4bit, dtypes_of, n_values_of, sums
from veneer.store.model_config import model_config
from veneer.store.quantization_config import QuantizationConfig
from veneer.store.stored_quantization import StoredQuantization, quantization_in


def model_facts(folder: Path) -> ModelFacts:
    """Return the facts of a model folder. Raises FormatError if weights are missing or damaged."""
    checkpoint = Checkpoint.open(folder)
    tensors = checkpoint.tensors
    made_from = model_config(folder)
    decoder = _described(made_from)
    config = made_from.to_dict()
    quantization = quantization_in(config)
    values = _values(tensors, quantization)
    parts = {name: part_of(name, decoder) for name in values}
    is_dense = config.get("quantization_config") is None
    return ModelFacts(
        config=config,
        described=summary(decoder) if decoder else {},
        parameters=sums(values, parts),
        n_bytes=checkpoint.nbytes,
        nbytes_4bit=sum(bytes_4bit(t, parts[name]) for name, t in tensors.items()) if is_dense else None,
        dtypes=dtypes_of(tensors.values()),
        quantization=None if is_dense else _label(config["quantization_config"], quantization),
    )


def _values(tensors: Mapping[str, Stored], quantization: QuantizationConfig | None) -> dict[str, int]:
    """Return each tensor's number of values. A quantized weight counts its decoded values."""
    found = {name: n_values_of([tensor]) for name, tensor in tensors.items()}
    for layer, parts in quantization.grouped(tensors).items() if quantization else ():
        assert quantization is not None
        shape = quantization.stored_shape(layer, {part: tensors[name] for part, name in parts.items()})
        if shape is not None:
            for name in parts.values():
                del found[name]
            found[quantization.weight_name(layer)] = math.prod(shape)
    return found


def _label(stored: Mapping[str, Any], quantization: QuantizationConfig | None) -> str:
    if isinstance(quantization, StoredQuantization):
        return quantization.layers.label
    return f"{stored.get('quant_method')}, {stored.get('bnb_4bit_quant_type') or 'int8'}"


def _described(config: Any) -> Decoder | None:
    """Return the decoder that a config describes, without weights; None if the config describes another kind of
    model.
    """
    try:
        return describe_config(config)
    except DescriptionError:
        return None
