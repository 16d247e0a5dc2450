"""Names of a model's parameters in GGUF files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gguf
from torch import Tensor

from veneer.store.gguf.family import GgufFamily

_TOWERS = ("vision_tower", "vision_model", "multi_modal_projector", "audio_tower", "embed_vision")


def gguf_name(family: GgufFamily, config: Any, name: str, prefix: str = "model") -> str | None:
    """Return llama.cpp's name for a parameter of a model; None if it has none.

    ``prefix`` is the backbone's prefix in the model's parameter names, such as ``model``. ``name`` may be with or
    without it.
    """
    names = _name_map(family.architecture, config.num_hidden_layers)
    for form in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        found = names.get_name(form, (".weight", ".bias"))
        if found is not None:
            return found
    return None


@functools.lru_cache(maxsize=4)
def _name_map(architecture: str, n_layers: int) -> gguf.TensorNameMap:
    """Return gguf's name map, cached because building it takes tens of milliseconds."""
    key = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    return gguf.get_tensor_name_map(key, n_layers)


def places_of(family: GgufFamily, config: Any, name: str, prefix: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Return the names of the file's tensors that hold a parameter. With each comes the function that selects, from the
    parameter, the values of that tensor.
    """
    parts = list(family.parts(name))
    if parts:
        layer = next(piece for piece in name.split(".") if piece.isdigit())
        return [(f"blk.{layer}.{leaf}", part) for leaf, part in parts]
    found = gguf_name(family, config, name, prefix)
    return [(found, _whole)] if found else []


def text_name(name: str | None) -> str | None:
    """Return a parameter's name in the text-only model; None for vision towers and the like."""
    if name is None or any(f".{part}." in f".{name}" for part in _TOWERS):
        return None
    return name.replace("language_model.", "", 1)


def leaf_of(name: str) -> str:
    """Return a tensor's name without its layer's prefix: ``attn_q.weight`` of ``blk.0.attn_q.weight``."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name


def _whole(tensor: Tensor) -> Tensor:
    return tensor
