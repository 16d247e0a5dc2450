"""Facts about adapters and models on disk, read from their headers; no weight is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from veneer.contract import MethodConfig
from veneer.contract.file import WEIGHTS_FILE
from veneer.contract.places import modules_in
from veneer.errors import DescriptionError
from veneer.model.blueprint.decoder import Decoder
from veneer.model.blueprint.describe import describe_config
from veneer.model.blueprint.parts import TensorPart
from veneer.model.blueprint.summary import summary
from veneer.model.blueprint.tensor_parts import part_of
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_headers
from veneer.store.checkpoint import Checkpoint, Stored
from veneer.store.quantization_config import QuantizationConfig
from veneer.store.stored_quantization import StoredQuantization, quantization_in

NF4_BITS = 4.127  # Dettmers et al. 2023 (arXiv:2305.14314): 4 + 8/64 + 32/(64·256) bits with double quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """Facts about an adapter: its config, and the contents of its file."""

    config: MethodConfig
    n_parameters: int
    n_bytes: int
    dtypes: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about a model: its config as a mapping, its description, and parameters by part.

    ``nbytes_4bit`` is its size with NF4 linear layers. ``described`` is empty if there is no description.
    ``quantization`` tells the format of a quantized model.
    """

    config: Mapping[str, Any]
    described: Mapping[str, str]
    parameters: Mapping[str, int]
    n_bytes: int
    nbytes_4bit: int | None
    dtypes: tuple[str, ...]
    quantization: str | None = None


def adapter_facts(folder: Path) -> AdapterFacts:
    """Return the facts of an adapter folder. Raises FormatError if it is not an adapter or is damaged."""
    config = read_config(folder)
    tensors = read_headers(folder)
    return AdapterFacts(
        config=config,
        n_parameters=_count(tensors.values()),
        n_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        dtypes=_dtypes(tensors.values()),
        modules=tuple(modules_in(config, tensors)),
    )


def model_facts(folder: Path) -> ModelFacts:
    """Return the facts of a model folder. Raises FormatError if weights are missing or damaged."""
    checkpoint = Checkpoint.open(folder)
    tensors = checkpoint.tensors
    counts: Counter[str] = Counter()
    made_from = AutoConfig.from_pretrained(folder)
    decoder = _described(made_from)
    config = made_from.to_dict()
    quantization = quantization_in(config)
    values = _values(tensors, quantization)
    parts = {name: part_of(name, decoder) for name in values}
    for name, n_values in values.items():
        counts[parts[name]] += n_values
    is_dense = config.get("quantization_config") is None
    return ModelFacts(
        config=config,
        described=summary(decoder) if decoder else {},
        parameters=dict(counts.most_common()),
        n_bytes=checkpoint.nbytes,
        nbytes_4bit=sum(_bytes_4bit(t, parts[name]) for name, t in tensors.items()) if is_dense else None,
        dtypes=_dtypes(tensors.values()),
        quantization=None if is_dense else _label(config["quantization_config"], quantization),
    )


def _values(tensors: Mapping[str, Stored], quantization: QuantizationConfig | None) -> dict[str, int]:
    """The number of values of each tensor; a quantized weight counts with those that its codes stand for."""
    found = {name: _count([tensor]) for name, tensor in tensors.items()}
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
    """The decoder that a config makes, without its weights; None where it makes something else."""
    try:
        return describe_config(config)
    except DescriptionError:
        return None


def _bytes_4bit(tensor: Stored, part: TensorPart) -> int:
    in_4bit = len(tensor.shape) == 2 and part in ("attention", "feed-forward", "other")
    return round(_count([tensor]) * NF4_BITS / 8) if in_4bit else 2 * _count([tensor])


def _count(tensors: Iterable[Stored]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _dtypes(tensors: Iterable[Stored]) -> tuple[str, ...]:
    return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
