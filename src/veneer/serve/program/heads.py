"""Classification heads in adapters of decoders, applied to a prompt's last hidden state."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from veneer.contract import MethodConfig
from veneer.contract.keys import copies_of, place_of
from veneer.errors import FormatError
from veneer.model.blueprint.names import CLASSIFIERS
from veneer.store.adapter.files import read_tensors

SERVED = "SEQ_CLS"
"""Task of adapters whose head scores a whole prompt."""


@dataclass(frozen=True, slots=True)
class ScoreHead:
    """Linear layer from a hidden state to the scores of classes: weight (classes, width) and bias (classes) or None."""

    weight: Tensor
    bias: Tensor | None

    def scores(self, state: list[float]) -> Tensor:
        """Return the scores of the classes (classes,), in float32, for a hidden state."""
        return torch.nn.functional.linear(torch.tensor(state), self.weight, self.bias)


def read_head(folder: Path) -> ScoreHead:
    """Return the head in an adapter's folder. Raises FormatError if there is none, or if it is not a linear layer."""
    tensors = read_tensors(folder)
    found = {place_of(key, ()).end: key for key in once(tensors) if is_of_head(key)}
    if "weight" not in found or tensors[found["weight"]].ndim != 2 or set(found) - {"weight", "bias"}:
        raise FormatError(
            f"the adapter in {folder} is for {SERVED} and holds no linear head ({' or '.join(CLASSIFIERS)}): save it "
            "with its head (modules_to_save)"
        )
    parts = {name: tensors[key].float() for name, key in found.items()}
    return ScoreHead(parts["weight"], parts.get("bias"))


def once(keys: Collection[str]) -> list[str]:
    """Return the keys with one key for each tensor, because PEFT's wrapper may store one tensor under two keys."""
    return [key for key in keys if not any(own in keys for own in copies_of(key))]


def is_of_head(key: str) -> bool:
    """Return True if a key belongs to a classification head."""
    return place_of(key, ()).path.rpartition(".")[2] in CLASSIFIERS


def without_head(config: MethodConfig) -> MethodConfig:
    """Return the config without its classification head, for a decoder that has no such head."""
    if config.task_type != SERVED:
        return config
    saved = tuple(name for name in config.modules_to_save or () if name not in CLASSIFIERS)
    return replace(config, task_type="CAUSAL_LM", modules_to_save=saved or None)
