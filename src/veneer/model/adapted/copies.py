"""Whole parameters that an adapter trains: ``modules_to_save`` and biases, each adapter with copies of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer.contract import MethodConfig
from veneer.errors import TargetError
from veneer.model.adapted.site import Adapted, add_copy
from veneer.model.blueprint.names import CLASSIFIERS
from veneer.model.cut_weight import whole
from veneer.model.quantized.packed_linear import PackedLinear
from veneer.model.quantized.stack import CodedStack
from veneer.plain.nearest import nearest


def copied_parameters(
    modules: Mapping[str, nn.Module], tied: Sequence[str], config: MethodConfig, adapted: set[str]
) -> dict[str, list[str]]:
    """Return the parameters that a config trains whole, by module path. ``adapted``: the paths that the method adapts.

    Raises TargetError if ``modules_to_save`` names no module, or one that cannot be trained.
    """
    found: dict[str, list[str]] = {}
    for path, module in _saved_modules(modules, config):
        _require_trainable(path, module)
        found[path] = [name for name, value in own_parameters(module) if value is not None]
    biases = config.extras.biases
    for path, module in modules.items():
        wanted = biases == "all" or (biases == "adapted" and path in adapted)
        if wanted and path not in found and dict(own_parameters(module)).get("bias") is not None:
            found[path] = ["bias"]
    if config.extras.keeps_tie and any("weight" in found.get(path, ()) for path in tied):
        for path in tied:
            found[path] = list(dict.fromkeys((*found.get(path, ()), "weight")))
    return found


def whole_parameters(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters of these modules, by path. Raises TargetError if one of them cannot be trained."""
    found: dict[str, list[str]] = {}
    for path in paths:
        _require_trainable(path, modules[path], "target_modules")
        found[path] = [name for name, value in own_parameters(modules[path]) if value is not None]
    return found


def add_copies(model: nn.Module, name: str, wanted: Mapping[str, list[str]], widen: bool) -> None:
    """Give an adapter trained copies of parameters, which start at the base's values.

    If ``widen``, 16-bit copies are float32. The modules must be adapted already. If the config keeps a tie, tied
    parameters share one copy.
    """
    one: dict[int, nn.Parameter] = {}
    for path, parameters in wanted.items():
        module = model.get_submodule(path)
        for key in parameters:
            value = module._parameters[key]
            if isinstance(module, Adapted) and value is not None:
                wide = torch.promote_types(value.dtype, torch.float32) if widen else value.dtype
                shared = one.get(id(value)) if module.adapter_state.configs[name].extras.keeps_tie else None
                own = nn.Parameter(whole(value.detach()).to(wide, copy=True)) if shared is None else shared
                one[id(value)] = own
                add_copy(module, name, key, own, frozen=False)


def own_parameters(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Return the parameters that a module itself holds, without those of its children. For an adapted module, these are
    the base's parameters, not the adapters'.
    """
    packed = [("weight", module.like)] if isinstance(module, PackedLinear) else []
    return [*packed, *module._parameters.items()]


def _saved_modules(modules: Mapping[str, nn.Module], config: MethodConfig) -> Iterator[tuple[str, nn.Module]]:
    wanted = config.extras.modules
    present = [name for name in CLASSIFIERS if any(_is(path, name) for path in modules)]
    for name in wanted:
        if name in CLASSIFIERS and name not in present and present:
            continue
        matched = [path for path in modules if _is(path, name)]
        if not matched:
            hints = nearest(name.rpartition(".")[2], (path.rpartition(".")[2] for path in modules))
            raise TargetError(
                f"modules_to_save names {name!r}, which matches no module of the model"
                + (f" (nearest: {', '.join(hints)})" if hints else "")
            )
    roots = saved_paths(modules, wanted)
    for path, module in modules.items():
        if any(path == root or path.startswith(f"{root}.") for root in roots):
            yield path, module


def saved_paths(paths: Iterable[str], names: Collection[str]) -> list[str]:
    """Return the paths of the modules that ``modules_to_save`` names."""
    return [path for path in paths if any(_is(path, name) for name in names)]


def _is(path: str, name: str) -> bool:
    """Return True if a path ends with the name, even within a word ("norm" matches "ln_norm"), which is PEFT's rule."""
    return path.endswith(name)


def _require_trainable(path: str, module: nn.Module, field: str = "modules_to_save") -> None:
    layer = hasattr(module, "frozen_format") and not isinstance(module, PackedLinear)
    if layer or isinstance(module, CodedStack):
        raise TargetError(
            f"{field} names {path!r}, which is quantized and cannot be trained whole: list it in "
            "llm_int8_skip_modules when you load the model, or adapt it with "
            f"{'target_modules' if layer else 'target_parameters'}"
        )
    kept = [name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]
    if kept:
        raise TargetError(
            f"{field} names {path!r}, which has the running buffers {kept}: an adapter can hold a copy of parameters "
            "only. Leave it out"
        )
