"""Parameters of a base checkpoint by the model's names, independent of their names and storage format in the files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.disk.safetensors import StoredTensor
from veneer.errors import FormatError
from veneer.model.quantized.renamed import listed_experts, renamer
from veneer.model.quantized.stack import as_maps, map_shape
from veneer.records.frozen import FrozenWeight
from veneer.records.linear import BLOCK_VALUES
from veneer.store.checkpoint import Checkpoint
from veneer.store.stored_quantization import stored_quantization

Spec = tuple[torch.dtype, tuple[int, ...]]


class BaseWeights:
    """Reader of a checkpoint for a model without storage. Quantized weights are returned dense, in float32.

    Parameters in ``resized`` are cut to the model's rows, or padded with zero rows.

    Raises FormatError if a parameter of the model is not in the files under any of its possible names.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, resized: Collection[str] = ()) -> None:
        self._resized = frozenset(resized)
        self._tensors = Checkpoint.open(folder)
        self._shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        self._groups = _tied(model)
        self._prefix = f"{model.base_model_prefix}."
        self._quantization = stored_quantization(folder)
        self._half = _half_of(folder)
        self._coded = self._coded_weights()
        held = {part for parts in self._coded.values() for part in parts.values()}
        names = [*(name for name in self._tensors.tensors if name not in held), *self._coded]
        to_own = renamer(model)
        self._renamed = {to_own(name): name for name in names}
        known = self._renamed | {name: name for name in names}
        self._stacks = {n: listed.stored for n, listed in listed_experts(model, self._shapes, known).items()}
        self._names = frozenset(names)
        self._stored = {name: self._find(names) for names in self._groups for name in names}
        self._modules = dict(model.named_modules())
        self._parts = {name for stacks in self._stacks.values() for names in stacks for name in names} | held
        self._model_names = {stored: name for name, stored in reversed(self._stored.items())}

    def groups(self) -> list[list[str]]:
        """Return the parameters' names in groups; the names of one group share a tied tensor."""
        return self._groups

    def others(self) -> list[str]:
        """Return the names of tensors in the files that belong to no parameter of the model: buffers, other heads."""
        taken = set(self._stored.values()) | self._parts
        known = self._shapes.keys() | {name.removeprefix(self._prefix) for name in self._shapes}
        return [name for name in self._tensors.tensors if name not in taken and name not in known]

    @staticmethod
    def own(module: nn.Module) -> list[str]:
        """Return the names of the parameters that a module owns directly."""
        return [key for key, value in module._parameters.items() if value is not None]

    def stored_name(self, name: str, own: bool) -> str:
        """Return the name of a parameter in the result: its name in the files.

        If ``own`` is False, a tied parameter that the files store under the other's name keeps the model's name. Its
        copy is then written separately.
        """
        stored = self._stored[name]
        is_this = own or stored in (name, name.removeprefix(self._prefix))
        return stored if is_this else name

    def model_name(self, name: str) -> str | None:
        """Return the model's name for a tensor of the result, or None if the tensor is no parameter of the model."""
        return self._model_names.get(name, name if name in self._stored else None)

    def spec(self, name: str, dtype: torch.dtype | None) -> Spec:
        """Return dtype and shape of a parameter in the result."""
        if name in self._stacks and self._stored[name] == name:
            return dtype or self._dtype_of(self._stacks[name][0][0]), self._shapes[name]
        if self._stored[name] in self._coded:
            return dtype or self._half, self._shapes[name]
        stored = self._tensors.tensors[self._stored[name]]
        same = slice(1 if name in self._resized else 0, None)
        if stored.shape[same] != self._shapes[name][same]:
            raise FormatError(
                f"{stored.name} has the shape {stored.shape} in the files, the model needs {self._shapes[name]}: give "
                "the files of this base, or correct its config.json"
            )
        return dtype if dtype and stored.dtype.is_floating_point else stored.dtype, self._shapes[name]

    def passed_spec(self, stored: str, dtype: torch.dtype | None) -> Spec:
        """Return dtype and shape of a tensor that is copied unchanged."""
        tensor = self._tensors.tensors[stored]
        return dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype, tensor.shape

    def read(self, name: str) -> Tensor:
        """Return a parameter by the model's name."""
        value, shape = self._read(self._stored[name], self._shapes[name]), self._shapes[name]
        if name not in self._resized or value.shape == shape:
            return value
        n_kept = min(len(value), shape[0])
        return torch.cat([value[:n_kept], value.new_zeros(shape[0] - n_kept, *shape[1:])])

    def read_wide(self, name: str) -> Tensor:
        """Return the parameter that `read` returns, in float32. The tensor in the files' dtype is never whole in
        memory.
        """
        blocks = self.blocks(self._stored[name])
        first = next(blocks)
        if len(first) == self._shapes[name][0]:
            return first.float()
        out = torch.empty(self._shapes[name])
        end = 0
        for block in itertools.chain((first,), blocks):
            start, end = end, end + len(block)
            out[start:end] = block
        return out

    def read_stored(self, stored: str) -> Tensor:
        """Return a tensor by its name in the result."""
        name = self._model_names.get(stored, stored)
        return self.read(name) if name in self._stored else self._tensors.read(stored)

    def blocks(self, stored: str) -> Iterator[Tensor]:
        """Yield the rows (k, …) of the tensor that `read_stored` returns, in order. A dense tensor is never whole in
        memory.
        """
        name = self._model_names.get(stored, stored)
        held = self._stored.get(name, stored)  # tied tensors that are written apart lie in the files once
        if (held in self._stacks and held not in self._names) or self._is_stack(held):
            yield from self._experts(held)
        elif held not in self._names or name in self._resized or held in self._coded:
            yield from in_blocks(self.read_stored(stored))
        else:
            yield from self._tensors.blocks(held, BLOCK_VALUES)

    def _coded_weights(self) -> dict[str, dict[str, str]]:
        """Return the names of the tensors that store each quantized weight: for each weight, a mapping such as codes
        and scales.
        """
        if self._quantization is None:
            return {}
        groups = self._quantization.grouped(self._tensors.tensors)
        return {self._quantization.weight_name(layer): parts for layer, parts in groups.items()}

    def _is_stack(self, stored: str) -> bool:
        """Return True if the files hold experts stacked in codes under this name."""
        return stored in self._coded and self._quantization is not None and self._quantization.is_stack(stored)

    def _read(self, stored: str, shape: tuple[int, ...]) -> Tensor:
        if stored not in self._names or self._is_stack(stored):
            return self._stacked(stored)
        return self._decoded(stored, shape) if stored in self._coded else self._tensors.read(stored)

    def _decoded(self, stored: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Decode a quantized weight to float32. If ``shape`` is None, the shape is inferred from its tensors."""
        parts = {part: self._tensors.tensors[name] for part, name in self._coded[stored].items()}
        assert self._quantization is not None
        layer = stored.removesuffix(".weight")
        size = cast("tuple[int, int]", shape or self._quantization.stored_shape(layer, parts))
        return self._quantization.weight_of(layer, parts, size, self._half).dense(torch.float32)

    def _dtype_of(self, stored: str) -> torch.dtype:
        return self._half if stored in self._coded else self._tensors.tensors[stored].dtype

    def _stacked(self, name: str) -> Tensor:
        """Stack one tensor for each expert, (n, out, in). If one parameter holds both gate and up, gate comes first."""
        first = name if self._is_stack(name) else self._stacks[name][0][0]
        out = torch.empty(self._shapes[self._model_names.get(name, name)], dtype=self._dtype_of(first))
        for number, expert in enumerate(self._experts(name)):
            out[number] = expert[0]
        return out

    def _experts(self, name: str) -> Iterator[Tensor]:
        """Yield the tensors of `_stacked` one expert, (1, out, in), at a time."""
        if self._is_stack(name):
            yield from self._coded_experts(name)
            return
        for halves in zip(*self._stacks[name], strict=True):
            yield torch.cat([self._expert(stored) for stored in halves])[None]

    def _coded_experts(self, stored: str) -> Iterator[Tensor]:
        """Yield each expert of a stack of codes, decoded and in the model's layout."""
        assert self._quantization is not None
        name = self._model_names[stored]
        path, _, key = name.rpartition(".")
        module = self._modules[path]
        size = cast("tuple[int, int, int]", map_shape(module, key))
        parts = {part: self._tensors.tensors[each] for part, each in self._coded[stored].items()}
        weights = self._quantization.weights_of(stored, parts, size, self._half)
        for number in range(size[0]):
            yield as_maps(module, weights.expert(number).dense(self._half)[None])

    def _expert(self, stored: str) -> Tensor:
        return self._decoded(stored).to(self._half) if stored in self._coded else self._tensors.read(stored)

    def _find(self, names: list[str]) -> str:
        """Return the first of ``names`` that the files hold, in the files' own spelling.

        A name in the files may lack or have the inner model's prefix, or be one that transformers renames. Raises
        FormatError if the files hold none.
        """
        for name in names:
            for candidate in (name, name.removeprefix(self._prefix), f"{self._prefix}{name}"):
                if candidate in self._names:
                    return candidate
            if name in self._renamed:
                return self._renamed[name]
            if name in self._stacks:
                return name
        raise FormatError(
            f"the base's files have no tensor {names[0]!r}: they are incomplete, or name their tensors otherwise than "
            "the model does. Load the base with from_pretrained and use merge_and_unload() instead."
        )


@dataclass(frozen=True)
class WeightInFile:
    """Frozen weight that is read for each product, so that none stays in memory."""

    shape: tuple[int, int]
    read: Callable[[], FrozenWeight]

    @property
    def nbytes(self) -> int:
        return 0

    def matmul(self, x: Tensor) -> Tensor:
        return self.read().matmul(x)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self.read().matmul_t(dy)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.read().dense(dtype)


def is_copy(stored: StoredTensor, rows: Iterable[Tensor]) -> bool:
    """Return True if a stored tensor equals the blocks of rows ``rows``, after a cast to their dtype."""
    blocks = stored.blocks(BLOCK_VALUES)
    return all(torch.equal(mine.to(own.dtype), own) for mine, own in zip(blocks, rows, strict=True))


def in_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the rows (k, …) of a tensor, in order, in blocks of about `BLOCK_VALUES` values.

    A tensor without rows is one block.
    """
    if tensor.ndim < 2 or not tensor.numel():
        yield tensor
    else:
        yield from torch.split(tensor, max(1, BLOCK_VALUES // tensor[0].numel()))


def _tied(model: PreTrainedModel) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def _half_of(folder: Path) -> torch.dtype:
    """Return the 16-bit dtype of a dequantized base: the dtype in its config if that has 16 bits, else bfloat16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return cast(torch.dtype, dtype) if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
