"""Effects of an adapter on the operations of a program, read from its folder; no model is modified.

Parts outside the text half of a model with images have none: requests consist of tokens.
If the program cannot express a part of an adapter, `UnsaidError` says so, and the general runner serves the adapter.
The general runner also reports invalid folders.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.contract import MethodConfig
from veneer.contract.keys import copy_key, rows_key, weight_keys
from veneer.contract.places import Placed
from veneer.errors import CompositionError, VeneerError
from veneer.model.adapted.copies import own_parameters
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import look_at
from veneer.model.program.program import Program
from veneer.model.program.version import Effects
from veneer.model.quantized.packed_linear import PackedLinear
from veneer.model.sites.places import places_of, plan_of
from veneer.plain.lru import LruCache
from veneer.plain.tensor_tree import in_own_memory
from veneer.records.deltas import LinearDelta, PromptDelta, ResidualDelta
from veneer.serve.program.heads import is_of_head, without_head
from veneer.store.adapter.config import read_config
from veneer.store.adapter.files import read_tensors
from veneer.store.adapter.records import StoredAdapter, records_of
from veneer.store.adapter.tensors import once_each

_LOG = logging.getLogger(__name__)
_KEPT = 512  # configs whose places are kept


class UnsaidError(VeneerError):
    """Error for a part of an adapter that the program cannot express."""


@dataclass(frozen=True, slots=True)
class _Places:
    config: MethodConfig
    plan: AttachPlan
    placed: Mapping[str, Placed]


class Lookup:
    """Modules of a ``model`` that an adapter's config selects, cached by config: most adapters differ only in values.

    It is valid while no other adapter is attached to the model or detached from it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._seen: LruCache[str, _Places] = LruCache(_KEPT)  # by all that a config says

    def of(self, config: MethodConfig) -> _Places:
        """Return the modules that a config selects, and how it changes them.

        Raises TargetError if the model has none.
        """
        key = repr(config)
        found = self._seen.get(key)
        if found is None or found.config != config:
            snapshot = look_at(self.model)
            plan = plan_of(snapshot, config, fresh=False)
            found = _Places(config, plan, places_of(snapshot, plan))
            self._seen.put(key, found)
        return found


def read_effects(lookup: Lookup, program: Program, folder: Path) -> Effects:
    """Return the effects of a saved adapter.

    Raises FormatError and TargetError as loading the adapter into the model does. Raises `UnsaidError` if the program
    cannot express the adapter, but CompositionError if such an adapter has invocation tokens. The general runner cannot
    compute such an adapter's tokens, because the keys and values of earlier tokens have the program's layout.
    """
    return effects_of(lookup, program, folder, read_config(folder), once_each(read_tensors(folder)))


def effects_of(
    lookup: Lookup, program: Program, folder: Path, config: MethodConfig, tensors: Mapping[str, Tensor]
) -> Effects:
    """Return the effects as `read_effects` does, from a config and tensors by keys on disk. ``folder``: for errors."""
    config = without_head(config)
    try:
        return _effects_of(lookup, program, folder, config, tensors)
    except UnsaidError as reason:
        if not config.invocation_tokens:
            raise
        raise CompositionError(
            f"the adapter in {folder} acts from its invocation tokens on, and has {reason}, which the engine's program "
            "does not support: start the engine with general_runner=True"
        ) from reason


def _effects_of(
    lookup: Lookup, program: Program, folder: Path, config: MethodConfig, tensors: Mapping[str, Tensor]
) -> Effects:
    places = lookup.of(config)
    stored = records_of(folder, config, tensors, places.placed, device=lookup.model.device)
    stored = replace(stored, others=tuple(key for key in stored.others if not is_of_head(key)))
    found = Effects()
    plan = places.plan
    on_modules = [path for path, record in stored.records.items() if isinstance(record, LinearDelta | ResidualDelta)]
    beside = {path for path in (*on_modules, *plan.copied) if not program.reads_tokens(path)}
    if beside:
        _LOG.info("%s: %d parts have no effect on tokens, such as that of %s", folder, len(beside), min(beside))
    for path, record in stored.records.items():
        if path not in beside:
            _put(found, program, path, record)
    if config.virtual_tokens:
        if stored.others or config.modules_to_save:
            raise UnsaidError(f"virtual tokens with {', '.join(stored.others[:3]) or config.modules_to_save}")
        if program.windows or program.page_states:
            raise UnsaidError("virtual tokens, which leave nothing for convolutions and scans")
        return found
    if stored.others or plan.copied or plan.rows:
        _put_others(found, lookup.model, program, stored, _Others(config, plan, tensors))
    return found


def _put(found: Effects, program: Program, path: str, record: object) -> None:
    """Store an adapter's change of the module at ``path`` in ``found``.

    Raises UnsaidError if the program cannot express it.
    """
    matrix = path.removesuffix(".weight")  # of a router, which target_parameters names
    if isinstance(record, LinearDelta) and matrix in program.linears:
        if matrix in found.linear:
            raise UnsaidError(f"two updates of {matrix}")
        found.linear[matrix] = _with_own_vectors(record)
    elif isinstance(record, LinearDelta) and path in program.stack_paths and record.is_low_rank:
        found.linear[path] = record
    elif isinstance(record, LinearDelta) and path == program.embedding.path:
        found.table = in_own_memory(record)
    elif isinstance(record, ResidualDelta) and path in program.sites:
        found.residual[path] = record
    elif isinstance(record, PromptDelta | tuple):
        found.front = in_own_memory(record)
    else:
        raise UnsaidError(f"an update of {path}")


def _with_own_vectors(record: LinearDelta) -> LinearDelta:
    """Return a record with copies of its tensors, because the file that holds them will be closed.

    Its low-rank pair is not copied, because the pair is packed elsewhere.
    """
    left = record.without_pair()
    if left.changes_nothing:
        return record
    pair = () if record.low_rank is None else (record.low_rank,)
    left = in_own_memory(left)
    return replace(left, adds=(*pair, *left.adds))


@dataclass(frozen=True, slots=True)
class _Others:
    config: MethodConfig
    plan: AttachPlan
    tensors: Mapping[str, Tensor]


def _put_others(
    found: Effects, model: PreTrainedModel, program: Program, stored: StoredAdapter, others: _Others
) -> None:
    """Store an adapter's own copies of whole parameters and of single rows in ``found``.

    Raises UnsaidError if the program cannot express a copy, or if the file holds any other tensor.
    """
    plan, tensors, left = others.plan, others.tensors, set(stored.others)
    if others.config.extras.keeps_tie:
        raise UnsaidError("parameters that stay tied")
    for path, names in plan.copied.items():
        for name in names:
            key = copy_key(path, name, adapted=path in stored.records)
            if program.reads_tokens(path):
                _put_whole(found, model, program, (path, name), tensors.get(key))
            left.discard(key)
    for place in plan.rows:
        keys = [rows_key(path) for path in (place.path, *place.followers)]
        _put_rows(found, program, (place.path, *place.followers), place.indices, tensors.get(keys[0]))
        left -= set(keys)
    for path in (program.embedding.path, program.head.linear.path):
        for key in left & set(weight_keys(path)):
            own = cast(Tensor, model.get_submodule(path).weight)
            if tensors[key].shape != own.shape or not torch.equal(tensors[key].to(own.device, own.dtype), own):
                _put_whole(found, model, program, (path, "weight"), tensors[key])
            left.discard(key)
    if left:
        raise UnsaidError(f"{sorted(left)[0]} in its file")


def _put_whole(
    found: Effects, model: PreTrainedModel, program: Program, place: tuple[str, str], value: Tensor | None
) -> None:
    """Store a parameter that the adapter trains whole in ``found``. ``place`` is the module's path and the parameter's
    name.

    A layer's bias becomes part of the layer's record.
    """
    path, name = place
    module = model.get_submodule(path)
    own = dict(own_parameters(module)).get(name)
    known = path in program.linears or path in program.norms or place == (program.embedding.path, "weight")
    if value is None or own is None or value.shape != own.shape or not known:
        raise UnsaidError(f"{path}.{name} of its own")
    value = in_own_memory(value.to(model.device, own.dtype))
    record = found.linear.get(path, LinearDelta())
    if path in program.linears and name == "bias":
        if record.bias is not None:
            raise UnsaidError(f"two changes of the bias of {path}")
        found.linear[path] = replace(record, bias=value)
    elif path in program.linears and not record.only_scales:
        raise UnsaidError(f"an update of {path}, whose weight is its own too")
    else:
        transposed = isinstance(module, Conv1D) or (isinstance(module, PackedLinear) and module.is_transposed)
        found.whole[place] = value.T if transposed and name == "weight" else value


def _put_rows(
    found: Effects, program: Program, paths: tuple[str, ...], indices: tuple[int, ...], values: Tensor | None
) -> None:
    known = {program.embedding.path, program.head.linear.path}
    shape = (len(indices), program.embedding.width)
    if values is None or not set(paths) <= known or tuple(values.shape) != shape:
        raise UnsaidError(f"rows of {paths[0]}")
    for path in paths:
        found.rows[path] = (torch.tensor(indices), in_own_memory(values))
