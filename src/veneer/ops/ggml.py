"""ggml's types of tensors, as GGUF files hold them: quantize a matrix row by row, dequantize it, and multiply by it.

Each row is cut into blocks of 32 values, or of 256 in the K types and IQ4_XS. A block holds a scale in float16, a
minimum too in the affine types, and each value's level; MXFP4 has an exponent for its scale. ggml's own
search for scale and levels is reproduced operation by operation. The bytes are those of llama.cpp's quantizer built for
x86-64.

Source: ggml-org/llama.cpp, ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from veneer.errors import ConfigError, NonFiniteError, ShapeError
from veneer.ops.code_groups import CodeGroups
from veneer.ops.dispatch import backends, implementation
from veneer.ops.ggml_types import GGML_TYPES, GgmlType
from veneer.ops.rows import listed_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def row_bytes(kind: str, columns: int) -> int:
    """Return the number of bytes of a row of ``columns`` values in ggml's type ``kind``, for example "Q4_K".

    Raises ConfigError (unknown type), ShapeError (the type's blocks do not divide a row).
    """
    ggml_type = _type(kind)
    if columns % ggml_type.block:
        raise ShapeError(f"{kind} holds rows of a multiple of {ggml_type.block} values; given rows of {columns}")
    return columns // ggml_type.block * ggml_type.n_bytes


def quantize_ggml(
    rows: Float[Tensor, "n c"],
    kind: str,
    importance: Float32[Tensor, " c"] | None = None,
    *,
    backend: str | None = None,
) -> UInt8[Tensor, "n bytes"]:
    """Return the bytes of each row of a matrix of float32, bfloat16 or float16 in ggml's type ``kind``.

    importance: the mean square of the inputs of each column (llama.cpp's importance matrix), which weighs the errors.
    F32, F16, BF16, Q8_0 and MXFP4 ignore it. F16 and BF16 round to nearest, ties to even.

    Raises ConfigError for an unknown type or a negative importance. Raises ShapeError for anything but a matrix of such
    a dtype, blocks that do not divide a row, or an importance of another length or dtype. Raises NonFiniteError for NaN
    or infinity in rows or importance, or values whose scale float16 cannot hold.
    """
    if rows.ndim != 2 or rows.dtype not in FLOATS:
        raise ShapeError(f"quantize_ggml takes a matrix of {_names()}, got {rows.dtype} {tuple(rows.shape)}")
    n_bytes = row_bytes(kind, rows.shape[1])
    if importance is not None:
        _check_importance(importance, rows.shape[1])
    if not rows.numel():
        return rows.new_empty(len(rows), n_bytes, dtype=torch.uint8)
    values = rows.detach().contiguous()
    packed, bad_row = implementation("ggml.quantize", rows.device, backend)(values, kind, importance)
    if bad_row >= 0:
        _raise_non_finite(rows, kind, bad_row)
    out: Tensor = packed.view(len(rows), n_bytes)
    return out


def dequantize_ggml(
    packed: UInt8[Tensor, "n bytes"],
    kind: str,
    order: Int[Tensor, " k"] | None = None,
    *,
    backend: str | None = None,
) -> Float32[Tensor, "k c"]:
    """Return the values of rows in ggml's type ``kind``: all of them, or those that ``order`` lists.

    Raises ConfigError (unknown type), ShapeError (bytes that are no whole row), IndexError (a row number out of range).
    """
    columns = _columns(packed, kind)
    order = None if order is None else listed_rows(order, len(packed))
    n_rows = len(packed) if order is None else len(order)
    if not n_rows * columns:
        return packed.new_empty(n_rows, columns, dtype=torch.float32)
    out: Tensor = implementation("ggml.dequantize", packed.device, backend)(packed.contiguous(), kind, order)
    return out


def matmul_ggml(
    x: Float[Tensor, "n i"],
    packed: UInt8[Tensor, "o bytes"],
    kind: str,
    order: Int[Tensor, " o"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "n o"]:
    """Return ``x Wᵀ`` in x's dtype, for a W in ggml's type ``kind``. If ``order`` is given, row r of W is row
    ``order[r]`` of ``packed``.

    Use it for few rows of x: W is decoded again for every 16 of them. Sums and decoded values are float32.

    Raises ConfigError (unknown type), ShapeError (bytes that are not whole rows, or do not fit x), IndexError (a row
    number out of range).
    """
    columns = _columns(packed, kind)
    order = None if order is None else listed_rows(order, len(packed))
    if x.ndim != 2 or x.shape[1] != columns:
        raise ShapeError(f"x must be (n, {columns}) for rows of {columns} values in {kind}; got {tuple(x.shape)}")
    out: Tensor = implementation("ggml.matmul", x.device, backend)(x, packed.contiguous(), kind, order)
    return out


def groups_ggml(
    packed: UInt8[Tensor, "n bytes"],
    kind: str,
    order: Int[Tensor, " k"] | None = None,
) -> CodeGroups:
    """Return rows as levels and scales, whose values equal those of `dequantize_ggml`. F32, F16 and BF16 have no such
    form.

    Levels of 2 and 3 bits are returned as codes of 4 bits, levels of 5 and 6 bits as codes of 8.

    Raises ConfigError (unknown type), ShapeError (bytes that are not whole rows), IndexError (a row number out of
    range).
    """
    _columns(packed, kind)
    order = None if order is None else listed_rows(order, len(packed))
    out: CodeGroups = implementation("ggml.groups", packed.device, "reference")(packed, kind, order)
    return out


def has_product(x: Tensor, kind: str) -> bool:
    """Return True if a kernel multiplies x by rows in ``kind``. If not, `matmul_ggml` decodes all of W at once."""
    in_blocks = GGML_TYPES[kind].block > 1
    return in_blocks and x.device.type == "cpu" and x.dtype in FLOATS and "cpu" in backends("ggml.matmul")


def _columns(packed: Tensor, kind: str) -> int:
    """Return the number of values in a packed row."""
    ggml_type = _type(kind)
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] % ggml_type.n_bytes:
        raise ShapeError(
            f"rows in {kind} are a uint8 matrix of a multiple of {ggml_type.n_bytes} columns; "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    return packed.shape[1] // ggml_type.n_bytes * ggml_type.block


def _type(kind: str) -> GgmlType:
    if kind not in GGML_TYPES:
        raise ConfigError(f"{kind!r} is no type of ggml that veneer writes; allowed: {list(GGML_TYPES)}")
    return GGML_TYPES[kind]


def _check_importance(importance: Tensor, columns: int) -> None:
    if importance.dtype != torch.float32 or tuple(importance.shape) != (columns,):
        raise ShapeError(
            f"importance must be float32 ({columns},), one value a column; "
            f"got {importance.dtype} {tuple(importance.shape)}"
        )
    if not bool(torch.isfinite(importance).all()):
        raise NonFiniteError("importance holds NaN or infinity; collect it again, from finite activations")
    if bool((importance < 0).any()):
        raise ConfigError("importance holds negative values; a mean of squares has none: collect it again")


def _raise_non_finite(rows: Tensor, kind: str, bad_row: int) -> None:
    row = rows[bad_row]
    bad = (~torch.isfinite(row)).nonzero()
    if len(bad):
        found = (
            f"row {bad_row} holds {float(row[bad[0, 0]])} in column {int(bad[0, 0])}. Save or fetch the weights again"
        )
    else:
        found = f"float16, {_of_half(kind)}, cannot hold what row {bad_row} needs (largest magnitude "
        found += f"{float(row.abs().max()):.3g}); choose Q8_0, which reaches 8.3e6, or BF16, which reaches everything"
    raise NonFiniteError(f"cannot quantize a matrix of shape {tuple(rows.shape)} to {kind}: {found}")


def _names() -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)


def _of_half(kind: str) -> str:
    return "which is F16" if kind == "F16" else f"which {kind} has for scales"
