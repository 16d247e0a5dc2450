"""Rows of embeddings that an adapter trains (``trainable_token_indices``): their tables, and the modules that share
them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from veneer.contract.extras import Extras
from veneer.errors import CompositionError, TargetError
from veneer.model.adapted.copies import own_parameters
from veneer.model.adapted.site import Adapted, TokenRows, swap_reading
from veneer.model.quantized.packed_linear import PackedLinear
from veneer.plain.nearest import nearest


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Table with trained rows: its path, the rows' indices, and the modules that read the same tensor (a tied head).

    ``is_drawn``: the rows start from random values.
    """

    path: str
    indices: tuple[int, ...]
    followers: tuple[str, ...] = ()
    is_drawn: bool = False


def row_places(
    modules: Mapping[str, nn.Module], ends: Sequence[str], extras: Extras, taken: Collection[str]
) -> tuple[RowPlace, ...]:
    """Return the embedding tables of which a config trains single rows, which are given in ``extras.rows``.

    ``ends``: the input embeddings and the modules tied to them. ``taken``: modules that the config adapts or trains
    whole.

    Modules tied to the input embeddings use the embeddings' rows unless they are given other rows, as in PEFT. Raises
    TargetError if a name matches nothing, a module that is not a table, or a taken one, and if an index is outside the
    table.
    """
    wanted = extras.rows
    if not wanted:
        return ()
    source = ends[0] if ends else None
    indices: dict[str, tuple[int, ...]] = {}
    for name, rows in wanted.items():
        for path in _meant(name, modules, source):
            _require_rows(path, modules[path], rows, taken, extras.rows_field)
            indices[path] = rows
    if extras.keeps_tie and any(indices.get(path) != indices.get(ends[0]) for path in ends if path in indices):
        raise TargetError(
            f"ensure_weight_tying=True, but trainable_token_indices gives { {p: indices.get(p) for p in ends} } to "
            f"modules that share one weight: give {ends[0]} alone, or all of them the same"
        )
    tied = ends if source in indices else ()
    if len({indices[path] for path in tied if path in indices}) != 1:
        return tuple(RowPlace(path, rows, is_drawn=extras.draws_rows) for path, rows in indices.items())
    followers = tuple(path for path in tied if path != source)
    return tuple(
        RowPlace(path, rows, followers if path == source else (), extras.draws_rows)
        for path, rows in indices.items()
        if path not in followers
    )


def add_rows(model: nn.Module, name: str, places: Sequence[RowPlace], values: bool, widen: bool) -> None:
    """Give an adapter its rows with their initial values, or uninitialized if ``values`` is False.

    The modules must be adapted already.
    """
    for place in places:
        table = cast(Adapted, model.get_submodule(place.path))
        weight = cast(Tensor, table._parameters["weight"]).detach()
        dtype = torch.promote_types(weight.dtype, torch.float32) if widen else weight.dtype
        index = torch.tensor(place.indices, device=weight.device)
        start = weight[index] if values else weight.new_empty(len(place.indices), weight.shape[1])
        if values and place.is_drawn:
            start = torch.randn(start.shape)
        rows = TokenRows(place.indices, start.to(weight.device, dtype))
        _holder(table, name).token_adapter = rows
        for path in place.followers:  # not registered there: it is trained, moved and saved in one place
            vars(_holder(cast(Adapted, model.get_submodule(path)), name))["token_adapter"] = rows
        for path in (place.path, *place.followers):
            module = cast(Adapted, model.get_submodule(path))
            if not isinstance(module, nn.Embedding):  # who reads the weight of a head past its forward sees the rows
                swap_reading(module, "weight")


def require_rows_agree(path: str, module: Adapted, names: Sequence[str]) -> None:
    """Raise CompositionError if two of the adapters train the same row of a table, or if one trains single rows and
    another adapts the table.
    """
    rows = module.token_rows(names)
    indices = [index for each in rows for index in each.indices]
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise CompositionError(
            f"adapters {list(names)} each train row {twice[0]} of {path}: activate one of them at a time"
        )
    adapting = [name for name in names if name in module.adapters]
    if rows and adapting:
        raise CompositionError(
            f"adapter {adapting[0]!r} adapts {path}, and another adapter trains single rows of it: activate one at a "
            "time"
        )


def _holder(module: Adapted, name: str) -> nn.Module:
    if name not in module.copies:
        module.copies[name] = nn.Module()
    return module.copies[name]


def _meant(name: str | None, modules: Mapping[str, nn.Module], source: str | None) -> list[str]:
    found = [source] if name is None else [path for path in modules if path.endswith(name)]
    if not found or found == [None]:
        hints = nearest(str(name).rpartition(".")[2], (path.rpartition(".")[2] for path in modules))
        raise TargetError(
            f"trainable_token_indices names {name or 'the input embeddings'!r}, which the model does not have"
            + (f" (nearest: {', '.join(hints)})" if hints else "")
        )
    return cast("list[str]", found)


def _require_rows(path: str, module: nn.Module, rows: tuple[int, ...], taken: Collection[str], field: str) -> None:
    weight = dict(own_parameters(module)).get("weight")
    quantized = hasattr(module, "frozen_format") and not isinstance(module, PackedLinear)
    if not isinstance(module, (nn.Embedding, nn.Linear, PackedLinear)) or weight is None or quantized:
        raise TargetError(
            f"{field} asks for rows of {path!r}, a {type(module).__name__}: single rows can be trained only in an "
            "embedding, or in a linear output head that is not quantized"
        )
    if path in taken:
        raise TargetError(
            f"{field} asks for rows of {path!r}, which target_modules or modules_to_save names too: drop one"
        )
    beyond = [index for index in rows if index >= weight.shape[0]]
    if beyond:
        raise TargetError(
            f"{field} holds {beyond[:5]} for {path!r}, which has rows 0 to {weight.shape[0] - 1}"
            ": if these are new tokens, call resize_token_embeddings before attaching"
        )
