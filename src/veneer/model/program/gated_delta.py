"""Gated delta rule: convolution, scan and gated norm between two products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from veneer.errors import DescriptionError
from veneer.model.blueprint.parts import DeltaNet
from veneer.model.blueprint.read_delta_net import DECAYS
from veneer.model.program.acting import Acting, ActingNorm
from veneer.model.program.convolve import acting_kernel, previous_of
from veneer.model.program.operation import Frame, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, PackedPositions, Tape, Trained
from veneer.ops.state.conv import ConvKernel, GatedInput, conv_backward, conv_forward
from veneer.ops.state.scan import ScanInput, scan

UNIT_EPS = 1e-6  # added to the square of a query's or key's length, as in transformers and FLA


class Inner(NamedTuple):
    """Products of the layer's input for n tokens: queries, keys and values in one, gates z, b and a."""

    qkv: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """Kernel of the convolution, norm, and for each head the rate exp(A_log) and the bias of the decay."""

    kernel: ConvKernel
    norm: ActingNorm
    rate: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta(Trained):
    """Gated delta rule: ``target = norm(scan(conv(q, k, v), b, a)) · silu(z)``, of the parts of ``source``.

    A token reads the states of its own sequence alone. All of it is computed again in the backward pass.
    """

    cheap = True

    part: DeltaNet
    source: Register
    target: Register

    def forward(self, weights: DeltaWeights, rows: PassRows, frame: Frame) -> None:
        raise DescriptionError(f"{self.part.path} keeps a state for which there are no pages: use transformers' caches")

    @property
    def gives_output(self) -> bool:
        return True

    def acting(self, at: Acting) -> DeltaWeights | None:
        kernel, norm = acting_kernel(at, self.part.conv, "silu"), at.norm(self.part.norm)
        held = at.module(self.part.path)._parameters
        log_rate, bias = (cast(Tensor, held[name]) for name in DECAYS)
        if kernel is None or norm is None or log_rate.requires_grad or bias.requires_grad:
            return None
        return DeltaWeights(kernel, norm, log_rate.float().exp(), bias.float())

    def train(self, weights: DeltaWeights, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        inner, at = self._split(self.source.read(frame)), run.positions
        seen = conv_forward(GatedInput(inner.qkv), weights.kernel, previous_of(run))
        self.target.write(frame, [self._mixed(weights, inner._replace(qkv=seen), at)])
        return ()

    def back(self, weights: DeltaWeights, tape: Tape) -> Tensor:
        """Add the gradient of the source to the tape, and return the operation's output, which is computed again."""
        [dy], inner = tape.take(self.target), self._split(tape.value(self.source))
        given, previous = GatedInput(inner.qkv), previous_of(tape.run)
        seen = inner._replace(qkv=conv_forward(given, weights.kernel, previous))
        with torch.enable_grad():
            leaves = Inner(*(x.detach().requires_grad_() for x in seen))
            y = self._mixed(weights, leaves, tape.run.positions)
            found = Inner(*torch.autograd.grad(y, leaves, dy))
        dqkv, _ = conv_backward(found.qkv, given, weights.kernel, previous, owns_dy=True)
        tape.give(self.source, self._join(found._replace(qkv=dqkv.x)))
        return y.detach()

    def _mixed(self, weights: DeltaWeights, inner: Inner, at: PackedPositions) -> Tensor:
        """Return the output of the scan after norm and gate, (n, width). ``inner`` holds queries, keys and values after
        the convolution.
        """
        part, wide = self.part, torch.promote_types(inner.qkv.dtype, torch.float32)
        keys, n = part.n_k_heads * part.k_width, len(inner.qkv)
        q, k, v = torch.split(inner.qkv, [keys, keys, part.width], dim=1)
        q, k = (_of_length_1(x.reshape(n, part.n_k_heads, part.k_width).to(wide)) for x in (q, k))
        decay = -weights.rate.to(wide) * softplus(inner.a.to(wide) + weights.bias.to(wide))
        beta = inner.b.sigmoid() * part.beta_scale
        given = ScanInput(q * part.k_width**-0.5, k, v.reshape(n, part.n_v_heads, part.v_width), decay, beta)
        heads = scan(given, at.cu_seqlens, delta=True, forks=at.forks).to(wide)
        normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + weights.norm.eps)
        normed = (weights.norm.weight * normed.to(inner.z.dtype)).flatten(1)
        return (normed * silu(inner.z.to(wide))).to(inner.z.dtype)

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
    def _widths(self) -> list[int]:
        """Widths of the query, key, values and gates of one key head."""
        part = self.part
        values = part.width // part.n_k_heads
        return [part.k_width, part.k_width, values, values]


def _of_length_1(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
