"""Describes the trained parameters of a model in one line."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from veneer.adapters.status import count_parameters
from veneer.errors import TrainingError


def require_trainable(model: nn.Module) -> None:
    """Raise TrainingError if no parameter of a model is trainable."""
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            "nothing would be trained: no parameter requires a gradient. Put an adapter on the model "
            "(peft_config=…, or get_peft_model), load a saved one with is_trainable=True, or unfreeze the model"
        )


def describe_trained(model: nn.Module) -> str:
    """Describe the trained modules, the number of their parameters and their precision; several adapters by name.

    For example: ``trains 3,240 of 61,240 parameters (5.29%, float32) of the adapters a, b in q_proj ×2, v_proj ×2``.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n_trained, n_all = count_parameters(model)
    modules = {re.split(r"\.(?:adapters|copies)\.|\.[^.]+$", name, maxsplit=1)[0] for name in trained}
    endings = Counter(name.rpartition(".")[2] for name in modules)
    where = ", ".join(f"{ending} ×{count}" for ending, count in sorted(endings.items()))
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained.values()}))
    adapters = sorted({found[1] for name in trained if (found := re.search(r"\.(?:adapters|copies)\.([^.]+)\.", name))})
    of = f" of the adapters {', '.join(adapters)}" if len(adapters) > 1 else ""
    share = f"{100 * n_trained / max(n_all, 1):.3g}%"
    return f"trains {n_trained:,} of {n_all:,} parameters ({share}, {dtypes}){of} in {where}"
