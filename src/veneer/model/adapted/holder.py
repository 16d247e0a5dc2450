"""Common interface of modules that hold adapters' tensors: adapted modules, bottlenecks and virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from veneer.model.adapted.state import AdapterState

_KEYS = "_disk_keys"  # an attribute of what a holder holds


class Holder(nn.Module):
    """Module of a model that holds tensors of adapters, by name.

    ``adapters[name]`` holds the tensors that a method adds to this module. ``folds``: merging can fold all of them into
    weights.
    """

    folds: ClassVar[bool] = False

    adapter_state: AdapterState
    adapters: nn.ModuleDict

    @property
    def holdings(self) -> tuple[nn.ModuleDict, ...]:
        """All module dicts in this module that hold adapters' tensors, each by adapter name."""
        return (self.adapters,)

    def holds(self, name: str) -> bool:
        """Return True if an adapter has tensors here."""
        return any(name in held for held in self.holdings)

    def owns(self, name: str) -> bool:
        """Return True if the adapter has parameters here that it shares with no other module."""
        return name in self.adapters

    def acting_on_rows(self) -> list[str]:
        """Return the names of the adapters that are active in this module now, on all rows of the batch or on some."""
        return [name for name in self.adapter_state.acting_on_rows() if name in self.adapters]

    def trains_whole(self, name: str) -> bool:
        """Return True if an adapter trains this module whole, or rows of it."""
        return False

    def is_update(self, name: str) -> bool:
        """Return True if the adapter's only effect in this module is an update of one linear layer."""
        return False

    def hold(self, name: str, held: nn.Module, keys: Mapping[str, str]) -> None:
        """Add an adapter's tensors to this module. ``keys`` are their keys in a file, by their names in ``held``."""
        vars(held)[_KEYS] = keys  # with the tensors, which may get another name or leave
        self.adapters[name] = held

    def disk_keys(self, name: str) -> Mapping[str, str]:
        """Return the key of each of the method's parameters in PEFT's file."""
        return cast("Mapping[str, str]", vars(self.adapters[name])[_KEYS])

    def live_tensors(self, name: str, path: str) -> dict[str, tuple[str, Tensor]]:
        """Return every tensor of an adapter in this module by its key on disk, with its name in the model's
        ``state_dict``.
        """
        if name not in self.adapters:
            return {}
        keys, held = self.disk_keys(name), tensors_of(self.adapters[name]).items()
        return {keys[own]: (f"{path}.adapters.{name}.{own}", value) for own, value in held if own in keys}

    def packed(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert an adapter's trained tensors to the form in which its file stores them. The keys of ``values`` and of
        the result are keys on disk.
        """
        return {key: values[key] for key in self.disk_keys(name).values()}

    def unpacked(self, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the tensors of an adapter's file to the trained tensors, as the inverse of `packed`. Return an empty
        dict if the file stores the trained tensors unchanged.
        """
        return {}

    def value_problems(self, name: str, written: Mapping[str, Tensor]) -> list[str]:
        """Return what is wrong with the values of an adapter's tensors ``written`` in a file, as sentences. Shapes and
        dtypes are not checked here.
        """
        return []

    def derive(self, name: str) -> None:
        """Recompute an adapter's tensors that depend on the base's weight and on the adapter's parameters, see
        `MethodConfig.derived`.
        """

    def take_off(self, model: nn.Module, path: str, name: str) -> None:
        """Remove an adapter's tensors from this module. If no adapter is left, restore the model's own module."""
        for held in self.holdings:
            if name in held:
                del held[name]
        if not any(self.holdings):
            self.leave(model, path)

    def leave(self, model: nn.Module, path: str) -> None:
        """Remove the holder itself from the model, with its hooks."""
        raise NotImplementedError


def tensors_of(holder: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name."""
    return {**dict(holder.named_parameters()), **dict(holder.named_buffers())}
