"""LoRA+: B learns faster than A by a fixed ratio (Hayou, Ghosh and Yu 2024, arXiv:2402.12354, section 4)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from veneer.contract import LinearMethod
from veneer.contract.discovery import concrete
from veneer.errors import ConfigError

EMBEDDING_LR = 1e-6


def lora_plus_groups(
    named_params: Iterable[tuple[str, Tensor]],
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float = EMBEDDING_LR,
    *,
    outward: Collection[str] | None = None,
    embeddings: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Return optimizer groups over the trainable parameters: A and everything else at ``lr``, B at ``lr * ratio``.

    ``outward``: the parameters that are B, by their full names or last name parts. `outward_parameters` returns them
    for a model's adapters. If it is None, every name that a method of veneer gives its B counts. ``embeddings``: the
    full names of factors of embeddings, which learn at ``embedding_lr``. `embedding_parameters` returns them. If it is
    None, these are all factors with "embed" or "wte" in their module's path.

    Biases, norms and magnitudes are one-dimensional and not decayed. The paper advises a ratio of at least 2⁴.

    Difference from PEFT: PEFT gives every one-dimensional parameter (DoRA's magnitude, biases) the learning rate of B;
    here only B has that rate.

    Raises ConfigError if nothing is trainable or there is no B.
    """
    if ratio <= 0 or lr < 0:
        raise ConfigError(f"loraplus ratio={ratio} must be above 0 and lr={lr} at least 0")
    trainable = [(name, p) for name, p in named_params if p.requires_grad]
    b = _outward_of_methods() if outward is None else outward
    factors = {name for name, _ in trainable if name in b or name.rpartition(".")[2] in b}
    if not factors:
        raise ConfigError(
            f"none of the {len(trainable)} trainable parameters is a factor on the output side, such as LoRA's B: "
            "LoRA+ needs one. Train such a factor, or use another optimizer."
        )
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in trainable:
        embedded = _in_embedding(name) if embeddings is None else name in embeddings
        rate = embedding_lr if embedded else lr * ratio if name in factors else lr
        groups.setdefault((rate, weight_decay if p.ndim > 1 else 0.0), []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def _outward_of_methods() -> frozenset[str]:
    return frozenset().union(*(method.outward for method in concrete(LinearMethod).values()))


def _in_embedding(name: str) -> bool:
    """Return True if a parameter belongs to an adapter of an embedding: ``<path>.adapters.<adapter>.<parameter>``."""
    path, held, _ = name.partition(".adapters.")
    return bool(held) and any("embed" in part or part == "wte" for part in path.split("."))
