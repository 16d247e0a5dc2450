"""Merging adapters into the weights of their modules, and exact unmerging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.contract import MethodConfig
from veneer.errors import AdapterNameError, CompositionError
from veneer.model.adapted.embedding import input_embeddings
from veneer.model.adapted.site import Adapted
from veneer.model.adapted.state import AdapterState
from veneer.model.adapted.token_rows import require_rows_agree
from veneer.model.attach.attach import adapted_modules, adapted_places
from veneer.model.quantized.packed_linear import is_packed
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.quantized.stack import CodedStack
from veneer.model.sharded.made_dense import make_dense
from veneer.model.sharded.sharding import require_whole


@torch.no_grad()
def merge(
    model: nn.Module, state: AdapterState, names: tuple[str, ...], check_finite: bool = False, progressbar: bool = False
) -> None:
    """Merge these adapters into the base, in addition to those already merged. The base's own parameters are kept.

    On an error nothing is changed. Raises AdapterNameError for unknown names. Raises CompositionError for adapters that
    have no sum or cannot be merged and, with ``check_finite``, for non-finite results.
    """
    with merging_with(model, state, names) as wanted:
        for path, module in track(holding(model, wanted), "merging", disable=not progressbar):
            require_rows_agree(path, module, wanted)
            values = module.folded(wanted)
            if "weight" in values:
                values |= _folded_already(model, module, wanted)
            if check_finite:
                require_finite(path, values, wanted)
            module.replace(values)


@contextmanager
def merging_with(model: nn.Module, state: AdapterState, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Enter a context in which the caller merges adapters: at its start nothing is merged. Yield the names to merge,
    those merged before included.

    On an error the model is as before. Raises the errors of `require_foldable`.
    """
    require_whole(model, "merging")
    _require_unpacked(model)
    require_foldable(model, state, names)
    before, wanted = state.merged, tuple(dict.fromkeys((*state.merged, *names)))
    unmerge(model, state)
    try:
        yield wanted
    except BaseException:
        put_back_all(model)
        if before:
            merge(model, state, before)
        raise
    state.merged = wanted
    untie(model, state)


@torch.no_grad()
def unmerge(model: nn.Module, state: AdapterState) -> None:
    """Restore the base's own parameters: the same tensors as before merging."""
    put_back_all(model)
    state.merged = ()
    if state.untied:
        _set_tie(model, True)
        state.untied = False


def require_known(state: AdapterState, names: tuple[str, ...]) -> None:
    """Raise AdapterNameError if a name is not loaded, or if no name is given."""
    unknown = [name for name in names if name not in state.configs]
    if unknown or not names:
        raise AdapterNameError(
            (f"no adapter is named {', '.join(map(repr, unknown))}" if unknown else "no adapter is named or active")
            + f"; loaded: {sorted(state.configs)}"
        )


def require_everywhere(adapter: object, config: MethodConfig) -> None:
    """Raise CompositionError if an adapter's update depends on the input, or acts only after invocation tokens."""
    if config.input_dependent:
        raise CompositionError(
            f"the update of adapter {str(adapter)!r} ({config.peft_type}) depends on the input tokens, so no fixed "
            "weight has its effect: keep the adapter unmerged"
        )
    if config.invocation_tokens:
        raise CompositionError(
            f"the adapter {str(adapter)!r} acts from its invocation tokens on, but a merged weight acts on all tokens: "
            "keep the adapter unmerged"
        )


def require_foldable(model: nn.Module, state: AdapterState, names: tuple[str, ...]) -> None:
    """Raise AdapterNameError for unknown names, CompositionError for adapters that cannot be merged into a weight."""
    require_known(state, names)
    for name in names:
        require_everywhere(name, state.configs[name])
    for place in adapted_places(model).values():
        stuck = [] if place.folds else [name for name in names if name in place.adapters]
        if stuck:
            raise CompositionError(
                f"adapter {stuck[0]!r} ({state.configs[stuck[0]].peft_type}) changes the residual stream and cannot be "
                "folded into a weight: keep it beside the model, or save it with save_pretrained"
            )


def _folded_already(model: nn.Module, module: Adapted, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the merged weight of a module that is tied to ``module``, so that both stay tied. Return an empty dict if
    none was merged.
    """
    own = module._parameters.get("weight")
    done = (m for m in adapted_modules(model).values() if own is not None and m.originals.get("weight") is own)
    return next(({"weight": cast(Tensor, m._parameters["weight"])} for m in done if m.changes_as(module, names)), {})


def _require_unpacked(model: nn.Module) -> None:
    """Raise CompositionError if a layer has only a packed weight, which merging cannot replace."""
    path = next((path for path, module in model.named_modules() if is_packed(module)), None)
    if path is not None:
        raise CompositionError(
            f"{path} has only a packed weight, which an engine shares: save the adapter, and merge it into a base that "
            "is loaded anew"
        )


def holding(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, Adapted]]:
    """Return the modules on which any of these adapters holds tensors, by path."""
    return [(path, m) for path, m in adapted_modules(model).items() if any(m.holds(name) for name in names)]


def require_finite(path: str, values: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """Raise CompositionError if a merged value is not finite."""
    broken = [key for key, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise CompositionError(
            f"merging {list(names)} gives NaN or infinity in {path}.{broken[0]}: the adapter is broken, or too large "
            "for the base's dtype. The base is unchanged."
        )


def put_back_all(model: nn.Module) -> None:
    """Restore the own parameters of every adapted module, which merging has replaced."""
    for module in adapted_modules(model).values():
        module.put_back()


def untie(model: nn.Module, state: AdapterState) -> None:
    """Mark head and embeddings as untied in the config if they are no longer one tensor, so that the next load keeps
    both tensors.
    """
    head, table = _ends(model)
    if head is None or table is None or not getattr(cast(Any, model).config, "tie_word_embeddings", False):
        return
    merged_codes = getattr(getattr(head, "kept", None), "merged_weight", None)
    if merged_codes is not None or head._parameters.get("weight") is not table._parameters.get("weight"):
        _set_tie(model, False)
        state.untied = True


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    if not hasattr(model, "get_output_embeddings"):
        return None, None
    return cast(Any, model).get_output_embeddings(), input_embeddings(model)


def _set_tie(model: nn.Module, tie: bool) -> None:
    config = cast(Any, model).config
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        part.tie_word_embeddings = tie


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Make a quantized model with merged layers a plain one: all its weights become dense, in the original dtype.

    Rounding a merged weight to 4 bits again would lose most of a small update. Parameters that were widened to float32
    for training (norms, embeddings, head) return to the model's dtype.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    stacks = {path: m for path, m in model.named_modules() if isinstance(m, CodedStack)}
    merged = {path: m.kept.merged_weight for path, m in adapted_modules(model).items() if path in layers}
    merged |= {path: stack.merged for path, stack in stacks.items()}
    if not any(weight is not None for weight in merged.values()):
        return
    dtype = next(iter((*layers.values(), *stacks.values()))).spec.dtype
    make_dense(cast(PreTrainedModel, model), weights=merged)
    _narrow(model, dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast float32 parameters to a 16-bit model's dtype, except those that transformers keeps in float32."""
    kept = {*getattr(model, "_keep_in_fp32_modules_strict", ()), *getattr(model, "_keep_in_fp32_modules", ())}
    for path, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not kept & set(path.split(".")):
            parameter.data = parameter.data.to(dtype)
