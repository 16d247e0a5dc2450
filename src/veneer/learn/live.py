"""Packs an adapter in training for the engine, from memory and without a file, under a name made from its content."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.contract.config import for_use, from_values
from veneer.errors import AdapterNameError, NonFiniteError
from veneer.model.attach.attach import live_parameters
from veneer.ops.pairs import Factor, pack_factors
from veneer.serve.adapters.layouts import is_plain
from veneer.serve.adapters.versions import version_of
from veneer.serve.program.block import VersionBlock
from veneer.serve.program.block_layout import BlockLayout, part
from veneer.serve.runners.program_runner import ProgramAdapter, ProgramRunner
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.store.adapter.tensors import adapter_tensors, once_each
from veneer.store.checkpoint import is_finite


class LiveAdapter:
    """Adapter ``name`` of a model in training, packed for a runner of that model whenever it is needed.

    The config and the tensors are read as from a saved adapter, so that the packed adapter acts exactly like a saved
    and loaded one. If the adapter has only low-rank factors, as LoRA does, later packings are faster: they only copy
    values into places that the first packing found. Raises AdapterNameError for an unknown name.
    """

    def __init__(self, model: PeftModel, name: str, runner: ProgramRunner) -> None:
        if name not in model.adapter_state.configs:
            raise AdapterNameError(f"no adapter {name!r} on this model: it has {sorted(model.adapter_state.configs)}")
        self.model, self.name, self.runner = model, name, runner
        self.told = f"the adapter {name!r} in training"
        self._table: _Table | None = None

    @torch.no_grad()
    def now(self) -> tuple[AdapterVersion, ProgramAdapter]:
        """Pack the adapter's current state, and return it with its version, whose id is a hash of the packed bytes.

        Raises NonFiniteError for values that are not finite, and the errors of `ProgramRunner.pack`.
        """
        config, table = self.model.adapter_state.configs[self.name], self._table
        if table is None or not table.is_of(config):
            return self._read()
        block = table.packed(self.runner.loaded)
        self._require_finite([block.memory.view(table.dtype)])
        id = _digest([block.layout.key], [block.memory])
        table.blocks.setdefault(id, block)
        return self._version(self.runner.of_block(block), id)

    def _read(self) -> tuple[AdapterVersion, ProgramAdapter]:
        config = from_values(json.loads(for_use(self.model.adapter_state.configs[self.name]).to_json({})), self.told)
        own = once_each(adapter_tensors(self.model, self.model.adapter_state, self.name))
        tensors = {key: value.detach() for key, value in own.items()}
        self._require_finite(list(tensors.values()))
        adapter, factors = self.runner.pack(config, tensors, self.told)
        self._table = self._table_of(adapter, factors)
        if self._table is not None:
            block = adapter.packed.linears
            return self._version(adapter, _digest([block.layout.key], [block.memory]))
        # Some of it is not packed, and must not change with the parameters.
        adapter, _ = self.runner.pack(config, {key: value.clone() for key, value in tensors.items()}, self.told)
        names = [repr(config).encode(), *(key.encode() for key in tensors)]
        return self._version(adapter, _digest(names, list(tensors.values())))

    def _table_of(self, adapter: ProgramAdapter, factors: Sequence[Factor]) -> _Table | None:
        """Return a table for packing this adapter again by copying its factors alone.

        Return None if the adapter has more than low-rank factors, or if the factors do not share the parameters'
        memory.
        """
        block, state = adapter.packed.linears, self.model.adapter_state
        parameters = list(live_parameters(self.model, state, self.name).values())
        memory = {x.untyped_storage().data_ptr() for x in parameters}
        changes = [change.own for change in block.layout.changes if change is not None]
        if not (factors and adapter.is_block and block.layout.text and block.memory.is_cpu):
            return None
        mine = all(each.rows.untyped_storage().data_ptr() in memory for each in factors)
        if not mine or not all(map(is_plain, changes)) or len({each.panels.dtype for each in factors}) > 1:
            return None
        start = block.memory.data_ptr()
        places = [(each, each.panels.data_ptr() - start) for each in factors]
        return _Table(places, block.layout, state.configs[self.name], [(x, x.data_ptr()) for x in parameters])

    def _version(self, adapter: ProgramAdapter, id: str) -> tuple[AdapterVersion, ProgramAdapter]:
        config = self.model.adapter_state.configs[self.name]
        return version_of(config, self.told, adapter.n_bytes, id), adapter

    def _require_finite(self, tensors: Sequence[Tensor]) -> None:
        if not all(map(is_finite, tensors)):
            raise NonFiniteError(
                f"{self.told} has values that are not finite: the last step diverged. Lower the learning rate, or go "
                "on from an earlier checkpoint"
            )


@dataclass(frozen=True, slots=True)
class _Table:
    """Offsets of the factors of an adapter in training within its packed block, so that later packings only copy
    values.

    ``factors`` are views of the adapter's parameters, each with its offset in the block in bytes. The table is valid as
    long as ``config`` and the parameters' addresses stay the same: an optimizer changes values in place. ``blocks`` are
    the packed blocks by version id. A block that is no longer loaded is overwritten, because new memory costs more than
    copying.
    """

    factors: list[tuple[Factor, int]]
    layout: BlockLayout
    config: MethodConfig
    parameters: list[tuple[Tensor, int]]
    blocks: dict[str, VersionBlock] = field(default_factory=dict)
    _into: dict[int, list[Factor]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the packed factors."""
        return self.factors[0][0].panels.dtype

    def is_of(self, config: MethodConfig) -> bool:
        """Return True if the table is still valid for this config."""
        return config is self.config and all(x.data_ptr() == address for x, address in self.parameters)

    def packed(self, loaded: Collection[str]) -> VersionBlock:
        """Copy the factors' current values into a block and return it.

        Reuse the memory of a block that is not in ``loaded``, if there is one.
        """
        gone = next((id for id in self.blocks if id not in loaded), None)
        block = VersionBlock(self.layout, self.layout.room()) if gone is None else self.blocks.pop(gone)
        pack_factors(self._panels_in(block))
        return block

    def _panels_in(self, block: VersionBlock) -> list[Factor]:
        """Return each factor with the part of ``block`` that its values are copied into. The parts are looked up once
        for each block's memory.
        """
        start = block.memory.data_ptr()
        if start not in self._into:
            found = [each._replace(panels=part(block.memory, at, each.panels)) for each, at in self.factors]
            self._into[start] = found
        return self._into[start]


def _digest(told: Sequence[bytes], tensors: Sequence[Tensor]) -> str:
    digest = xxhash.xxh3_128()  # against chance: the bytes are this process's own
    for each in told:
        digest.update(each + b"\0")
    for x in tensors:
        digest.update(cast(Any, x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return f"live-{digest.hexdigest()}"
