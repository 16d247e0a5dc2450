"""Loading of a model block by block: each block is passed to a function as soon as its weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.disk.safetensors import DTYPE_NAMES
from veneer.model.blueprint.describe import blocks_of
from veneer.model.quantized.module import CodedModule
from veneer.store.checkpoint import Checkpoint, Stored

EachBlock = Callable[[PreTrainedModel, nn.Module], None]
"""Takes a model that is being loaded, and one of its blocks whose weights are there."""

_EACH_BLOCK: ContextVar[EachBlock | None] = ContextVar("_EACH_BLOCK", default=None)
_AT_ONCE = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def blocks_handed_on(take: EachBlock | None) -> Iterator[None]:
    """Call ``take`` with each block of the models that are loaded in this context."""
    token = _EACH_BLOCK.set(take)
    try:
        yield
    finally:
        _EACH_BLOCK.reset(token)


class Unread:
    """Tensor of a checkpoint that is read into its own memory, and only when transformers' loader slices it.

    It is not a view of a mapped file, because the file's pages would count as used memory until the file is closed.
    """

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def read(self) -> Tensor:
        """Return the whole tensor."""
        return self.stored.read()

    def get_dtype(self) -> str:
        """Return the dtype's name as in safetensors files."""
        return DTYPE_NAMES[self.stored.dtype]

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.stored.shape)


def unread(files: Sequence[str] | None) -> dict[str, Unread] | None:
    """Return the tensors of a model's safetensors files, without reading their values, inside a `blocks_handed_on`
    context.

    Return None outside such a context, and for pickles, which can only be read as a whole.
    """
    if _EACH_BLOCK.get() is None or not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    return {name: Unread(stored) for name, stored in Checkpoint.from_files(files).tensors.items()}


def load_in_turn(load: Callable[..., Any], model: PreTrainedModel, tensors: Any, *rest: Any) -> Any:
    """Call transformers' loader. Each block is passed to the function of `blocks_handed_on` once all its weights are
    loaded, and before the next tensor is read.
    """
    take = _EACH_BLOCK.get()
    if take is None or tensors is None:
        return load(model, tensors, *rest)
    waiting, before = _Waiting(model, take), os.environ.get(_AT_ONCE)
    os.environ[_AT_ONCE] = "1"  # threads would read tensors of later blocks meanwhile
    try:
        result = load(model, {name: _InTurn(tensor, waiting) for name, tensor in tensors.items()}, *rest)
    finally:
        del os.environ[_AT_ONCE]
        os.environ |= {} if before is None else {_AT_ONCE: before}
    waiting.hand_on()
    return result


class _Waiting:
    """Blocks of a model that is being loaded, in order, and the function ``take`` that gets each block once its weights
    are complete.
    """

    def __init__(self, model: PreTrainedModel, take: EachBlock) -> None:
        self._model, self._take = model, take
        self._blocks = list(blocks_of(model)[1])

    def hand_on(self) -> None:
        """Pass each block to ``take``, in order, until the first block whose weights are not yet complete."""
        while self._blocks and _is_loaded(self._blocks[0]):
            block = self._blocks.pop(0)
            self._take(self._model, block)
            for parameter in block.parameters():
                cast(Any, parameter)._is_hf_initialized = True  # transformers would draw new values


class _InTurn:
    """Tensor of a checkpoint. Before each read it gives the blocks that are complete to the function of
    `blocks_handed_on`.

    This happens within a read because transformers' loader hides errors raised in its later steps, and would so hide
    the function's.
    """

    def __init__(self, tensor: Any, waiting: _Waiting) -> None:
        self._tensor, self._waiting = tensor, waiting

    def __getitem__(self, index: Any) -> Any:
        self._waiting.hand_on()
        return self._tensor[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def _is_loaded(block: nn.Module) -> bool:
    coded = (module.weight for module in block.modules() if isinstance(module, CodedModule))
    return not any(weight.is_meta for weight in (*block.parameters(), *coded))
