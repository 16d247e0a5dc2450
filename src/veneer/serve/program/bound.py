"""Instructions of a program bound to a model's weights, each a few calls of ops.

Rows of several adapter versions are computed together, each run of rows with its own records. If a version replaces a
weight, its rows are computed separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from veneer.adapters.peft_model import PeftModel
from veneer.model.blueprint.parts import Attention
from veneer.model.blueprint.rotary import Rotary
from veneer.model.coded.embedding import CodedEmbedding
from veneer.ops.activation import activation_forward
from veneer.ops.glu import ACTIVATIONS as GATED
from veneer.ops.glu import glu_forward
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.packed import ROWS, PackedWeight, over_rows
from veneer.ops.rotary import rotate
from veneer.ops.sample import likeliest
from veneer.records.linear import apply_embedding
from veneer.records.token_rows import look_up_rows, project_rows
from veneer.serve.program.bottleneck import Bottleneck
from veneer.serve.program.effects import Effects
from veneer.serve.program.norms import BoundNorm
from veneer.serve.program.products import Linears, divided
from veneer.serve.program.program import (
    STREAM,
    Activate,
    Add,
    Attend,
    ByOwnModule,
    Embed,
    Heads,
    Instruction,
    Logits,
    Product,
    StreamChange,
)
from veneer.serve.program.step import PassRows

Frame = dict[str, Any]
"""The registers of a pass."""
Bound = Callable[[PassRows, Frame], None]


@dataclass(frozen=True, slots=True)
class Normed:
    norm: BoundNorm
    source: str
    target: str

    def __call__(self, step: PassRows, frame: Frame) -> None:
        frame[self.target] = self.norm(frame[self.source], step.versions, step.runs)


@dataclass(frozen=True, slots=True)
class Products:
    linears: Linears
    instruction: Product

    def __call__(self, step: PassRows, frame: Frame) -> None:
        ys = self.linears(frame[self.instruction.source], step.versions, step.runs)
        frame[self.instruction.target] = ys if self.instruction.target in LISTS else ys[0]


LISTS = ("qkv", "inner")
"""The registers that hold several tensors."""
LOGIT_BYTES = 1 << 25
"""Of logits at a time: 340 rows of 49,152 in 16 bits, 110 of 151,936."""


class BoundEmbedding:
    """Stream from ids, or from embeddings given in their place."""

    def __init__(self, model: PreTrainedModel, instruction: Embed, effects: Mapping[str, Effects]) -> None:
        part = instruction.embedding
        module: Any = model.get_submodule(part.path)
        self.path, self.effects = part.path, effects
        coded = isinstance(module, CodedEmbedding)
        self.table = cast(Tensor, module.dense_table() if coded else module._parameters["weight"])
        own = torch.tensor(part.own_multiplier, dtype=self.table.dtype)  # Gemma's table rounds it to its own dtype
        self.own_multiplier = float(own)
        self.multiplier = part.multiplier / part.own_multiplier
        positions = part.positions
        self.offset = 0 if positions is None else positions.offset
        learned = None if positions is None else model.get_submodule(positions.path)._parameters["weight"]
        self.positions = cast("Tensor | None", learned)
        self.norm = None if part.norm is None else BoundNorm(model, part.norm, effects)

    def __call__(self, step: PassRows, frame: Frame) -> None:
        given = frame["given"]
        h = given.clone() if given.is_floating_point() else self._looked_up(step, given)
        h = h if self.multiplier == 1 else h * self.multiplier
        if self.positions is not None:
            h = h + self.positions[step.positions + self.offset]
        frame[STREAM] = h if self.norm is None else self.norm(h, step.versions, step.runs)

    def _looked_up(self, step: PassRows, ids: Tensor) -> Tensor:
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
                record = effects.table.with_adds_times(self.own_multiplier)
                h[rows] = apply_embedding(record, ids[rows], h[rows], linear=_each_alone)
        return h

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.own_multiplier == 1 else rows * self.own_multiplier


def _each_alone(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (n, i) times a weight (o, i). torch's product of a row may depend on how many rows there are."""
    if not x.is_cpu or x.dtype not in ROWS:
        return functional.linear(x, weight, bias)
    return PackedWeight.pack(weight).matmul(x, onto=over_rows(bias, len(x)))


class HeadsOf:
    """Queries, keys and values from a product's outputs; keys and values are appended to their pages."""

    def __init__(
        self, model: PreTrainedModel, instruction: Heads, turns: Mapping[Rotary, tuple[Tensor, Tensor]]
    ) -> None:
        part = instruction.attention
        self.instruction, self.part, self.turns = instruction, part, turns
        norms = (part.q_norm, part.k_norm)
        self.q_norm, self.k_norm = (None if norm is None else BoundNorm(model, norm, {}) for norm in norms)

    def __call__(self, step: PassRows, frame: Frame) -> None:
        part, ys = self.part, frame[self.instruction.source]
        if part.clip is not None:
            ys = [y.clamp_(-part.clip, part.clip) for y in ys]
        q, k, v = part.heads.split(ys)
        q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if part.rotary is not None:
            cos, sin = step.turns(self.turns[part.rotary], part.rotary)
            q, k = (_rotated(x, cos, sin, part.rotary.interleaved) for x in (q, k))
        if part.temperature is not None:
            turns = torch.floor(step.positions / part.temperature.original_max_positions)
            q = q * (1 + part.temperature.beta * torch.log1p(turns))[:, None, None].to(q.dtype)
        step.cache.append(self.instruction.layer, k, v, step.rows)
        if step.written is not None:
            step.written.append((k.clone(), v.clone()))  # their memory may be the next layer's too
        frame[self.instruction.target] = q

    def _normed(self, norm: BoundNorm | None, heads: Tensor) -> Tensor:
        """(n, heads, d) over each head, or over all of them at once."""
        if norm is None:
            return heads
        over_all = len(norm.norm.shape) == 1 and norm.norm.shape[0] != heads.shape[-1]
        x = heads.flatten(1) if over_all else heads
        return norm.normed(x, *norm.own).view(heads.shape)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return rotate(heads.transpose(0, 1)[None], cos, sin, interleaved=interleaved, in_place=True)[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Attended:
    instruction: Attend

    def __call__(self, step: PassRows, frame: Frame) -> None:
        i = self.instruction
        frame[i.target] = step.cache.attend(i.layer, frame[i.source], step.rows, i.attention)


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Heads, and the attention of their queries."""

    heads: HeadsOf
    attended: Attended

    @property
    def part(self) -> Attention:
        """Description of the attention."""
        return self.heads.part

    def __call__(self, step: PassRows, frame: Frame) -> None:
        self.heads(step, frame)
        self.attended(step, frame)


@dataclass(frozen=True, slots=True)
class Activated:
    instruction: Activate

    def __call__(self, step: PassRows, frame: Frame) -> None:
        part, ys = self.instruction.part, frame[self.instruction.source]
        if not part.gated:
            y = activation_forward(ys[0], part.activation)
        else:
            gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
            in_one = part.activation in GATED
            y = glu_forward(gate, up, part.activation) if in_one else activation_forward(gate, part.activation) * up
        frame[self.instruction.target] = y


@dataclass(frozen=True, slots=True)
class Changed:
    instruction: StreamChange
    bottlenecks: Mapping[str, Mapping[str, Bottleneck]]

    def __call__(self, step: PassRows, frame: Frame) -> None:
        i = self.instruction
        for number, start, stop in step.runs.runs:
            bottleneck = self.bottlenecks[step.versions[number]].get(i.site)
            if bottleneck is not None:
                rows, y = slice(start, stop), frame[i.target]
                bottleneck.change((y if bottleneck.reads_output else frame[i.source])[rows], y[rows])


@dataclass(frozen=True, slots=True)
class IntoStream:
    """Product whose output is added directly to the stream, if nothing changes it before."""

    product: Product
    change: StreamChange
    add: Add


@dataclass(frozen=True, slots=True)
class Seeing:
    """Heads, and the attention of their queries."""

    heads: Heads
    attend: Attend


Joined = Instruction | IntoStream | Seeing


def joined(instructions: Sequence[Instruction]) -> Iterator[Joined]:
    """Iterate over the instructions, joining those that can be computed at once."""
    at = 0
    while at < len(instructions):
        match instructions[at : at + 3]:
            case (Product() as product, StreamChange() as change, Add(multiplier=1.0) as add) if (
                len(product.linears) == 1
            ):
                yield IntoStream(product, change, add)
                at += 3
            case (Heads() as heads, Attend() as attend, *_):
                yield Seeing(heads, attend)
                at += 2
            case _:
                yield instructions[at]
                at += 1


class IntoStreamOf:
    def __init__(
        self, linears: Linears, instruction: IntoStream, bottlenecks: Mapping[str, Mapping[str, Bottleneck]]
    ) -> None:
        self.linears, self.source, self.site = linears, instruction.product.source, instruction.change.site
        self.bottlenecks, self.beside = bottlenecks, instruction.change.source
        self.read = (STREAM, self.source, self.beside)
        self.apart = (
            Products(linears, instruction.product),
            Changed(instruction.change, bottlenecks),
            Added(instruction.add),
        )

    def __call__(self, step: PassRows, frame: Frame) -> None:
        if not self.linears.adds():
            self._apart(step, frame)
            return
        apart = tuple(self.site in self.bottlenecks[v] or not self.linears.adds(v) for v in step.versions)
        h, x = frame[STREAM], frame[self.source]
        if not any(apart):
            frame[STREAM] = self.linears.onto(h, x, step.versions, step.runs)
            return
        if not h.is_cpu:  # as in `Linears`
            self._apart(step, frame)
            return
        plain, others = divided(step.runs, apart)
        if not len(plain.rows):
            self._apart(step, frame)
            return
        out = torch.empty_like(h)
        out[plain.rows] = self.linears.onto(h[plain.rows], x[plain.rows], step.versions, plain.runs)
        own = {name: value[others.rows] for name, value in frame.items() if name in self.read}
        self._apart(replace(step, runs=others.runs), own)
        out[others.rows] = own[STREAM]
        frame[STREAM] = out

    def _apart(self, step: PassRows, frame: Frame) -> None:
        for instruction in self.apart:
            instruction(step, frame)


class ByModule:
    """Output of the model's own module, without the adapters that the model itself has."""

    def __init__(self, model: PreTrainedModel, instruction: ByOwnModule) -> None:
        self.model, self.instruction = model, instruction
        self.module: Any = model.get_submodule(instruction.path)

    def __call__(self, step: PassRows, frame: Frame) -> None:
        # The model becomes a PeftModel when the first adapter takes the general runner, or comes as one.
        alone = self.model.adapter_state.base_alone() if isinstance(self.model, PeftModel) else nullcontext()
        with alone:
            y = self.module(frame[self.instruction.source][None])
        frame[self.instruction.target] = (y[0] if isinstance(y, tuple) else y)[0]


@dataclass(frozen=True, slots=True)
class Added:
    instruction: Add

    def __call__(self, step: PassRows, frame: Frame) -> None:
        half, multiplier = frame[self.instruction.source], self.instruction.multiplier
        frame[STREAM] = frame[STREAM] + (half if multiplier == 1 else half * multiplier)


class LogitsOf:
    """Logits of the kept rows."""

    def __init__(
        self, model: PreTrainedModel, instruction: Logits, linears: Linears, effects: Mapping[str, Effects]
    ) -> None:
        self.head, self.linears, self.effects = instruction.head, linears, effects
        self.norm = None if instruction.norm is None else BoundNorm(model, instruction.norm, effects)

    def __call__(self, step: PassRows, frame: Frame) -> None:
        frame["logits"] = LogitRows(self, frame[STREAM], step)

    def of(self, h: Tensor, rows: Tensor, runs: AdapterRuns, versions: tuple[str, ...]) -> Tensor:
        """Return the logits of some rows of the stream, with their own runs, in the dtype in which they arise."""
        y = self.uncapped(h, rows, runs, versions)
        return y if self.head.softcap is None else self.head.softcap * torch.tanh(y.float() / self.head.softcap)

    def uncapped(self, h: Tensor, rows: Tensor, runs: AdapterRuns, versions: tuple[str, ...]) -> Tensor:
        """Return the logits before their soft cap, which keeps their order."""
        x = self.hidden(h, rows, runs, versions)
        [y] = self.linears(x, versions, runs)
        for number, start, stop in runs.runs:
            own = self.effects[versions[number]].rows.get(self.head.linear.path)
            if own is not None:
                bias = self.linears.biases[0]
                y[start:stop] = project_rows(x[start:stop], y[start:stop], *own, bias, _each_alone)
        return y.float() * self.head.scale if self.head.scale != 1 else y

    def hidden(self, h: Tensor, rows: Tensor, runs: AdapterRuns, versions: tuple[str, ...]) -> Tensor:
        """Return the hidden states of some rows of the stream, as the head reads them."""
        x = h[rows]
        return x if self.norm is None else self.norm(x, versions, runs)


class LogitRows:
    """Kept and read rows of a pass. Logits are computed when they are asked for, some at a time."""

    def __init__(self, of: LogitsOf, stream: Tensor, step: PassRows) -> None:
        self._of, self._stream, self._step = of, stream, step

    @torch.no_grad()
    def hidden(self) -> Tensor:
        """Return the hidden states (read, width)."""
        step = self._step
        return self._of.hidden(self._stream, step.read, step.read_runs, step.versions)

    def logits(self) -> Tensor:
        """Return all logits (kept, vocabulary), in float32."""
        return torch.cat([self._stream.new_empty(0, self._width).float(), *(each.float() for each in self.blocks())])

    def blocks(self) -> Iterator[Tensor]:
        """Return the logits of the rows in order, of at most `LOGIT_BYTES` at a time."""
        at_once = max(1, LOGIT_BYTES // (self._width * self._stream.itemsize))
        for first in range(0, len(self._step.kept), at_once):
            yield self._block(first, min(first + at_once, len(self._step.kept)))

    @torch.no_grad()
    def _block(self, first: int, stop: int) -> Tensor:
        step = self._step
        return self._of.of(self._stream, step.kept[first:stop], step.kept_runs.part(first, stop), step.versions)

    @property
    def _width(self) -> int:
        return self._of.head.linear.out_features


@dataclass(frozen=True, slots=True)
class Picked:
    """Likeliest tokens after the picked rows."""

    logits: LogitsOf

    def __call__(self, step: PassRows, frame: Frame) -> None:
        if len(step.picked):
            logits = self.logits.uncapped(frame[STREAM], step.picked, step.picked_runs, step.versions)
            step.tokens.copy_(likeliest(logits))
