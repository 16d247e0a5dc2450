"""Quantization of a checkpoint by another library than bitsandbytes, read without that library's package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from transformers import PreTrainedModel

from veneer.model.quantized.renamed import renamer
from veneer.quant.spec import StorageSpec
from veneer.quant.stack import StackSpec
from veneer.store.checkpoint import Stored
from veneer.store.quantization import ON_DISK, BitsAndBytesConfig
from veneer.store.quantization_config import QuantizationConfig, left_dense
from veneer.store.quantized.readers import READERS
from veneer.store.quantizer import METHOD, register


class StoredQuantization(QuantizationConfig):
    """``quantization_config`` of ``from_pretrained`` that reads a checkpoint in the format of its own library.

    ``stored`` is the ``quantization_config`` of its ``config.json``. Raises ConfigError for settings that cannot be
    honoured.
    """

    is_stored: ClassVar[bool] = True

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.quant_method = cast(Any, METHOD)
        self.stored = dict(stored)
        self.layers = READERS[str(stored["quant_method"])](stored)
        self.marks = self.layers.marks
        if self.layers.quantizes_activations:
            self.note = (
                f"the checkpoint ({self.layers.label}) is meant for quantized activations: here they stay as they are, "
                "so that logits are those of its weights alone"
            )
        register()

    def to_dict(self) -> dict[str, Any]:
        """Return the ``quantization_config`` of a saved model: that of the checkpoint."""
        return dict(self.stored)

    def merged_with(self, stored: Mapping[str, Any]) -> Self:
        return self

    def left_out(self, model: PreTrainedModel, *, stored: bool) -> list[str]:
        names = self.layers.left_out
        to_own = renamer(model)  # renamings are written for the names of tensors
        own = None if names is None else [to_own(f"{name}.").removesuffix(".") for name in names]
        return left_dense(model, own, also_head=self.layers.skips_head)

    def spec_of(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec | None:
        return self.layers.spec(path, shape, dtype)

    def grouped(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        return self.layers.grouped(names)

    def stack_of(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> StackSpec | None:
        return self.layers.stack(name, shape, dtype)

    def stored_shape(self, layer: str, parts: Mapping[str, Stored]) -> tuple[int, ...]:
        return self.layers.shape(layer, parts)

    def is_stack(self, layer: str) -> bool:
        return self.layers.is_stack(layer)


def quantization_in(config: Mapping[str, Any]) -> BitsAndBytesConfig | StoredQuantization | None:
    """Return the quantization that a ``config.json`` states; None for a dense model or a format unknown here.

    Raises ConfigError for settings that cannot be honoured.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return None
    method = stored.get("quant_method")
    if method == ON_DISK:
        return BitsAndBytesConfig.from_stored(stored)
    return StoredQuantization(stored) if method in READERS else None


def stored_quantization(folder: Path) -> BitsAndBytesConfig | StoredQuantization | None:
    """Return the quantization of the model in a folder, as `quantization_in` does."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None  # transformers reads the file next and says what is wrong with it
    return quantization_in(config) if isinstance(config, Mapping) else None


def with_stored(source: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for transformers' ``from_pretrained``, completed by the ``quantization_config`` of a folder whose
    format veneer reads itself.

    A ``quantization_config`` in ``options`` is kept. Other folders and hub ids leave the options unchanged.
    """
    folder = Path(source)
    found = stored_quantization(folder) if (folder / "config.json").is_file() else None
    own = {"quantization_config": found} if isinstance(found, StoredQuantization) else {}
    return own | dict(options)
