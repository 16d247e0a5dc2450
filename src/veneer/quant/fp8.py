"""Frozen weight in 8-bit floats with a scale for each block, row or matrix: ``W = codes * scale``.

Sources: DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 3.3 (blocks of 128 by 128, ``weight_scale_inv``);
compressed-tensors' ``float-quantized`` (a scale for each row or matrix).
Difference from these formats: activations are not quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.scaled import ScaledCodes, powers
from veneer.quant.blocks import ScaledWeight
from veneer.quant.spec import FLOATS, Parts, not_finite, scale_problems, unreadable

NAME = "fp8"
BLOCK = (128, 128)
MATRIX_SCALE = "weight_scale"
"""AutoFP8's name of the scale of a matrix."""
CODINGS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
KINDS = tuple(CODINGS)
SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)
_FIRST_NAN = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""Smallest code, without its sign, that stands for no number: NaN, or e5m2's infinity."""


@dataclass(frozen=True, slots=True)
class Fp8Weight(ScaledWeight):
    """``W (o, i) = codes * scale``, with a scale for each ``block`` of rows and columns.

    If ``rounded``, the product is rounded to the scale's dtype, as compressed-tensors defines it.
    """

    codes: Float[Tensor, "o i"]
    scale: Tensor
    block: tuple[int, int]
    dtype: torch.dtype = torch.float32
    rounded: bool = False
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.scale.numel() * self.scale.element_size()

    @property
    def scaled(self) -> ScaledCodes:
        height, width = self.block
        rounding = self.scale.dtype if self.rounded else torch.float32
        return ScaledCodes(
            self.codes, self.scale, self.shape[1], width, CODINGS[self.codes.dtype], height=height, rounding=rounding
        )


@dataclass(frozen=True, slots=True)
class Fp8Spec:
    """Storage format of a matrix in FP8.

    If ``block`` is None, there is a scale for each row, or one for the whole matrix, according to the shape in the
    file. The name of the scale's tensor on disk ends in ``suffix``.
    """

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    kind: torch.dtype = torch.float8_e4m3fn
    block: tuple[int, int] | None = BLOCK
    suffix: str = "weight_scale_inv"
    scale_dtype: torch.dtype = torch.float32
    scale_shape: tuple[int, ...] | None = None
    rounded: bool = False
    compute_dtype: torch.dtype | None = None

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"weight": (self.kind, self.shape), "scale": (self.scale_dtype, self._scale_shape())}

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return codes and scales as transformers computes them: the codes are a block's values times
        ``largest / absmax``, where ``largest`` is FP8's largest value.

        Raises NonFiniteError.
        """
        height, width = self._block_of(self._scale_shape())
        (o, i), largest = self.shape, torch.finfo(self.kind).max
        padded = torch.nn.functional.pad(weight.float(), (0, -i % width, 0, -o % height))
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        absmax = blocks.abs().amax(dim=(1, 3))
        if not bool(absmax.isfinite().all()):
            raise not_finite(self.shape)
        # the inverse of a larger one is below the smallest normal number
        forward = (largest / absmax).clamp(max=1.0 / torch.finfo(torch.float32).smallest_normal)
        forward = torch.where(absmax > 0, forward, torch.ones_like(absmax))
        scale = self._stored(1.0 / forward)
        if self.scale_dtype != torch.float32:
            forward = 1.0 / powers(scale)
        codes = (blocks * forward[:, None, :, None]).clamp_(-largest, largest).to(self.kind)
        codes = codes.view(padded.shape)[:o, :i].contiguous()
        return {"weight": codes, "scale": scale.reshape(self._scale_shape())}

    def bind(self, parts: Parts) -> Fp8Weight:
        scale = parts["scale"]
        block = self._block_of(tuple(scale.shape))
        return Fp8Weight(parts["weight"], scale, block, self.dtype, self.rounded, self.compute_dtype)

    def owns(self, key: str) -> bool:
        return key in ("weight", self.suffix)

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        return {"weight": parts["weight"], self.suffix: parts["scale"]}

    def from_disk(self, tensors: Parts) -> tuple[Fp8Spec, dict[str, Tensor]]:
        if self.suffix not in tensors and MATRIX_SCALE in tensors:
            return replace(self, block=None, suffix=MATRIX_SCALE, scale_shape=()).from_disk(tensors)
        codes, scale = tensors.get("weight"), tensors.get(self.suffix)
        problems = _code_problems(codes, self.shape)
        if scale is None:
            problems.append(f"{self.suffix} is missing")
        else:
            fitting = self._fitting()
            if tuple(scale.shape) not in fitting:
                problems.append(
                    f"{self.suffix} has the shape {tuple(scale.shape)}, allowed: {' or '.join(map(str, fitting))}"
                )
            problems += scale_problems(self.suffix, scale, FLOATS if self.rounded else SCALES, powers)
        if problems or codes is None or scale is None:
            named = "weight_block_size and the modules left out in config.json"
            raise unreadable("FP8", self.shape, problems, named)
        spec = replace(self, kind=codes.dtype, scale_dtype=scale.dtype, scale_shape=tuple(scale.shape))
        return spec, {"weight": codes.contiguous(), "scale": scale.contiguous()}

    def _scale_shape(self) -> tuple[int, ...]:
        return self._grid() if self.scale_shape is None else self.scale_shape

    def _grid(self) -> tuple[int, int]:
        """Return the shape of the scales for a file that does not give it: one scale for each block or, if the format
        has no blocks, for each row.
        """
        height, width = self.block or (1, self.shape[1])
        return -(-self.shape[0] // height), -(-self.shape[1] // width)

    def _fitting(self) -> list[tuple[int, ...]]:
        o, _ = self.shape
        return [self._grid()] if self.block else [(), (1,), (1, 1), (o,), (o, 1)]

    def _block_of(self, scale_shape: tuple[int, ...]) -> tuple[int, int]:
        o, i = self.shape
        if self.block:
            return self.block
        return (o, i) if torch.Size(scale_shape).numel() == 1 else (1, i)

    def _stored(self, scale: Tensor) -> Tensor:
        """Return a scale in its dtype on disk, never zero.

        If scales are stored as powers of two (E8M0), they are rounded up, so that no value overflows.
        """
        if self.scale_dtype in FLOATS:
            return scale.clamp(min=torch.finfo(self.scale_dtype).smallest_normal).to(self.scale_dtype)
        tiny = torch.finfo(torch.float32).tiny
        exact = torch.pow(2.0, torch.ceil(torch.log2(scale.clamp(min=tiny)))).to(torch.float8_e8m0fnu)
        return exact.view(self.scale_dtype)


def quantize(weight: Float[Tensor, "o i"], *, compute_dtype: torch.dtype | None = None) -> Fp8Weight:
    """Return a weight in FP8 (e4m3) with blocks of 128 by 128. Raises NonFiniteError."""
    spec = Fp8Spec((weight.shape[0], weight.shape[1]), weight.dtype, compute_dtype=compute_dtype)
    return spec.bind(spec.quantize(weight))


def _code_problems(codes: Tensor | None, shape: tuple[int, int]) -> list[str]:
    if codes is None:
        return ["weight is missing"]
    if codes.dtype not in KINDS or tuple(codes.shape) != shape:
        return [f"weight is {codes.dtype} {tuple(codes.shape)}, it should be an 8-bit float {shape}"]
    unsigned = codes.contiguous().view(torch.uint8) & 0x7F
    return ["weight holds NaN or infinity"] if bool((unsigned >= _FIRST_NAN[codes.dtype]).any()) else []
