"""Modules that share the weight of the input embeddings (a tied head), and adapters that keep them tied."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.core.method import MethodConfig
from veneer.model.adapted import Adapted, TiedFactors
from veneer.model.embedding import input_embeddings


def tied_modules(model: nn.Module) -> tuple[str, ...]:
    """The paths of the input embeddings and, behind them, of the modules that share their weight; none without them."""
    table = input_embeddings(model) if isinstance(model, PreTrainedModel) else None
    if table is None:
        return ()
    weight = _own_weight(table)
    modules = {p: m for p, m in model.named_modules() if p and ".adapters" not in p and ".copies" not in p}
    first = [path for path, module in modules.items() if module is table]
    sharing = (p for p, m in modules.items() if weight is not None and _own_weight(m) is weight)
    return tuple(dict.fromkeys((*first, *sharing)))


def _own_weight(module: nn.Module) -> Tensor | None:
    return module.unmerged("weight") if isinstance(module, Adapted) else module._parameters.get("weight")


def followers_of(
    model: nn.Module, config: MethodConfig, targets: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The targets, in which the embeddings stand for all that share their weight, and the others that do.

    There are none where the config does not keep the tie, or none of the tied modules is a target.
    """
    tied = tied_modules(model) if config.keeps_tie else ()
    if len(tied) < 2 or not {*tied} & {*targets}:
        return targets, ()
    rest = tuple(path for path in targets if path not in tied[1:])
    return rest if tied[0] in rest else (tied[0], *rest), tied[1:]


def follow(model: nn.Module, name: str, followers: Sequence[str]) -> None:
    """Let an adapter of the input embeddings act on the modules that share their weight, all of them adapted."""
    for path in followers:
        source = cast(Adapted, model.get_submodule(tied_modules(model)[0]))
        module = cast(Adapted, model.get_submodule(path))
        turned = not isinstance(module, nn.Embedding)
        module.adapters[name] = TiedFactors(source.adapters[name], source.site_name, turned)


def unused_tie(model: nn.Module, config: MethodConfig, changed: Collection[str]) -> list[str]:
    """A sentence where a config keeps a tie that is not there, or that nothing it changes belongs to."""
    if not config.keeps_tie or getattr(config, "trained_rows", None):
        return []
    tied = tied_modules(model)
    if len(tied) < 2:
        return ["ensure_weight_tying=True, but no module shares the weight of the input embeddings: leave it out"]
    told = ", ".join(tied)
    return [] if {*tied} & {*changed} else [f"ensure_weight_tying=True, but none of {told} is adapted: leave it out"]
