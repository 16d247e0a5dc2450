"""Layers by role, such as attention's q and v, and their names in a model, for targets of adapters."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from veneer.errors import DescriptionError
from veneer.model.blueprint.decoder import Decoder
from veneer.model.blueprint.describe import describe
from veneer.model.blueprint.names import ELSEWHERE, JOINED
from veneer.model.blueprint.parts import Linear


def names_for(model: object, targets: Iterable[str]) -> tuple[str, ...]:
    """Return the targets, with roles replaced by the names of their layers in this model.

    A joined layer has the roles of all its outputs. If the model has no description, a role means every name that it
    has in any of transformers' models. Other targets stay unchanged.
    """
    wanted = tuple(targets)
    decoder = _described(model) if any(target in ELSEWHERE for target in wanted) else None
    found: list[str] = []
    for target in wanted:
        if target not in ELSEWHERE:
            found.append(target)
        else:
            found += ELSEWHERE[target] if decoder is None else role_names(decoder, target)
    return tuple(dict.fromkeys(found))


def role_names(decoder: Decoder, role: str) -> tuple[str, ...]:
    """Return ends of paths that match, within a decoder's blocks, exactly the layers of a role."""
    meant = [(block.path, linear) for block in decoder.blocks for linear in block.linears if has_role(linear, role)]
    others = {_last(o.path) for block in decoder.blocks for o in block.linears if not has_role(o, role)}
    return tuple(
        dict.fromkeys(_last(x.path) if _last(x.path) not in others else x.path[len(block) + 1 :] for block, x in meant)
    )


def has_role(linear: Linear, role: str) -> bool:
    """Return True if a layer computes the output of a role, alone or joined with others."""
    return linear.role == role or role in JOINED.get(linear.role, ())


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _described(model: object) -> Decoder | None:
    """Return the description of a decoder, or None if one of its blocks is not fully described."""
    try:
        decoder = describe(model) if isinstance(model, PreTrainedModel) else None
    except DescriptionError:
        return None
    return None if decoder is None or any(block.strange for block in decoder.blocks) else decoder
