"""ggml's types against the bytes that ggml itself makes, and read back against the package gguf."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ggml_rows import DTYPES, ROWS, awkward_rows, bell, digest, importances
from veneer.errors import ConfigError, NonFiniteError, ShapeError
from veneer.ops.ggml import dequantize_ggml, matmul_ggml, quantize_ggml, row_bytes
from veneer.ops.ggml_types import GGML_TYPES

OP = "ggml.quantize"
BLOCKED = [name for name, kind in GGML_TYPES.items() if kind.block > 1]
GOLDEN = Path(__file__).parents[2] / "golden" / "ggml" / "hashes.json"

# Root mean square errors over the deviation of normal values.
ERRORS = {"Q2_K": 0.293, "Q3_K": 0.151, "Q4_0": 0.085, "Q4_1": 0.078, "Q4_K": 0.0716, "Q5_0": 0.0425, "Q5_1": 0.0381}
ERRORS |= {"Q5_K": 0.0361, "Q6_K": 0.0176, "Q8_0": 0.0053}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())["hashes"]


def hashes(kind, importance, backend):
    """The digest of each kind of awkward rows, of all of which one matrix a dtype is made."""
    rows = awkward_rows()
    packed = [
        quantize_ggml(torch.cat([*rows.values()]).to(dtype), kind, importance, backend=backend) for dtype in DTYPES
    ]
    cut = [[part[i * ROWS : (i + 1) * ROWS] for part in packed] for i in range(len(rows))]
    return {name: digest(parts) for name, parts in zip(rows, cut, strict=True)}


@pytest.mark.looped("named", importances())
@pytest.mark.looped("kind", BLOCKED)
def test_bytes_are_those_of_ggml(kind, named, golden, backend):
    assert hashes(kind, importances()[named], backend) == golden[kind][named]


@pytest.mark.looped("weighted", [False, True])
@pytest.mark.looped("kind", BLOCKED)
def test_bytes_are_those_of_ggml_as_it_is_installed(kind, weighted, backend):
    libgguf = pytest.importorskip("libgguf", reason="libgguf, which carries ggml's quantizers, is not installed")
    n = 3 if backend == "reference" else 29
    importance = bell(11, 1024).abs() if weighted else None
    weights = None if importance is None else importance.numpy()
    for seed, dtype in enumerate(DTYPES):
        rows = (bell(20 + seed, n, 1024) * 10.0 ** bell(30 + seed, n, 1)).to(dtype)
        theirs = libgguf.quantize_rows(rows.float().numpy(), GGML_TYPES[kind].number, weights)
        assert np.array_equal(quantize_ggml(rows, kind, importance, backend=backend).numpy(), theirs)


@pytest.mark.looped("kind", BLOCKED)
def test_values_are_those_that_gguf_reads(kind, backend):
    packed = quantize_ggml(torch.cat([*awkward_rows().values()]), kind)
    theirs = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType(GGML_TYPES[kind].number))
    assert np.array_equal(dequantize_ggml(packed, kind, backend=backend).numpy(), theirs)
    order = torch.tensor([41, 0, 7, 41], dtype=torch.int32)
    assert np.array_equal(dequantize_ggml(packed, kind, order, backend=backend).numpy(), theirs[order])


@pytest.mark.looped("dtype", [*DTYPES, torch.float64])
@pytest.mark.looped("kind", ["F16", *BLOCKED])
def test_products_are_those_with_the_decoded_rows(kind, dtype, backend):
    """Rows of more than one tile, and of a short one, in an order of their own."""
    packed, order = quantize_ggml(bell(14, 23, 1280) * 0.1, kind), torch.randperm(23).int()
    exact = dequantize_ggml(packed, kind)[order].double()
    for n in (1, 3, 19):
        x = bell(15 + n, n, 1280).to(dtype)
        y, right = matmul_ggml(x, packed, kind, order, backend=backend), x.double() @ exact.T
        plain = x.float() @ exact.float().T
        assert y.dtype == dtype
        allowed = 2 * float((plain - right).norm()) + torch.finfo(dtype).eps * float(right.norm())
        assert float((y.double() - right).norm()) <= allowed
    with pytest.raises(ShapeError, match=r"x must be \(n, 1280\) for rows of 1280 values"):
        matmul_ggml(torch.ones(3, 1024), packed, kind, backend=backend)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_rows_are_listed_by_any_view_of_whole_numbers(kind, backend):
    packed, x = quantize_ggml(bell(16, 11, 64), kind), bell(17, 3, 64)
    every, order = torch.tensor([[3, 0], [10, 1], [3, 2]]), torch.tensor([3, 10, 3])
    exact = dequantize_ggml(packed, kind)[order]
    for view in (every[:, 0], every.int()[:, 0]):
        assert torch.equal(dequantize_ggml(packed, kind, view, backend=backend), exact)
    shuffled = torch.stack([torch.randperm(11), torch.arange(11)]).T.int()[:, 0]
    y = matmul_ggml(x, packed, kind, shuffled, backend=backend)
    torch.testing.assert_close(y, x @ dequantize_ggml(packed, kind)[shuffled].T)


@pytest.mark.parametrize("wrong", [11, -1, 10**8, 2**32 + 3])
def test_a_row_that_is_not_there_is_refused(wrong, backend):
    packed, order = quantize_ggml(bell(16, 11, 64), "Q4_0"), torch.arange(11)
    order[4] = wrong
    with pytest.raises(IndexError, match=rf"row {wrong} is not in the table: it has rows 0 to 10\."):
        dequantize_ggml(packed, "Q4_0", order, backend=backend)
    with pytest.raises(IndexError, match=f"row {wrong} is not"):
        matmul_ggml(bell(17, 2, 64), packed, "Q4_0", order, backend=backend)


def test_numbers_and_sizes_are_those_of_gguf():
    for kind in GGML_TYPES.values():
        number = gguf.GGMLQuantizationType[kind.name]
        assert (kind.number, gguf.GGML_QUANT_SIZES[number]) == (number.value, (kind.block, kind.n_bytes))
        assert row_bytes(kind.name, 768) == 768 // kind.block * kind.n_bytes


@pytest.mark.looped("kind", ERRORS)
def test_the_error_on_normal_values(kind, backend):
    rows = torch.randn(8, 1024, generator=torch.Generator().manual_seed(3)) * 0.02
    off = dequantize_ggml(quantize_ggml(rows, kind, backend=backend), kind) - rows
    assert float(off.norm() / rows.norm()) == pytest.approx(ERRORS[kind], rel=0.03)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_round_to_nearest(kind):
    rows = bell(8, 3, 7).bfloat16() * 0.3
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    packed = quantize_ggml(rows, kind)
    assert torch.equal(packed.view(dtype), rows.to(dtype))
    assert torch.equal(dequantize_ggml(packed, kind), rows.to(dtype).float())


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "IQ4_XS"])
def test_a_view_is_read_as_it_stands(kind, backend):
    wide = bell(9, 5, 1024)
    assert torch.equal(
        quantize_ggml(wide[::2, 256:768], kind, backend=backend),
        quantize_ggml(wide[::2, 256:768].contiguous(), kind, backend=backend),
    )


@pytest.mark.looped("kind", BLOCKED)
def test_the_number_of_threads_changes_no_byte(kind, backend):
    n, counts = (49, (1, 3)) if backend == "reference" else (97, (1, 2, 3))  # more than a thread's least share
    rows, importance = bell(12, n, 768) * 0.1, bell(13, 768).abs()
    before = torch.get_num_threads()
    packed = []
    for threads in counts:
        torch.set_num_threads(threads)
        packed += [quantize_ggml(rows, kind, importance, backend=backend)]
    torch.set_num_threads(before)
    assert all(torch.equal(packed[0], other) for other in packed[1:])


def test_no_rows_are_no_bytes(backend):
    for kind in GGML_TYPES:
        assert quantize_ggml(torch.empty(0, 512), kind, backend=backend).shape == (0, row_bytes(kind, 512))
        assert dequantize_ggml(torch.empty(0, row_bytes(kind, 512), dtype=torch.uint8), kind).shape == (0, 512)


@pytest.mark.looped("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.looped("kind", GGML_TYPES)
def test_values_that_are_not_finite_are_refused(kind, value, backend):
    rows = bell(10, 41, 512)
    rows[17, 300], rows[23, 0] = value, value
    with pytest.raises(NonFiniteError, match=rf"\(41, 512\) to {kind}: row 17 holds {value} in column 300"):
        quantize_ggml(rows, kind, backend=backend)


@pytest.mark.looped("weighted", [False, True])
@pytest.mark.looped("kind", ["F16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_NL"])
def test_values_beyond_a_half_are_refused(kind, weighted, backend):
    rows = bell(10, 41, 512)
    rows[19] *= 1e9
    importance = bell(11, 512).abs() if weighted else None
    half = "which is F16" if kind == "F16" else f"which {kind} has for scales"
    with pytest.raises(NonFiniteError, match=f"float16, {half}, cannot hold what row 19 needs"):
        quantize_ggml(rows, kind, importance, backend=backend)


@pytest.mark.usefixtures("own_checks")
def test_arguments_that_do_not_fit_are_refused():
    rows = torch.ones(3, 512)
    with pytest.raises(ConfigError, match=r"'Q7_K' is no type of ggml.*allowed: \['F32'"):
        quantize_ggml(rows, "Q7_K")
    with pytest.raises(ShapeError, match="multiple of 256 values; given rows of 288"):
        row_bytes("Q4_K", 288)
    with pytest.raises(ShapeError, match=r"matrix of float32 or bfloat16 or float16, got torch.float64 \(3, 512\)"):
        quantize_ggml(rows.double(), "Q4_K")
    with pytest.raises(ShapeError, match=r"importance must be float32 \(512,\).*got torch.float32 \(511,\)"):
        quantize_ggml(rows, "Q4_K", torch.ones(511))
    with pytest.raises(NonFiniteError, match="importance holds NaN"):
        quantize_ggml(rows, "Q4_K", torch.full((512,), float("nan")))
    with pytest.raises(ConfigError, match="importance holds negative"):
        quantize_ggml(rows, "Q4_K", -torch.ones(512))
    with pytest.raises(ShapeError, match=r"rows in Q4_K are a uint8 matrix of a multiple of 144 columns"):
        dequantize_ggml(torch.zeros(3, 143, dtype=torch.uint8), "Q4_K")
