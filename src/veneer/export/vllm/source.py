"""Adapter to export: its config, its records, and known facts about its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.contract import MethodConfig
from veneer.contract.file import read_fields
from veneer.contract.places import Placed
from veneer.errors import CompositionError
from veneer.export.adapter_on_base import changed_tensors, with_weights
from veneer.export.model_folder import local_folder
from veneer.export.vllm.lora_config import is_plain
from veneer.inits import find_start
from veneer.model.modules.snapshot import Snapshot, look_at, shortest_names
from veneer.model.sites.places import placed_on
from veneer.records.sites import LinearSite
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_headers
from veneer.store.adapter.fit import fitting
from veneer.store.adapter.records import StoredAdapter, read_records
from veneer.store.adapter.skeleton import config_of_base, without_storage
from veneer.store.model_config import model_config

_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Adapter as read: the fields of its config, its records, and a snapshot of its base, if the base is known."""

    fields: Mapping[str, Any]
    method: MethodConfig
    stored: StoredAdapter
    snapshot: Snapshot | None

    @classmethod
    def read(cls, adapter: Path, given: str | None) -> AdapterSource:
        """Read an adapter folder. ``given`` is the base's name; if it is None, the name in the adapter's config is
        taken.

        Raises CompositionError if the adapter changes no weights, or depends on a base that is not on this machine.
        """
        fields = read_fields(adapter)
        _require_known_start(adapter, fields)
        method = read_config(adapter)
        if not method.changes_weights:
            raise refused(adapter, f"{method.peft_type} does not change weights")
        if method.invocation_tokens:
            raise refused(adapter, "it acts only after its invocation tokens, which neither of the two supports")
        base = _base_of(method, given)
        if base is None:
            return cls(fields, method, _without_base(adapter, method), None)
        return _on_base(adapter, fields, method, base, given or method.base_model_name_or_path or "")

    def siblings(self) -> dict[str, LinearSite]:
        """Return the layers that the adapter leaves out, if it changes the same layer of another block.

        They are needed because LoRAX silently drops a kind of layer if one block has none of it.
        """
        if self.snapshot is None:
            return {}
        adapted = {_BLOCK.sub(".*.", path, count=1) for path in self.stored.updates}
        kinds = self.snapshot.kinds
        left = [p for p in kinds if p not in self.stored.updates and _BLOCK.sub(".*.", p, count=1) in adapted]
        return dict(zip(left, self.snapshot.sites(left), strict=True))

    def targets(self, filled: Mapping[str, LinearSite]) -> tuple[str, ...]:
        """Return module names for ``target_modules`` that match exactly the layers ``filled``."""
        paths = (*self.stored.updates, *filled)
        return paths if self.snapshot is None else shortest_names(self.snapshot.index(), paths)


def _base_of(method: MethodConfig, given: str | None) -> Path | None:
    """Return the folder of the base's config; None if the caller named none and the base is not on this machine."""
    config = config_of_base(given or method.base_model_name_or_path, None if given else method.revision)
    return config.parent if config is not None else None if given is None else local_folder(given)


def _without_base(adapter: Path, method: MethodConfig) -> StoredAdapter:
    stored = read_records(adapter) if not (method.reads_weight or method.packing.fixed) else None
    if stored is None or not all(record.only_adds or record.only_scales for record in stored.updates.values()):
        raise CompositionError(
            f"the adapter {adapter} depends on the weights of its base "
            f"({method.base_model_name_or_path or 'which it does not name'}), and that is not on this machine: give "
            "it (--base MODEL)"
        )
    return stored


def _on_base(adapter: Path, fields: Mapping[str, Any], method: MethodConfig, base: Path, named: str) -> AdapterSource:
    def weighted(places: Mapping[str, Placed]) -> dict[str, Placed]:
        return with_weights(places, skeleton, base if any(base.glob("*.safetensors")) else local_folder(named))

    files = read_headers(adapter)
    skeleton = without_storage(model_config(base), files)
    with fitting(adapter, str(base)):
        places = placed_on(skeleton, method)
    fixed = (key for p in places.values() for name, key in p.keys.items() if name in method.packing.fixed)
    starts = [key for key in fixed if key not in files]
    if method.reads_weight or starts:
        places = weighted(places)
    stored = read_records(adapter, places, _started(method, places) if starts else {})
    if not all(record.only_adds or record.only_scales for record in stored.updates.values()):
        stored = replace(stored, places=weighted(stored.places))
    if stored.others and any(base.glob("*.safetensors")):
        stored = replace(stored, others=tuple(changed_tensors(stored, adapter, base)))
    return AdapterSource(fields, method, stored, look_at(skeleton))


def _started(method: MethodConfig, places: Mapping[str, Placed]) -> dict[str, Tensor]:
    """Compute the adapter's fixed parameters as its initialization does, and return them by the keys that they have in
    a file.

    PEFT's files do not hold them. For a start such as PiSSA they are the initial factors, whose product is subtracted
    from the base.
    """
    found: dict[str, Tensor] = {}
    for placed in places.values():
        first = method.init(placed.site, torch.Generator().manual_seed(0))
        found |= {placed.keys[name]: first[name] for name in method.packing.fixed if name in first}
    return found


def _require_known_start(adapter: Path, fields: Mapping[str, Any]) -> None:
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and find_start(start) is None and not is_plain(fields):
        raise CompositionError(
            f"the adapter {adapter} has the start {start!r}, which changed the base's weights when it was made, and "
            "its files do not hold that change: save it as plain LoRA where it was trained (PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion)"
        )


def refused(adapter: Path, reason: str) -> CompositionError:
    """Return the error for an adapter that cannot be plain LoRA."""
    return CompositionError(
        f"the adapter {adapter} cannot be plain LoRA for vLLM and LoRAX: {reason}. `veneer serve` serves it as it is"
    )
