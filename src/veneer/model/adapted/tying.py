"""Modules that share the weight of the input embeddings (a tied head), and adapters that keep them tied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

from torch import nn

from veneer.contract import MethodConfig
from veneer.model.adapted.site import Adapted, TiedFactors


def followers_of(
    tied: Sequence[str], config: MethodConfig, targets: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the modules to adapt, and the modules that use the adapter of the input embeddings.

    ``tied``: the path of the input embeddings, then the paths of the modules that share their weight. If the config
    keeps the tie, and any of these is a target, the embeddings are adapted for all of them. Otherwise the targets are
    returned unchanged, and no module follows.
    """
    if not config.extras.keeps_tie or len(tied) < 2 or not {*tied} & {*targets}:
        return targets, ()
    rest = tuple(path for path in targets if path not in tied[1:])
    return rest if tied[0] in rest else (tied[0], *rest), tuple(tied[1:])


def follow(
    modules: Mapping[str, nn.Module], name: str, embeddings: str, follower: str, keys: Mapping[str, str]
) -> None:
    """Let a module that is tied to the input embeddings (``follower``) use the factors of the embeddings' adapter. Both
    modules must be adapted already.
    """
    source, module = (cast(Adapted, modules[path]) for path in (embeddings, follower))
    turned = None if isinstance(module, nn.Embedding) else module.adapter_state.configs[name].extras.turned
    module.hold(name, TiedFactors(source.adapters[name], source.site_name, turned), keys)


def unused_tie(tied: Sequence[str], config: MethodConfig, changed: Collection[str]) -> list[str]:
    """Return a list with one sentence if a config keeps a tie that the model does not have, or adapts none of the tied
    modules.

    Otherwise the list is empty.
    """
    if not config.extras.keeps_tie or config.extras.rows:
        return []
    if len(tied) < 2:
        return ["ensure_weight_tying=True, but no module shares the weight of the input embeddings: leave it out"]
    told = ", ".join(tied)
    return [] if {*tied} & {*changed} else [f"ensure_weight_tying=True, but none of {told} is adapted: leave it out"]
