"""Operation that starts the residual stream: it looks tokens up in the embedding table, or takes given embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from veneer.model.blueprint.decoder import Embedding
from veneer.model.program.binding import Binding
from veneer.model.program.linears import each_alone
from veneer.model.program.operation import Frame, Operation, PassKind, Register, StepPlace
from veneer.model.program.rows import PassRows
from veneer.model.program.version import Version, Versions
from veneer.model.quantized.embedding import CodedEmbedding
from veneer.ops.cpu.step import StepProgram
from veneer.records.linear import apply_embedding
from veneer.records.token_rows import look_up_rows


@dataclass(frozen=True, slots=True)
class EmbedWeights:
    """Embedding table, the factor that the table's module applies (``own_multiplier``), rounded to the table's dtype,
    and the table of learned ``positions`` (None without).
    """

    table: Tensor
    own_multiplier: float
    positions: Tensor | None
    versions: Versions

    def scaled(self, rows: Tensor) -> Tensor:
        """Return rows of the table with the multiplier that the table's module applies itself."""
        return rows if self.own_multiplier == 1 else rows * self.own_multiplier


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed(Operation):
    """Start of the residual stream: ``target`` is the tokens' rows of the table times the multiplier, plus learned
    positions if there are any.
    """

    read = ()

    embedding: Embedding
    target: Register

    @property
    def multiplier(self) -> float:
        """The factor that remains after the one that the table's module applies itself."""
        return self.embedding.multiplier / self.embedding.own_multiplier

    def bind(self, to: Binding) -> EmbedWeights:
        part, positions = self.embedding, self.embedding.positions
        module: Any = to.model.get_submodule(part.path)
        coded = isinstance(module, CodedEmbedding)
        table = cast(Tensor, module.dense_table() if coded else module._parameters["weight"])
        own = torch.tensor(part.own_multiplier, dtype=table.dtype)  # Gemma's table rounds it to its own dtype
        learned = None if positions is None else to.model.get_submodule(positions.path)._parameters["weight"]
        return EmbedWeights(table, float(own), learned, to.versions)

    def forward(self, weights: EmbedWeights, rows: PassRows, frame: Frame) -> None:
        given, positions = frame["given"], self.embedding.positions
        h = given.clone() if given.is_floating_point() else self._looked_up(weights, rows, given)
        h = h if self.multiplier == 1 else h * self.multiplier
        if weights.positions is not None and positions is not None:
            h = h + weights.positions[rows.positions + positions.offset]
        frame[self.target.name] = h

    def _looked_up(self, weights: EmbedWeights, rows: PassRows, ids: Tensor) -> Tensor:
        path, h = self.embedding.path, weights.scaled(functional.embedding(ids, weights.table))
        for number, start, stop in rows.runs.runs:
            effects, own = weights.versions[rows.versions[number]].effects, slice(start, stop)
            whole = effects.whole.get((path, "weight"))
            if whole is not None:
                h[own] = weights.scaled(functional.embedding(ids[own], whole))
            if path in effects.rows:
                index, values = effects.rows[path]
                h[own] = look_up_rows(ids[own], h[own], index, weights.scaled(values.to(h.dtype)))
            if effects.table is not None:
                record = effects.table.with_adds_times(weights.own_multiplier)
                h[own] = apply_embedding(record, ids[own], h[own], linear=each_alone)
        return h

    def emit(self, weights: EmbedWeights, step: StepProgram) -> bool:
        table = weights.table
        if weights.positions is not None or table.dtype != step.dtype or not table.is_contiguous():
            return False
        multipliers = [each for each in (weights.own_multiplier, self.multiplier) if each != 1]
        step.add("embedding", table, *table.shape, multipliers, step.first_of(self.target))
        return True

    def fits(self, kind: PassKind) -> bool:
        return kind.by_ids

    def take(self, weights: EmbedWeights, version: Version, place: StepPlace) -> bool:
        return version.effects.table is None and not version.effects.replaces(self.embedding.path)
