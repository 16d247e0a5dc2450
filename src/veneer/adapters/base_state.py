"""Weights of the base model under their own names, while adapters are attached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from veneer.errors import AdapterNameError, FormatError
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_places


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the ``state_dict()`` of the plain model, without any adapter's tensors.

    Raises AdapterNameError while adapters are merged.
    """
    _require_unmerged(model)
    held = tuple(f"{path}.{kind}." if path else f"{kind}." for path in adapted_places(model) for kind in _HOLDERS)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(held)}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True
) -> _IncompatibleKeys:
    """Load these values into the base and leave the adapters unchanged. Return the missing and the unexpected keys.

    Raises FormatError, before anything is changed, for tensors of another shape. With ``strict``, it also raises
    FormatError for missing or unexpected keys. Raises AdapterNameError while adapters are merged.
    """
    own = get_base_model_state_dict(model)
    missing, unexpected = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    problems = [
        f"shape {tuple(state_dict[key].shape)}, but the model needs {tuple(value.shape)}: {key}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    if strict:
        problems += [f"missing: {key}" for key in missing] + [f"unexpected: {key}" for key in unexpected]
    if problems:
        raise FormatError(f"the weights do not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    nn.Module.load_state_dict(model, {key: state_dict[key] for key in own if key in state_dict}, strict=False)
    return _IncompatibleKeys(missing, unexpected)


_HOLDERS = ("adapters", "copies")


def _require_unmerged(model: nn.Module) -> None:
    state = vars(model).get("adapter_state")
    if isinstance(state, AdapterState) and state.merged:
        raise AdapterNameError(
            f"the weights of the base are not its own while {list(state.merged)} are merged: call unmerge_adapter()"
        )
