"""Gated delta rule: convolution, scan and gated norm between two products."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from veneer.model.blueprint.parts import DeltaNet
from veneer.model.blueprint.read_delta_net import DECAYS
from veneer.model.program.acting import Acting, ActingNorm
from veneer.model.program.binding import Binding
from veneer.model.program.convolve import acting_kernel, previous_of
from veneer.model.program.operation import Frame, PageState, PassKind, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, PackedPositions, Tape, Trained
from veneer.ops.cpu.step import StepProgram
from veneer.ops.state.conv import ConvKernel, GatedInput, conv_backward, conv_forward
from veneer.ops.state.delta import DeltaInput, DeltaWeights, StateShape, of_length_1
from veneer.ops.state.scan import ScanInput, scan


class Inner(NamedTuple):
    """Products of the layer's input for n tokens: queries, keys and values in one, gates z, b and a."""

    qkv: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


class HeadsAt(NamedTuple):
    """Place of the heads' values in tensor number ``tensor`` of the source: the first head's first value, the values
    from one key head to the next, and the values of a head.
    """

    tensor: int
    first: int
    apart: int
    width: int


@dataclass(frozen=True, slots=True)
class DeltaTraining:
    """Kernel of the convolution, norm, and for each head the rate exp(A_log) and the bias of the decay."""

    kernel: ConvKernel
    norm: ActingNorm
    rate: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta(Trained):
    """Gated delta rule: ``target = norm(scan(conv(q, k, v), b, a)) · silu(z)``, of the parts of ``source``.

    ``layer`` is the index of this scan in the pages, which store the states of sequences. In training a token reads
    the states of its own sequence alone. The scan's output is kept; all else is computed again in the backward pass.
    """

    cheap = True

    layer: int
    part: DeltaNet
    source: Register
    target: Register

    @property
    def state(self) -> PageState:
        return PageState(self._shape)

    def bind(self, to: Binding) -> DeltaWeights:
        part, held = self.part, to.model.get_submodule(self.part.path)._parameters
        conv = to.model.get_submodule(part.conv)._parameters
        norm = cast(Tensor, to.model.get_submodule(part.norm.path)._parameters["weight"])
        log_rate, bias = (cast(Tensor, held[name]).detach().float() for name in DECAYS)
        kernel = ConvKernel(cast(Tensor, conv["weight"])[:, 0], conv["bias"], "silu")
        return DeltaWeights(kernel, norm, part.norm.eps, log_rate.exp(), bias, part.beta_scale)

    def forward(self, weights: DeltaWeights, rows: PassRows, frame: Frame) -> None:
        outputs = self.source.read(frame)
        given = DeltaInput(*(_heads(outputs[at.tensor], at, self.part.n_k_heads) for at in self._places))
        self.target.write(frame, [rows.cache.scan(self.layer, given, weights, rows.rows)])

    def emit(self, weights: DeltaWeights, step: StepProgram) -> bool:
        first = step.first_of(self.source)
        parts = [[first + at.tensor, at.first, at.apart] for at in self._places]
        step.add_delta(self._shape, weights, self.layer, parts, step.first_of(self.target))
        return True

    def fits(self, kind: PassKind) -> bool:
        return kind.in_pages

    @property
    def gives_output(self) -> bool:
        return True

    def acting(self, at: Acting) -> DeltaTraining | None:
        kernel, norm = acting_kernel(at, self.part.conv, "silu"), at.norm(self.part.norm)
        held = at.module(self.part.path)._parameters
        log_rate, bias = (cast(Tensor, held[name]) for name in DECAYS)
        if kernel is None or norm is None or log_rate.requires_grad or bias.requires_grad:
            return None
        return DeltaTraining(kernel, norm, log_rate.float().exp(), bias.float())

    def train(self, weights: DeltaTraining, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        inner, at = self._split(self.source.read(frame)), run.positions
        seen = conv_forward(GatedInput(inner.qkv), weights.kernel, previous_of(run))
        heads = self._scanned(weights, inner._replace(qkv=seen), at)
        self.target.write(frame, [self._gated(weights, heads, inner.z)])
        return (heads,)

    def again(self, weights: DeltaTraining, run: ActingStretch, frame: Frame, kept: Kept) -> Kept:
        heads = cast(Tensor, kept[0])
        self.target.write(frame, [self._gated(weights, heads, self._split(self.source.read(frame)).z)])
        return kept

    def back(self, weights: DeltaTraining, tape: Tape) -> Tensor:
        """Add the gradient of the source to the tape, and return the operation's output, which is computed again."""
        [dy], inner = tape.take(self.target), self._split(tape.value(self.source))
        given, previous = GatedInput(inner.qkv), previous_of(tape.run)
        seen = inner._replace(qkv=conv_forward(given, weights.kernel, previous))
        with torch.enable_grad():
            leaves = Inner(*(x.detach().requires_grad_() for x in seen))
            heads = self._scanned(weights, leaves, tape.run.positions, tape.kept[0])
            y = self._gated(weights, heads, leaves.z)
            found = Inner(*torch.autograd.grad(y, leaves, dy))
        dqkv, _ = conv_backward(found.qkv, given, weights.kernel, previous, owns_dy=True)
        tape.give(self.source, self._join(found._replace(qkv=dqkv.x)))
        return y.detach()

    def _scanned(
        self, weights: DeltaTraining, inner: Inner, at: PackedPositions, known: Tensor | None = None
    ) -> Tensor:
        """Return the output of the scan, (n, heads, v_width). ``inner`` holds queries, keys and values after the
        convolution. ``known`` is the output of the forward pass.
        """
        part, wide = self.part, torch.promote_types(inner.qkv.dtype, torch.float32)
        keys, n = part.n_k_heads * part.k_width, len(inner.qkv)
        q, k, v = torch.split(inner.qkv, [keys, keys, part.width], dim=1)
        q, k = (of_length_1(x.reshape(n, part.n_k_heads, part.k_width).to(wide)) for x in (q, k))
        decay = -weights.rate.to(wide) * softplus(inner.a.to(wide) + weights.bias.to(wide))
        beta = inner.b.sigmoid() * part.beta_scale
        given = ScanInput(q * part.k_width**-0.5, k, v.reshape(n, part.n_v_heads, part.v_width), decay, beta)
        return scan(given, at.cu_seqlens, delta=True, forks=at.forks, known=known)

    def _gated(self, weights: DeltaTraining, heads: Tensor, z: Tensor) -> Tensor:
        """Return the output of the scan after norm and gate, (n, width)."""
        heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
        normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + weights.norm.eps)
        normed = (weights.norm.weight * normed.to(z.dtype)).flatten(1)
        return (normed * silu(z.to(heads.dtype))).to(z.dtype)

    def _split(self, outputs: list[Tensor]) -> Inner:
        if not self.part.by_head:
            *qkv, z, b, a = outputs
            return Inner(qkv[0] if len(qkv) == 1 else torch.cat(qkv, dim=1), z, b, a)
        joined, gates = (x.view(len(x), self.part.n_k_heads, -1) for x in outputs)
        parts = [x.flatten(1) for x in torch.split(joined, self._widths, dim=2)]
        b, a = (x.flatten(1) for x in gates.chunk(2, dim=2))
        return Inner(torch.cat(parts[:3], dim=1), parts[3], b, a)

    def _join(self, inner: Inner) -> list[Tensor]:
        """Return the gradients ``inner`` in the layout of the source's tensors, as the inverse of `_split`."""
        if not self.part.by_head:
            widths = list(self.source.widths[:-3])
            return [*torch.split(inner.qkv, widths, dim=1), inner.z, inner.b, inner.a]
        heads, keys = self.part.n_k_heads, self.part.n_k_heads * self.part.k_width
        parts = (*torch.split(inner.qkv, [keys, keys, self.part.width], dim=1), inner.z)
        return [
            torch.cat([x.reshape(len(x), heads, -1) for x in each], dim=2).flatten(1) for each in (parts, inner[2:])
        ]

    @property
    def _shape(self) -> StateShape:
        part = self.part
        return StateShape(part.n_k_heads, part.n_v_heads, part.k_width, part.v_width, part.kernel)

    @property
    def _places(self) -> list[HeadsAt]:
        """Places of queries, keys, values, gates z, b and a in the source."""
        group = self.part.n_v_heads // self.part.n_k_heads
        widths, keys = [*self._widths, group, group], self.part.n_k_heads * self.part.k_width
        if self.part.by_head:
            firsts, lengths = [*accumulate(widths[:3], initial=0), 0, group], [sum(widths[:4])] * 4 + [2 * group] * 2
            return [HeadsAt(int(i > 3), *each) for i, each in enumerate(zip(firsts, lengths, widths, strict=True))]
        joined = len(self.source.widths) == 4
        firsts, tensors = [0, keys, 2 * keys] if joined else [0] * 3, [0] * 3 if joined else [0, 1, 2]
        last = tensors[-1] + 1
        places = zip([*tensors, last, last + 1, last + 2], [*firsts, 0, 0, 0], widths, strict=True)
        return [HeadsAt(tensor, first, width, width) for tensor, first, width in places]

    @property
    def _widths(self) -> list[int]:
        """Widths of the query, key, values and gates of one key head."""
        part = self.part
        values = part.width // part.n_k_heads
        return [part.k_width, part.k_width, values, values]


def _heads(x: Tensor, at: HeadsAt, n_heads: int) -> Tensor:
    """Return the heads' values (n, heads, width) in rows x, as a view."""
    strides = (x.stride(0), at.apart * x.stride(1), x.stride(1))
    return x.as_strided((len(x), n_heads, at.width), strides, x.storage_offset() + at.first * x.stride(1))
