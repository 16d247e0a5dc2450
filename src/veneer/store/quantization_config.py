"""Face of a quantization config for the loader of quantized models."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.core.frozen import FrozenWeight
from veneer.errors import FormatError
from veneer.quant.spec import StorageSpec
from veneer.store.checkpoint import Stored


class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantization that `VeneerQuantizer` loads: of a dense checkpoint while it is read, or as it is stored.

    ``is_stored``: the checkpoint is always quantized already.
    """

    is_stored: ClassVar[bool] = False
    marks: Collection[str] = ()
    """Last names of tensors of which every quantized layer has one."""
    note: str | None = None
    """Note on the checkpoint for its user, said once when it is loaded."""

    def merged_with(self, stored: Mapping[str, Any]) -> Self:
        """Return the config of a quantized checkpoint for which this one is asked. Raises ConfigError."""
        raise NotImplementedError

    def left_out(self, model: PreTrainedModel, *, stored: bool) -> list[str]:
        """Return the modules that stay dense, as names and patterns of transformers."""
        raise NotImplementedError

    def spec_of(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec | None:
        """Return the storage format of a layer's weight of this shape (o, i) and dtype; None if it stays dense."""
        raise NotImplementedError

    def grouped(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the tensors of each layer that is stored quantized: their names by part."""
        raise NotImplementedError

    def stored_shape(self, layer: str, parts: Mapping[str, Stored]) -> tuple[int, int] | None:
        """Return the shape (o, i) of the weight of a layer in the files, as its tensors tell it; None if they do
        not.
        """
        raise NotImplementedError

    def weight_of(
        self, layer: str, parts: Mapping[str, Stored], shape: tuple[int, int], dtype: torch.dtype
    ) -> FrozenWeight:
        """Return the weight of a layer in the files. Raises FormatError, also if ``config.json`` leaves it dense."""
        spec = self.spec_of(layer, shape, dtype)
        if spec is None:
            raise held_quantized(layer, parts)
        try:
            bound, tensors = spec.from_disk({part: tensor.read() for part, tensor in parts.items()})
        except FormatError as error:
            raise FormatError(f"{parts[min(parts)].path}: {layer}.weight: {error}") from error
        return bound.bind(tensors)


def held_quantized(layer: str, parts: Mapping[str, Stored]) -> FormatError:
    """Return the error for a layer that ``config.json`` leaves dense."""
    return FormatError(
        f"{parts[min(parts)].path}: {layer}: config.json leaves it dense, and the file holds it quantized "
        f"({', '.join(parts)}). Correct the modules that quantization_config leaves out, or fetch both files again"
    )


def left_dense(model: PreTrainedModel, names: list[str] | None, *, also_head: bool) -> list[str]:
    """Return the modules that stay dense: those named, and the head if none are named or with ``also_head``."""
    found: list[str] = HfQuantizer.get_modules_to_not_convert(
        model, names, model._keep_in_fp32_modules, add_default_skips=also_head
    )
    return found
