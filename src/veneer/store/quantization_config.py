"""Interface of quantization configs for the loader of quantized models."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.errors import FormatError
from veneer.quant.spec import StorageSpec
from veneer.quant.stack import StackSpec
from veneer.records.frozen import FrozenStack, FrozenWeight
from veneer.store.checkpoint import Stored

_Spec = TypeVar("_Spec", StorageSpec, StackSpec)


class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantization of a model that `VeneerQuantizer` loads: from a dense checkpoint, quantized while it is read, or
    from a quantized one.

    ``is_stored``: the checkpoint is always quantized already.
    """

    is_stored: ClassVar[bool] = False
    marks: Collection[str] = ()
    """Last names of tensors of which every quantized layer has one."""
    note: str | None = None
    """Note on the checkpoint for its user, said once when it is loaded."""

    def merged_with(self, stored: Mapping[str, Any]) -> Self:
        """Return this config completed by the ``stored`` one of a quantized checkpoint. Raises ConfigError if the two
        contradict each other.
        """
        raise NotImplementedError

    def left_out(self, model: PreTrainedModel, *, stored: bool) -> list[str]:
        """Return the modules that stay dense, as names and patterns of transformers."""
        raise NotImplementedError

    def spec_of(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec | None:
        """Return the storage format of a layer's weight of this shape (o, i) and dtype; None if it stays dense."""
        raise NotImplementedError

    def stack_of(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> StackSpec | None:
        """Return the storage format of experts (experts, o, i) that the files hold stacked under a name; None if the
        files hold no such stack.
        """
        return None

    def grouped(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Group tensor names by quantized layer or stack of experts: ``{layer: {part: name}}``."""
        raise NotImplementedError

    def stored_shape(self, layer: str, parts: Mapping[str, Stored]) -> tuple[int, ...] | None:
        """Return the shape of the weight of a layer (o, i) or a stack (experts, o, i), inferred from its tensors in the
        files.

        Return None if they do not determine it.
        """
        raise NotImplementedError

    def is_stack(self, layer: str) -> bool:
        """Return True if the files hold experts stacked under this name."""
        return False

    def weight_name(self, layer: str) -> str:
        """Return the name that the weight of a layer, or a stack, has in a dense checkpoint."""
        return layer if self.is_stack(layer) else f"{layer}.weight"

    def weight_of(
        self, layer: str, parts: Mapping[str, Stored], shape: tuple[int, int], dtype: torch.dtype
    ) -> FrozenWeight:
        """Return the weight of a layer in the files. Raises FormatError, also if ``config.json`` leaves it dense."""
        spec = self.spec_of(layer, shape, dtype)
        if spec is None:
            raise held_quantized(layer, parts)
        bound, tensors = _read(f"{layer}.weight", spec, parts)
        return bound.bind(tensors)

    def weights_of(
        self, name: str, parts: Mapping[str, Stored], shape: tuple[int, int, int], dtype: torch.dtype
    ) -> FrozenStack:
        """Return the weights (experts, o, i) of a stack in the files. Raises FormatError, also if ``config.json``
        leaves it dense.
        """
        spec = self.stack_of(name, shape, dtype)
        if spec is None:
            raise held_quantized(name, parts)
        bound, tensors = _read(name, spec, parts)
        return bound.bind(tensors)


def _read(name: str, spec: _Spec, parts: Mapping[str, Stored]) -> tuple[_Spec, dict[str, Tensor]]:
    """Read a weight's tensors from the files. Return its storage format, with details that only the tensors show, and
    the tensors by name.

    Errors name the file and the weight.
    """
    try:
        found = cast(Any, spec).from_disk({part: tensor.read() for part, tensor in parts.items()})
        return cast("tuple[_Spec, dict[str, Tensor]]", found)
    except FormatError as error:
        raise FormatError(f"{parts[min(parts)].path}: {name}: {error}") from error


def held_quantized(layer: str, parts: Mapping[str, Stored]) -> FormatError:
    """Return the error for a layer that is dense by ``config.json`` but quantized in the files."""
    return FormatError(
        f"{parts[min(parts)].path}: {layer}: config.json leaves it dense, and the file holds it quantized "
        f"({', '.join(parts)}). Correct the modules that quantization_config leaves out, or fetch both files again"
    )


def not_run_in_codes(stack: str, parts: Mapping[str, Stored]) -> FormatError:
    """Return the error for a stack of quantized experts that the model can neither run in codes nor make dense."""
    return FormatError(
        f"{parts[min(parts)].path}: {stack}: these experts cannot stay quantized: they are split over processes, or do "
        "not follow transformers' convention. Load the model without expert parallelism, or from a dense checkpoint"
    )


def left_dense(model: PreTrainedModel, names: list[str] | None, *, also_head: bool) -> list[str]:
    """Return the modules that stay dense: those in ``names`` and those that transformers keeps in float32. The output
    head is added if ``names`` is None, or if ``also_head`` is True.
    """
    found: list[str] = HfQuantizer.get_modules_to_not_convert(
        model, names, model._keep_in_fp32_modules, add_default_skips=also_head
    )
    return found
