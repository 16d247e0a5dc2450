"""Records of an adapter folder (its changes of each module), from its tensors and the modules' shapes, without
a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.contract import MethodConfig
from veneer.contract.config import for_use
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.contract.keys import is_shared
from veneer.contract.known import Known
from veneer.contract.parameters import Record
from veneer.contract.places import Placed
from veneer.disk.atomic import write_together
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import CompositionError, FormatError, VeneerError
from veneer.records.deltas import LinearDelta
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_tensors, unusable
from veneer.store.adapter.folder import needs_base
from veneer.store.adapter.tensors import once_each


class NeedsBaseError(CompositionError):
    """Error for an adapter whose updates cannot be computed without its base."""


@dataclass(frozen=True)
class StoredAdapter:
    """Saved adapter: its config, and by module path the modules that it acts on (``places``) and its changes of them
    (``records``).

    ``others`` are the keys of its other tensors: whole parameters, and trained rows of embeddings.
    """

    config: MethodConfig
    places: Mapping[str, Placed]
    records: Mapping[str, Record]
    others: tuple[str, ...] = ()

    @property
    def updates(self) -> dict[str, LinearDelta]:
        """Records of linear layers."""
        return {path: record for path, record in self.records.items() if isinstance(record, LinearDelta)}


def read_records(
    folder: Path,
    places: Mapping[str, Placed] | None = None,
    lacking: Mapping[str, Tensor] | None = None,
    *,
    device: torch.device | None = None,
) -> StoredAdapter:
    """Return the records of a saved adapter, equal to those of the adapter loaded on its model.

    ``places`` are the modules of the base that it acts on, with weights if the method reads them (see
    `model.sites.places.placed_on`). If it is None, they follow from the file alone; a record's ``bias`` is then the
    difference to the layer's own. ``lacking`` are tensors to use for keys that the file lacks. If the method reads the
    base's weights, which are on ``device``, so are the records; all others are in host memory.

    Raises CompositionError if a weight is needed, and NeedsBaseError if neither the caller nor the file gives the
    modules. Raises FormatError for a damaged folder.
    """
    tensors = {**(lacking or {}), **once_each(read_tensors(folder))}
    return records_of(folder, read_config(folder), tensors, places, device=device)


def records_of(
    folder: Path,
    config: MethodConfig,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, Placed] | None = None,
    *,
    device: torch.device | None = None,
) -> StoredAdapter:
    """Return records as `read_records` does, from a config and tensors by key on disk. Only errors use ``folder``."""
    in_base = places is not None
    if places is None:
        places = _told_places(folder, config, tensors)
    whole = {placed.keys[name] for placed in places.values() for name in config.packing.whole}
    _require_none(folder, [f"{why}: {key}" for key, why in unusable(tensors, whole).items()])
    if config.reads_weight and device is not None:
        tensors = {key: value.to(device) for key, value in tensors.items()}
    params = {path: _parameters(folder, tensors, placed) for path, placed in places.items()}
    if places:
        shapes = {path: {name: tuple(x.shape) for name, x in own.items()} for path, own in params.items()}
        config = config.for_sites([placed.site for placed in places.values()], Known(shapes=shapes))
    _require_shapes(folder, config, places, params, in_base=in_base)
    _require_none(folder, [p for path, own in params.items() for p in config.packing.problems(places[path].site, own)])
    shared = () if config.shared is None else config.shared.names
    taken = {key for placed in places.values() for key in placed.keys.values()}
    others = tuple(sorted(key for key in tensors if key not in taken and not is_shared(key, shared)))
    records = {path: _lowered(folder, config, placed.site, params[path]) for path, placed in places.items()}
    return StoredAdapter(config, places, records, others)


def _lowered(folder: Path, config: MethodConfig, site: Any, params: Mapping[str, Tensor]) -> Record:
    try:
        return config.lower(site, params)
    except VeneerError:
        raise
    except (RuntimeError, ValueError) as error:  # of torch, for values or dtypes that a method does not expect
        raise FormatError(
            f"the adapter {folder} ({config.peft_type}) cannot be read: {error}. Save it again"
        ) from error


def read_updates(folder: Path, places: Mapping[str, Placed] | None = None) -> StoredAdapter:
    """Return the records of an adapter that consists of updates of linear layers, valid on any base.

    Raises NeedsBaseError if the updates depend on the base, CompositionError if the adapter holds anything else, and
    the errors of `read_records`.
    """
    config = read_config(folder)
    if config.reads_weight:
        raise NeedsBaseError(needs_base(folder))
    if not config.changes_weights:
        raise CompositionError(
            f"the adapter {folder} ({config.peft_type}) is no update of linear layers: it cannot be inspected, or "
            "combined with other adapters. Merge it into its base if it changes weights, or leave it out"
        )
    stored = read_records(folder, places)
    if stored.others:
        more = f" and {len(stored.others) - 1} more, which are" if len(stored.others) > 1 else ", which is"
        raise CompositionError(
            f"the adapter {folder} holds {stored.others[0]}{more} no pair of low-rank factors, and acts only "
            "together with its base. Merge it (`veneer merge`), or leave it out"
        )
    if not all(record.only_adds for record in stored.updates.values()):
        raise NeedsBaseError(needs_base(folder))
    return stored


def write_records(
    folder: Path, config: MethodConfig, params: Mapping[str, Mapping[str, Tensor]], places: Mapping[str, Placed]
) -> None:
    """Write an adapter folder from parameters by module path. Raises DiskError if writing fails."""
    tensors = {
        key: params[path][name].reshape(config.shapes(placed.site)[name])
        for path, placed in places.items()
        for name, key in placed.keys.items()
    }
    written = for_use(config).to_json({}).encode()
    write_together(folder, {WEIGHTS_FILE: tensors_to_bytes(tensors), CONFIG_FILE: written})


def _told_places(folder: Path, config: MethodConfig, tensors: Mapping[str, Tensor]) -> dict[str, Placed]:
    source = str(folder / WEIGHTS_FILE)
    places = config.places_in({key: tuple(value.shape) for key, value in tensors.items()}, source)
    if places == {} and config.samples and config.changes_weights and getattr(config, "target_modules", None) != ():
        raise FormatError(
            f"{CONFIG_FILE} describes a {config.peft_type} adapter, but {source} holds none of its parameters. Save it "
            "again"
        )
    if places is None:
        raise NeedsBaseError(
            f"the file of the adapter {folder} ({config.peft_type}) does not tell the sizes of the layers that it "
            "changes: give the base too (--base MODEL)"
        )
    return places


def _parameters(folder: Path, tensors: Mapping[str, Tensor], placed: Placed) -> dict[str, Tensor]:
    missing = [key for key in placed.keys.values() if key not in tensors]
    if missing:
        raise FormatError(f"{folder / WEIGHTS_FILE} lacks {', '.join(missing[:3])}. Save it again")
    found = {name: tensors[key] for name, key in placed.keys.items()}
    dtypes = [value.dtype for value in found.values() if value.is_floating_point()]  # none if it has no parameters
    wide = functools.reduce(torch.promote_types, dtypes) if dtypes else None
    return {name: value.to(wide) if value.is_floating_point() else value for name, value in found.items()}


def _require_none(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise FormatError(f"{folder / WEIGHTS_FILE}: {'; '.join(problems[:3])}. Save it again")


def _require_shapes(
    folder: Path,
    config: MethodConfig,
    places: Mapping[str, Placed],
    params: Mapping[str, Mapping[str, Tensor]],
    *,
    in_base: bool,
) -> None:
    """Raise FormatError if an adapter's tensors do not have the shapes that its config implies.

    ``in_base`` is True if ``places`` are the layers of the base, and False if they were inferred from the file itself.
    """
    says = "its config on this base needs" if in_base else "the config says"
    wrong = [
        f"{placed.keys[name]} is {tuple(params[path][name].shape)} where {says} {shape}"
        for path, placed in places.items()
        for name, shape in config.shapes(placed.site).items()
        if tuple(params[path][name].shape) != tuple(shape)
    ]
    if wrong:
        told, mend = ("the base", "Give its own base, or save it again") if in_base else (CONFIG_FILE, "Save it again")
        raise FormatError(f"{folder / WEIGHTS_FILE} does not fit {told}: {'; '.join(wrong[:3])}. {mend}")
