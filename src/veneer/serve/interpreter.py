"""A program run: its paths bound to a model's weights, every instruction a few calls of ops.

Rows of several adapter versions go through together, each run of rows with its own records. Where a version has a
weight of its own, its rows are computed by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from veneer.core.frozen import FrozenWeight
from veneer.core.linear import apply_embedding
from veneer.core.records import LinearDelta
from veneer.core.residual import residual_change
from veneer.core.token_rows import look_up_rows, project_rows
from veneer.model.blueprint.parts import Linear, Norm
from veneer.model.linear import frozen_weight
from veneer.ops.activation import activation_forward
from veneer.ops.glu import ACTIVATIONS as GATED
from veneer.ops.glu import glu_forward
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.linear.layer import NOTHING, LinearLayer, Weight
from veneer.ops.linear.op import forward
from veneer.ops.norm import layer_norm_forward, rms_norm_forward
from veneer.ops.rotary import rotate
from veneer.quant.dense import DenseWeight
from veneer.serve.effects import Effects
from veneer.serve.kv_cache import append, paged_attention
from veneer.serve.program import (
    STREAM,
    Activate,
    Add,
    Attend,
    Change,
    Embed,
    Heads,
    Instruction,
    Logits,
    Normalize,
    Own,
    Product,
    Program,
)
from veneer.serve.step import Step

Frame = dict[str, Any]
"""The registers of a pass."""
Bound = Callable[[Step, Frame], None]


class Interpreter:
    """A program on a model's weights, with the ``effects`` of adapters by version."""

    def __init__(self, model: PreTrainedModel, program: Program) -> None:
        self.program = program
        self.effects: dict[str, Effects] = {}
        self._rotations = {r: r.tables(torch.arange(program.n_positions).to(model.device)) for r in program.rotaries}
        self._bound = [self._bind(model, instruction) for instruction in program.instructions]

    @torch.no_grad()
    def run(self, step: Step, given: Tensor) -> Tensor:
        """The logits (kept, vocabulary) of the rows that are kept, from ids (n,) or embeddings (n, width)."""
        frame: Frame = {"given": given}
        for rotary, tables in self._rotations.items():
            step.shared[rotary] = tuple(table[step.positions][None] for table in tables)
        for instruction in self._bound:
            instruction(step, frame)
        return cast(Tensor, frame["logits"])

    def _bind(self, model: PreTrainedModel, instruction: Instruction) -> Bound:
        match instruction:
            case Embed():
                return _Embedding(model, instruction, self.effects)
            case Normalize():
                return _Normed(_NormOf(model, instruction.norm, self.effects), instruction.source, instruction.target)
            case Product():
                return _Products(_Linears(model, instruction.linears, self.effects), instruction)
            case Heads():
                return _HeadsOf(model, instruction)
            case Attend():
                return _Attended(instruction)
            case Activate():
                return _Activated(instruction)
            case Change():
                return _Changed(instruction, self.effects)
            case Own():
                return _ByModule(model.get_submodule(instruction.path), instruction)
            case Add():
                return _Added(instruction)
            case Logits():
                return _LogitsOf(model, instruction, self.effects)


@dataclass(frozen=True, slots=True)
class _NormOf:
    """A norm with its weights, and those that versions have instead."""

    model: PreTrainedModel
    norm: Norm
    effects: Mapping[str, Effects]
    own: tuple[Tensor | None, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        held = self.model.get_submodule(self.norm.path)._parameters
        weight = held["weight"] if self.norm.weight else torch.ones(self.norm.shape, device=self.model.device)
        bias = held["bias"] if self.norm.bias else None
        if self.norm.kind == "layer" and bias is None:
            bias = torch.zeros_like(cast(Tensor, weight))
        object.__setattr__(self, "own", (weight, bias))

    def __call__(self, x: Tensor, versions: tuple[str, ...], runs: AdapterRuns) -> Tensor:
        y = self.normed(x, *self.own)
        for version, rows in _with_whole(self.effects, versions, runs, self.norm.path):
            whole, weight, bias = self.effects[version].whole, *self.own
            weight = whole.get((self.norm.path, "weight"), weight)
            bias = whole.get((self.norm.path, "bias"), bias)
            y[rows] = self.normed(x[rows], weight, bias)
        return y

    def normed(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        norm = self.norm
        if len(norm.shape) > 1:  # a weight for each head
            flat = torch.ones_like(weight[0])
            y = self._flat(x, flat, torch.zeros_like(flat)) * (weight + norm.offset)
            return cast(Tensor, (y if bias is None else y + bias).to(x.dtype))
        return self._flat(x, weight, bias)

    def _flat(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        norm = self.norm
        if norm.kind == "layer":
            return layer_norm_forward(x, weight + norm.offset if norm.offset else weight, bias, norm.eps)[0]
        y, _ = rms_norm_forward(x, weight, norm.eps, norm.offset if len(norm.shape) == 1 else 0.0)
        return y


@dataclass(frozen=True, slots=True)
class _Normed:
    norm: _NormOf
    source: str
    target: str

    def __call__(self, step: Step, frame: Frame) -> None:
        frame[self.target] = self.norm(frame[self.source], step.versions, step.runs)


class _Linears:
    """Linear layers that read the same x, with what versions do to them."""

    def __init__(self, model: PreTrainedModel, linears: tuple[Linear, ...], effects: Mapping[str, Effects]) -> None:
        self.paths = [linear.path for linear in linears]
        self.effects = effects
        modules = [model.get_submodule(path) for path in self.paths]
        self.weights = [_weight(frozen_weight(module)) for module in modules]
        self.biases = [module._parameters.get("bias") for module in modules]

    def __call__(self, x: Tensor, versions: tuple[str, ...], runs: AdapterRuns) -> list[Tensor]:
        ys = list(forward(x, [self._layer(i, versions, runs) for i in range(len(self.paths))])[0])
        for i, path in enumerate(self.paths):
            for version, rows in _with_whole(self.effects, versions, runs, path):
                weight, record = self.effects[version].whole[path, "weight"], self._record(version, path)
                bias = self.biases[i] if record.bias is None else record.bias
                ys[i][rows] = functional.linear(x[rows], weight, bias)
        return ys

    def _layer(self, i: int, versions: tuple[str, ...], runs: AdapterRuns) -> LinearLayer:
        records = tuple(self._record(version, self.paths[i]) for version in versions)
        if all(record is NOTHING for record in records):
            return LinearLayer(weight=self.weights[i], bias=self.biases[i])
        return LinearLayer(weight=self.weights[i], bias=self.biases[i], records=records, runs=runs)

    def _record(self, version: str, path: str) -> LinearDelta:
        return self.effects[version].linear.get(path, NOTHING)


@dataclass(frozen=True, slots=True)
class _Products:
    linears: _Linears
    instruction: Product

    def __call__(self, step: Step, frame: Frame) -> None:
        ys = self.linears(frame[self.instruction.source], step.versions, step.runs)
        frame[self.instruction.target] = ys if self.instruction.target in _LISTS else ys[0]


_LISTS = ("qkv", "inner")


class _Embedding:
    """The stream, from ids or from what stands in for their embeddings."""

    def __init__(self, model: PreTrainedModel, instruction: Embed, effects: Mapping[str, Effects]) -> None:
        part = instruction.embedding
        module: Any = model.get_submodule(part.path)
        self.path, self.effects = part.path, effects
        self.table = cast(Tensor, module._parameters["weight"])
        own = getattr(module, "scalar_embed_scale", 1.0)  # Gemma's table rounds it to its own dtype
        self.own_multiplier = float(torch.tensor(own, dtype=self.table.dtype))
        self.multiplier = part.multiplier / own
        positions = part.positions
        self.offset = 0 if positions is None else positions.offset
        learned = None if positions is None else model.get_submodule(positions.path)._parameters["weight"]
        self.positions = cast("Tensor | None", learned)
        self.norm = None if part.norm is None else _NormOf(model, part.norm, effects)

    def __call__(self, step: Step, frame: Frame) -> None:
        given = frame["given"]
        h = given if given.is_floating_point() else self._looked_up(step, given)
        h = h if self.multiplier == 1 else h * self.multiplier
        if self.positions is not None:
            h = h + self.positions[step.positions + self.offset]
        frame[STREAM] = h if self.norm is None else self.norm(h, step.versions, step.runs)

    def _looked_up(self, step: Step, ids: Tensor) -> Tensor:
        h = self._scaled(functional.embedding(ids, self.table))
        for number, start, stop in step.runs.runs:
            effects, rows = self.effects[step.versions[number]], slice(start, stop)
            whole = effects.whole.get((self.path, "weight"))
            if whole is not None:
                h[rows] = self._scaled(functional.embedding(ids[rows], whole))
            if self.path in effects.rows:
                index, values = effects.rows[self.path]
                h[rows] = look_up_rows(ids[rows], h[rows], index, self._scaled(values.to(h.dtype)))
            if effects.table is not None:
                record = replace(effects.table, scale=effects.table.scale * self.own_multiplier)
                h[rows] = apply_embedding(record, ids[rows], h[rows])
        return h

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.own_multiplier == 1 else rows * self.own_multiplier


class _HeadsOf:
    """Queries, keys and values made of a product's outputs; keys and values go to their pages."""

    def __init__(self, model: PreTrainedModel, instruction: Heads) -> None:
        part = instruction.attention
        self.instruction, self.part = instruction, part
        norms = (part.q_norm, part.k_norm)
        self.q_norm, self.k_norm = (None if norm is None else _NormOf(model, norm, {}) for norm in norms)

    def __call__(self, step: Step, frame: Frame) -> None:
        part, ys = self.part, frame[self.instruction.source]
        if part.clip is not None:
            ys = [y.clamp_(-part.clip, part.clip) for y in ys]
        q, k, v = part.heads.split(ys)
        q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if part.rotary is not None:
            cos, sin = step.shared[part.rotary]
            q, k = (_rotated(x, cos, sin, part.rotary.interleaved) for x in (q, k))
        if part.temperature is not None:
            turns = torch.floor(step.positions / part.temperature.original_max_positions)
            q = q * (1 + part.temperature.beta * torch.log1p(turns))[:, None, None].to(q.dtype)
        append(step, self.instruction.layer, k, v)
        frame[self.instruction.target] = q

    def _normed(self, norm: _NormOf | None, heads: Tensor) -> Tensor:
        """(n, heads, d) over each head, or over all of them at once."""
        if norm is None:
            return heads
        over_all = len(norm.norm.shape) == 1 and norm.norm.shape[0] != heads.shape[-1]
        x = heads.flatten(1) if over_all else heads
        return norm.normed(x, *norm.own).view(heads.shape)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return rotate(heads.transpose(0, 1)[None], cos, sin, interleaved=interleaved)[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class _Attended:
    instruction: Attend

    def __call__(self, step: Step, frame: Frame) -> None:
        i = self.instruction
        frame[i.target] = paged_attention(step, i.layer, frame[i.source], i.attention)


@dataclass(frozen=True, slots=True)
class _Activated:
    instruction: Activate

    def __call__(self, step: Step, frame: Frame) -> None:
        part, ys = self.instruction.part, frame[self.instruction.source]
        if not part.gated:
            y = activation_forward(ys[0], part.activation)
        else:
            gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
            in_one = part.activation in GATED
            y = glu_forward(gate, up, part.activation) if in_one else activation_forward(gate, part.activation) * up
        frame[self.instruction.target] = y


@dataclass(frozen=True, slots=True)
class _Changed:
    instruction: Change
    effects: Mapping[str, Effects]

    def __call__(self, step: Step, frame: Frame) -> None:
        i = self.instruction
        for number, start, stop in step.runs.runs:
            record = self.effects[step.versions[number]].residual.get(i.site)
            if record is not None:
                rows, y = slice(start, stop), frame[i.target]
                change = residual_change(record, (y if record.where == "serial" else frame[i.source])[rows])
                y[rows] = y[rows] + change.to(y.dtype)


@dataclass(frozen=True, slots=True)
class _ByModule:
    module: Any
    instruction: Own

    def __call__(self, step: Step, frame: Frame) -> None:
        y = self.module(frame[self.instruction.source][None])
        frame[self.instruction.target] = (y[0] if isinstance(y, tuple) else y)[0]


@dataclass(frozen=True, slots=True)
class _Added:
    instruction: Add

    def __call__(self, step: Step, frame: Frame) -> None:
        half, multiplier = frame[self.instruction.source], self.instruction.multiplier
        frame[STREAM] = frame[STREAM] + (half if multiplier == 1 else half * multiplier)


class _LogitsOf:
    """The logits of the rows that are kept, in float32."""

    def __init__(self, model: PreTrainedModel, instruction: Logits, effects: Mapping[str, Effects]) -> None:
        self.head, self.effects = instruction.head, effects
        self.norm = None if instruction.norm is None else _NormOf(model, instruction.norm, effects)
        self.linears = _Linears(model, (self.head.linear,), effects)

    def __call__(self, step: Step, frame: Frame) -> None:
        x, runs = frame[STREAM][step.kept], step.kept_runs
        if not len(x):
            frame["logits"] = x.new_empty(0, self.head.linear.out_features, dtype=torch.float32)
            return
        x = x if self.norm is None else self.norm(x, step.versions, runs)
        [y] = self.linears(x, step.versions, runs)
        for number, start, stop in runs.runs:
            rows = self.effects[step.versions[number]].rows.get(self.head.linear.path)
            if rows is not None:
                y[start:stop] = project_rows(x[start:stop], y[start:stop], *rows, self.linears.biases[0])
        y = y.float() * self.head.scale if self.head.scale != 1 else y.float()
        frame["logits"] = y if self.head.softcap is None else self.head.softcap * torch.tanh(y / self.head.softcap)


def _weight(weight: FrozenWeight) -> Weight:
    """A dense weight as the tensor that it is, the model's own."""
    return weight.dense() if isinstance(weight, DenseWeight) else weight


def _with_whole(
    effects: Mapping[str, Effects], versions: tuple[str, ...], runs: AdapterRuns, path: str
) -> Iterator[tuple[str, slice]]:
    """The versions that have parameters of their own at a path, and their rows."""
    for number, start, stop in runs.runs:
        whole = effects[versions[number]].whole
        if whole and ((path, "weight") in whole or (path, "bias") in whole):
            yield versions[number], slice(start, stop)
