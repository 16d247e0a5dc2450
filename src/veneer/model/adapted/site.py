"""Common part of adapted modules: parameters of adapters, trained copies of own parameters, merging."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.contract.keys import copy_key
from veneer.errors import CompositionError
from veneer.model.adapted.holder import Holder, tensors_of
from veneer.model.adapted.routing import BASE, Routing
from veneer.model.adapted.state import AdapterState
from veneer.model.inplace import InPlace, change_class, mixin_of, restore_class
from veneer.records.token_rows import put_rows


class TokenRows(nn.Module):
    """Trained rows (n, d) at the ``indices`` of an embedding table, with PEFT's names on disk."""

    def __init__(self, indices: tuple[int, ...], values: Tensor) -> None:
        super().__init__()
        self.indices = indices
        self.trainable_tokens_delta = nn.Parameter(values)

    def index(self, device: torch.device) -> Tensor:
        """Return the indices on a device."""
        kept = cast("Tensor | None", vars(self).get("_index"))
        if kept is None or kept.device != device:
            kept = vars(self)["_index"] = torch.tensor(self.indices, device=device)
        return kept


class TiedFactors(nn.Module):
    """An adapter of the tied embeddings (``source``), as this module uses it.

    It registers nothing: the factors are trained, moved and saved in their source. A head reads the table transposed:
    ``turned`` returns the factors of the transposed update.
    """

    def __init__(
        self, factors: nn.Module, source: str, turned: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None
    ) -> None:
        super().__init__()
        self.source, self.turned = source, turned
        vars(self)["factors"] = factors

    def seen(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the source's factors in the form that this module reads, as views."""
        return dict(factors) if self.turned is None else self.turned(factors)


@dataclass
class Kept:
    """Values that an adapted module caches without registering them. Unloading the last adapter drops all of them.

    ``row_sq``: squared norms of the weight's rows, (o,). ``found``: values that methods cache for the module.
    ``merged_weight``: the weight with adapters merged in, beside quantized codes that cannot hold it. ``read``: the
    parameters' values in one forward pass; None outside a pass. ``attention``: the attention whose output projection
    this module is. ``on_load``: the hook that derives factors again after another weight has been loaded.
    """

    row_sq: Tensor | None = None
    found: dict[Hashable, object] = field(default_factory=dict)
    merged_weight: Tensor | None = None
    read: dict[str, Tensor | None] | None = None
    attention: nn.Module | None = None
    on_load: RemovableHandle | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Enter a context for one forward pass, in which each parameter is computed once, however often
        code reads it.
        """
        before, self.read = self.read, {}
        try:
            yield
        finally:
            self.read = before


class Adapted(InPlace, Holder):
    """Mixin for adapted modules. A module's class is replaced by a generated class, whose bases are this mixin and the
    original class.

    ``adapters[name]`` holds the tensors that a method adds here. ``copies[name]`` holds whole parameters of this module
    that the adapter trains (as parameters) or saves frozen (as buffers). The module's own parameters stay unchanged.
    """

    name_prefix: ClassVar[str] = "Adapted"
    folds: ClassVar[bool] = True

    site_name: str
    copies: nn.ModuleDict
    originals: dict[str, Tensor | None]
    kept: Kept

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self.adapter_state.routed()
        names = () if routing is None else tuple(n for n in routing.adapters if n in self.copies)
        if routing is None or not names:
            return super().forward(*args, **kwargs)
        return self.by_rows(routing, names, args, kwargs)

    def by_rows(self, routing: Routing, names: Sequence[str], args: Any, kwargs: Any) -> Tensor:
        """Return the output for a mixed batch, computed for the rows of each of these adapters one after the other.

        Raises CompositionError if the input or the output is not one tensor with the rows as its first axis.
        """
        x = args[0] if args and isinstance(args[0], Tensor) else None
        groups = [] if x is None else routing.parts(x.shape[0], names, self.site_name, x.device)
        parts = []
        for (name, task), rows in groups:
            with self.adapter_state.only(() if name == BASE else (name,), task=task, rows=rows):
                # not through __call__: the hooks are around all rows
                parts.append(type(self).forward(self, cast(Tensor, x)[rows], *args[1:], **kwargs))
        if x is None or not all(isinstance(part, Tensor) for part in parts):
            raise CompositionError(
                f"{self.site_name} has several inputs or outputs, and {list(names)} train copies of it: per-row "
                "adapters are not supported for such a module. Run the adapters one after another."
            )
        order = torch.cat([rows for _, rows in groups])
        return torch.cat(parts)[order.argsort()]

    def effective(self, parameter: str, names: Sequence[str] | None = None) -> Tensor | None:
        """Return the module's own parameter, or the copy that one of the adapters (by default the active ones) has of
        it.

        A copy may be wider than the base (float32 for bfloat16); it is read in the base's dtype.

        Raises CompositionError if the parameter is read for all rows while rows have copies of their own.
        """
        routing = self.adapter_state.routed() if names is None else None
        if routing is not None and any(self.has_own(n, parameter) for n in routing.adapters):
            raise CompositionError(
                f"{self.site_name}.{parameter} is read for all rows at once, but one or more of the adapters "
                f"{list(routing.adapters)} have their own copy of it: run the adapters one after another"
            )
        acting = self.adapter_state.acting() if names is None else names
        value = self.whole(parameter, acting)
        if parameter != "weight" or value is None:
            return value
        for rows in self.token_rows(acting):
            value = put_rows(value, rows.index(value.device), rows.trainable_tokens_delta)
        return value

    def whole(self, parameter: str, names: Sequence[str]) -> Tensor | None:
        """Return the parameter as in `effective`, but without the single rows that adapters train."""
        own = self._parameters.get(parameter)
        for name in names:
            copy = cast("Tensor | None", getattr(self.copies[name], parameter, None)) if name in self.copies else None
            if copy is not None:
                return copy if own is None or not own.is_floating_point() else copy.to(own.dtype)
        return own

    def token_rows(self, names: Sequence[str]) -> list[TokenRows]:
        """Return the single rows of this table that these adapters train, here or in the table that it is tied to."""
        found = [getattr(self.copies[name], "token_adapter", None) for name in names if name in self.copies]
        return [rows for rows in found if rows is not None]

    def has_own(self, name: str, parameter: str) -> bool:
        """Return True if an adapter has a copy of one of the module's parameters, or rows of its own in it."""
        copied = name in self.copies and hasattr(self.copies[name], parameter)
        return copied or (parameter == "weight" and bool(self.token_rows((name,))))

    def folded(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the parameters of the module that these adapters change, with the adapters merged in."""
        held = {key for name in names if name in self.copies for key, _ in own_tensors(self.copies[name])}
        held |= {"weight"} if self.token_rows(names) else set()
        return {key: cast(Tensor, self.effective(key, names)) for key in sorted(held)}

    def folded_rows(
        self, key: str, names: Sequence[str], own: Iterable[Tensor], dtype: torch.dtype
    ) -> Iterator[Tensor] | None:
        """Return an iterator over blocks of the rows (k, …) of a parameter of `folded`, in ``dtype``. They are computed
        from ``own``, which yields blocks of the base's rows.

        Return None if the parameter cannot be computed row by row. The parameter itself may have no storage.
        """
        return None

    def changes_as(self, other: Adapted, names: Sequence[str]) -> bool:
        """Return True if this module and ``other`` share a weight and each of these adapters changes it in the same way
        in both.
        """
        return all(
            self.adapter_state.configs[n].extras.keeps_tie
            or (self.token_rows((n,)) == other.token_rows((n,)) and not (self._is_own(n) or other._is_own(n)))
            for n in names
        )

    def _is_own(self, name: str) -> bool:
        """Return True if an adapter changes the whole weight: by parameters of its own, or by a trained copy. An
        adapter that trains only some rows of the weight does not count.
        """
        return name in self.adapters or (name in self.copies and "weight" in dict(own_tensors(self.copies[name])))

    def replace(self, values: dict[str, Tensor]) -> None:
        """Replace the module's own parameters by merged values; the own ones are kept for `put_back`."""
        self.originals = {key: self._parameters.get(key) for key in values}
        for key, value in values.items():
            shared = isinstance(value, nn.Parameter) and not value.requires_grad  # what a tied module has already
            self._parameters[key] = cast(nn.Parameter, value) if shared else nn.Parameter(value, requires_grad=False)

    def unmerged(self, parameter: str) -> Tensor | None:
        """Return the module's own parameter, even while a merged one replaces it."""
        return self.originals.get(parameter, self._parameters.get(parameter))

    def put_back(self) -> None:
        """Undo `replace`: restore the same parameters, on the device of the module now."""
        for key, original in self.originals.items():
            now = self._parameters[key]
            if original is not None and now is not None and original.device != now.device:
                original = nn.Parameter(original.to(now.device), requires_grad=False)
            self._parameters[key] = cast("nn.Parameter | None", original)
        self.originals = {}

    def disk_path(self, name: str, path: str) -> str:
        """Return the path of adapter ``name`` at this module in PEFT's file; ``path`` is the module's own."""
        return path

    @property
    def active_adapters(self) -> list[str]:
        """Names of the model's active adapters, in order. If no method adds tensors to this module, only the adapters
        that train a copy of its parameters are listed.
        """
        active = self.adapter_state.active
        return [name for name in active if self.adapters or name in self.copies]

    @property
    def merged_adapters(self) -> list[str]:
        """Merged adapters that have parameters here."""
        return [name for name in self.adapter_state.merged if self.holds(name)]

    @property
    def disable_adapters(self) -> bool:
        """Return True if the adapters of the model are switched off."""
        return self.adapter_state.disabled

    @property
    def modules_to_save(self) -> nn.ModuleDict:
        """Copies of own parameters that adapters train, by adapter and then by the parameter's name."""
        return self.copies

    @property
    def holdings(self) -> tuple[nn.ModuleDict, ...]:
        return self.adapters, self.copies

    def holds(self, name: str) -> bool:  # asked in every forward pass
        return name in self.adapters or name in self.copies

    @property
    def has_codes(self) -> bool:
        """Return True if the module's weight is kept in a quantized format."""
        return False

    def trains_whole(self, name: str) -> bool:
        return name in self.copies

    def live_tensors(self, name: str, path: str) -> dict[str, tuple[str, Tensor]]:
        found = super().live_tensors(name, path)
        if name in self.copies:
            virtual = self.adapter_state.configs[name].virtual_tokens > 0
            own, adapted = self.disk_path(name, path), name in self.adapters
            found |= {
                copy_key(own, key, adapted=adapted, virtual=virtual): (f"{path}.copies.{name}.{key}", value)
                for key, value in tensors_of(self.copies[name]).items()
            }
        return found

    def leave(self, model: nn.Module, path: str) -> None:
        restore(self)

    def forget(self) -> None:
        """Drop the values computed from the weight."""


def adapt(path: str, module: nn.Module, state: AdapterState, mixin: type[Adapted]) -> Adapted:
    """Adapt a module in place; nothing changes until an adapter is added and active."""
    if isinstance(module, Adapted):
        return module
    change_class(module, mixin)
    adapted = cast(Adapted, module)
    adapted.site_name, adapted.adapter_state = path, state
    adapted.adapters, adapted.copies, adapted.originals = nn.ModuleDict(), nn.ModuleDict(), {}
    adapted.kept = Kept()
    return adapted


def own_parameter(module: nn.Module, parameter: str) -> Tensor | None:
    """Return a module's own parameter, even while a merged one replaces it."""
    return module.unmerged(parameter) if isinstance(module, Adapted) else module._parameters.get(parameter)


def forget_weight(module: nn.Module) -> None:
    """Drop the values computed from a module's weight, if the module is adapted."""
    if isinstance(module, Adapted):
        module.forget()


def restore(module: Adapted) -> None:
    """Restore a module's class and remove everything added to it."""
    if module.kept.on_load is not None:
        module.kept.on_load.remove()
    for attribute in ("adapters", "copies", "site_name", "adapter_state", "originals", "kept"):
        delattr(module, attribute)
    restore_class(module)


def add_copy(module: Adapted, name: str, parameter: str, value: Tensor, frozen: bool) -> None:
    """Give an adapter a copy of one of the module's parameters. While the adapter is active, reading the parameter
    returns the copy.
    """
    if name not in module.copies:
        module.copies[name] = nn.Module()
    if frozen:
        module.copies[name].register_buffer(parameter, value)
    else:
        one = value if isinstance(value, nn.Parameter) else nn.Parameter(value)  # tied modules share one
        module.copies[name].register_parameter(parameter, one)
    swap_reading(module, parameter)


def swap_reading(module: Adapted, parameter: str) -> None:
    """Make every read of a module's parameter return its value under the active adapters."""
    change_class(module, mixin_of(type(module)), (parameter,))


def own_tensors(holder: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers that a module registers itself."""
    return [*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)]


def factors_of(holder: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapter at one module: the holder's own, or those that it shares."""
    return holder.seen(tensors_of(vars(holder)["factors"])) if isinstance(holder, TiedFactors) else tensors_of(holder)
