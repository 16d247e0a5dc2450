"""Models and configs of GGUF files, built from the families' tables: the inverse of the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from veneer.errors import FormatError
from veneer.store.gguf.config import GgufContents, mended_config
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.fields import FACTOR_TENSORS
from veneer.store.gguf.names import leaf_of, places_of
from veneer.store.gguf.registry import laid_out_family
from veneer.store.gguf.rows import joined, places_of_rows


def rebuilt_model(
    reader: GGUFReader,
    contents: GgufContents,
    ids: Mapping[str, int],
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
) -> Any:
    """Return the model of a file whose family has ``reads=False``.

    ``ids`` are special tokens by transformers' names. ``on_progress`` receives the number of parameters filled. Raises
    FormatError if the model cannot compute the file's contents, and for missing or unplaced tensors.
    """
    family, config = rebuilt_config(contents, ids)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    stored = {tensor.name: tensor for tensor in reader.tensors}
    used = _fill(model, family, config, stored, on_progress)
    if unplaced := sorted(set(stored) - used - set(FACTOR_TENSORS)):
        raise FormatError(
            f"it holds the tensors {unplaced}, for which transformers' {type(model).__name__} has no place: it would "
            "compute another model"
        )
    return model


def rebuilt_config(contents: GgufContents, ids: Mapping[str, int]) -> tuple[GgufFamily, Any]:
    """Return the family of a file by `laid_out_family`, and the model's config. Raises as `rebuilt_model`."""
    family = laid_out_family(contents.architecture, contents.pairs)
    if family is None:
        raise FormatError(f"no table describes files of the architecture {contents.architecture!r}")
    made = AutoConfig.for_model(
        family.model_types[0], num_hidden_layers=contents.pairs["block_count"], pad_token_id=None
    )
    for name, value in ids.items():
        setattr(made, name, value)
    for name, computed in family.only.items():
        if getattr(made, name) not in computed:
            setattr(made, name, computed[0])  # no key holds it: the library's default is not what the runtime computes
    made.tie_word_embeddings = "output.weight" not in contents.shapes
    return family, mended_config(made, contents, family)


def _fill(
    model: Any, family: GgufFamily, config: Any, stored: Mapping[str, Any], on_progress: Callable[[int, int], None]
) -> set[str]:
    """Load values into every parameter. Return the names of the tensors that were read."""
    used: set[str] = set()
    missing = []
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for done, (name, parameter) in enumerate(parameters.items(), 1):
            on_progress(done, len(parameters))
            places = [target for target, _ in places_of(family, config, name, model.base_model_prefix)]
            if not places or not all(target in stored for target in places):
                missing.append(name)
                continue
            used.update(places)
            parts = [(each, _in_order(family, config, each, _values(stored[each]))) for each in places]
            parameter.copy_(joined(family, name, tuple(parameter.shape), parts))
    if missing:
        raise FormatError(f"it lacks the tensors of {missing[:5]}; it is not a whole model")
    return used


def _values(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def _in_order(family: GgufFamily, config: Any, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor with its rows in transformers' order."""
    return tensor[places_of_rows(family, leaf_of(name), len(tensor), config)]
