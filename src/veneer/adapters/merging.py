"""Folding adapters into the weights of their modules, and taking them out again, exactly."""

from __future__ import annotations

from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn

from veneer.errors import AdapterNameError, CompositionError
from veneer.model.adapted import Adapted
from veneer.model.attach import adapted_modules, adapted_places
from veneer.model.linear import AdaptedLinear
from veneer.model.state import AdapterState


@torch.no_grad()
def merge(
    model: nn.Module, state: AdapterState, names: tuple[str, ...], check_finite: bool = False, progressbar: bool = False
) -> None:
    """Fold these adapters, besides those merged already, into the base. The base's own parameters are kept aside.

    Nothing is changed where it fails. Raises AdapterNameError for unknown names, CompositionError for adapters that
    have no sum or cannot be folded, and, with ``check_finite``, for results that are not finite.
    """
    _require_foldable(model, state, names)
    before, wanted = state.merged, tuple(dict.fromkeys((*state.merged, *names)))
    unmerge(model, state)
    try:
        for path, module in track(_holding(model, wanted), "merging", disable=not progressbar):
            values = module.folded(wanted)
            if check_finite:
                _require_finite(path, values, wanted)
            module.replace(values)
    except BaseException:
        _put_back(model)
        if before:
            merge(model, state, before)
        raise
    state.merged = wanted
    _untie(model, state)


@torch.no_grad()
def unmerge(model: nn.Module, state: AdapterState) -> None:
    """Give the base its own parameters back: the very tensors that were there."""
    _put_back(model)
    state.merged = ()
    if state.untied:
        _set_tie(model, True)
        state.untied = False


def require_known(state: AdapterState, names: tuple[str, ...]) -> None:
    """Raise AdapterNameError where a name is not loaded, or there is none."""
    unknown = [name for name in names if name not in state.configs]
    if unknown or not names:
        raise AdapterNameError(
            (f"no adapter is named {', '.join(map(repr, unknown))}" if unknown else "no adapter is named or active")
            + f"; loaded: {sorted(state.configs)}"
        )


def _require_foldable(model: nn.Module, state: AdapterState, names: tuple[str, ...]) -> None:
    require_known(state, names)
    for place in adapted_places(model).values():
        stuck = [name for name in names if name in place.adapters] if not isinstance(place, Adapted) else []
        if stuck:
            raise CompositionError(
                f"adapter {stuck[0]!r} ({state.configs[stuck[0]].peft_type}) changes the residual stream and cannot be "
                "folded into a weight: keep it beside the model, or save it with save_pretrained"
            )


def _holding(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, Adapted]]:
    return [(path, m) for path, m in adapted_modules(model).items() if any(m.holds(name) for name in names)]


def _require_finite(path: str, values: dict[str, Tensor], names: tuple[str, ...]) -> None:
    broken = [key for key, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise CompositionError(
            f"merging {list(names)} gives NaN or infinity in {path}.{broken[0]}: the adapter is broken, or too large "
            "for the base's dtype. The base is unchanged."
        )


def _put_back(model: nn.Module) -> None:
    for module in adapted_modules(model).values():
        module.put_back()


def _untie(model: nn.Module, state: AdapterState) -> None:
    """Where the head no longer is the embeddings' own tensor, the config must not tie them on the next load."""
    head, table = _ends(model)
    if head is None or table is None or not getattr(cast(Any, model).config, "tie_word_embeddings", False):
        return
    if head._parameters.get("weight") is not table._parameters.get("weight"):
        _set_tie(model, False)
        state.untied = True


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    if not hasattr(model, "get_output_embeddings"):
        return None, None
    return cast(Any, model).get_output_embeddings(), cast(Any, model).get_input_embeddings()


def _set_tie(model: nn.Module, tie: bool) -> None:
    config = cast(Any, model).config
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        part.tie_word_embeddings = tie


@torch.no_grad()
def settle(model: nn.Module) -> list[str]:
    """Put plain linear layers in the place of quantized ones that were merged; returns their paths.

    They hold the merged weight in 16 (or 32) bits: rounding it to 4 bits again would lose most of a small update.
    """
    dense = [
        (path, m)
        for path, m in adapted_modules(model).items()
        if isinstance(m, AdaptedLinear) and "merged_weight" in vars(m)
    ]
    for path, module in dense:
        weight, bias = (
            cast(Tensor, vars(module)["merged_weight"]),
            cast("Tensor | None", module._parameters.get("bias")),
        )
        o, i = weight.shape
        plain = nn.Linear(i, o, bias=bias is not None, device="meta", dtype=weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        plain.train(module.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    return [path for path, _ in dense]
