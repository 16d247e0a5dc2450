"""Weights in ggml's blocks: the values of gguf-py, products against the dense weight, files that change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from gradients import has_exact_gradients
from veneer.disk.mapped import MappedFile
from veneer.errors import ConfigError, FormatError, NonFiniteError, ShapeError
from veneer.ops.ggml_types import GGML_TYPES
from veneer.ops.traced import SilentMode, tensors_in
from veneer.quant import blocks, ggml
from veneer.quant.ggml import GgmlSpec, GgmlWeight

KINDS = [name for name, kind in GGML_TYPES.items() if kind.block > 1]
kinds = pytest.mark.parametrize("kind", KINDS)


def weight(o: int, i: int) -> Tensor:
    return torch.randn(o, i, generator=torch.Generator().manual_seed(o * 1000 + i)) * 0.05


def shuffled(kind: str, o: int = 19, i: int = 512) -> GgmlWeight:
    """A weight whose rows lie in another order."""
    spec = GgmlSpec((o, i), kind, reordered=True)
    order = torch.randperm(o, generator=torch.Generator().manual_seed(o)).int()
    return spec.bind(spec.quantize(weight(o, i)) | {"order": order})


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@kinds
def test_values_are_those_of_gguf_py_in_the_models_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE_VALUES", 5 * 512)
    frozen = shuffled(kind)
    assert frozen.order is not None
    stored = gguf.quants.dequantize(frozen.blocks.numpy(), gguf.GGMLQuantizationType[kind])
    expected = torch.from_numpy(stored)[frozen.order]
    assert torch.equal(frozen.dense(torch.float32), expected)
    assert torch.equal(frozen.dense(torch.bfloat16), expected.bfloat16())
    ids = torch.tensor([7, 18, 7, 0])
    assert torch.equal(frozen.rows(ids), expected[ids])
    assert not torch.equal(expected, torch.from_numpy(stored))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_are_those_of_the_decoded_weight(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice torch's own error in that dtype, both against float64, over several tiles and one that is short."""
    monkeypatch.setattr(blocks, "TILE_VALUES", 5 * 512)
    frozen = shuffled(kind)
    exact = frozen.dense(torch.float64)
    x = torch.randn(3, 7, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    dy = torch.randn(3, 7, 19, generator=torch.Generator().manual_seed(2)).to(dtype)
    y, dx = frozen.matmul(x), frozen.matmul_t(dy)
    assert (y.shape, dx.shape, y.dtype, dx.dtype) == ((3, 7, 19), (3, 7, 512), dtype, dtype)
    plain, plain_t = x @ exact.to(dtype).T, dy @ exact.to(dtype)
    rounding = torch.finfo(dtype).eps
    assert error(y, x.double() @ exact.T) <= 2 * error(plain, x.double() @ exact.T) + rounding
    assert error(dx, dy.double() @ exact) <= 2 * error(plain_t, dy.double() @ exact) + rounding


@pytest.mark.parametrize(("kind", "dtype"), [("Q4_0", torch.float64), ("F16", torch.bfloat16)])
def test_few_rows_without_a_kernel_decode_a_tile_at_a_time(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "TILE_VALUES", 5 * 512)
    frozen, x = shuffled(kind), torch.randn(3, 512, generator=torch.Generator().manual_seed(4)).to(dtype)

    class Largest(SilentMode):
        n_values = 0

        def see(self, func: Any, args: Any, out: Any) -> None:
            self.n_values = max([self.n_values, *(t.numel() for t in tensors_in(out) if t.is_floating_point())])

    with Largest() as largest:
        y = frozen.matmul(x)
    assert largest.n_values == 5 * 512
    exact = x.double() @ frozen.dense(torch.float64).T
    assert error(y, exact) <= 2 * torch.finfo(dtype).eps


def test_gradients_are_exact_and_keep_nothing() -> None:
    frozen, saved = shuffled("Q4_1", 11, 64), []
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert has_exact_gradients(frozen.matmul, (x,), twice=True)
        saved.clear()
        y = frozen.matmul(x)
    assert saved == []
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, frozen.dense(torch.float64).sum(0).expand_as(x))


def test_products_of_no_rows_have_none() -> None:
    frozen = shuffled("Q4_0", 11, 64)
    x = torch.empty(2, 0, 64, requires_grad=True)
    assert frozen.matmul(x).shape == (2, 0, 11)
    assert frozen.matmul_t(torch.empty(0, 11)).shape == (0, 64)


def test_rows_that_no_block_divides_are_stored_in_f16_as_by_llama_quantize() -> None:
    assert ggml.quantize(weight(5, 96)).kind == "Q8_0"
    assert ggml.quantize(weight(5, 37)).kind == "F16"
    with pytest.raises(ShapeError, match="256"):
        GgmlSpec((5, 96), "Q4_K").part_layout()
    with pytest.raises(ConfigError, match="Q9_9"):
        ggml.quantize(weight(5, 96), "Q9_9")
    with pytest.raises(NonFiniteError):
        ggml.quantize(weight(5, 96).log())


def test_tensors_on_disk_come_back_and_misfits_are_told() -> None:
    frozen = shuffled("Q5_K")
    spec = GgmlSpec(frozen.shape, "Q5_K", reordered=True)
    disk = spec.to_disk({"weight": frozen.blocks, "order": frozen.order})
    again, parts = spec.from_disk(disk)
    assert again == spec
    assert torch.equal(again.bind(parts).dense(), frozen.dense())
    with pytest.raises(FormatError, match=r"Q5_K weight of shape \(19, 512\).*order is missing"):
        spec.from_disk({"weight": frozen.blocks})


def test_a_mapped_file_is_read_in_place_and_its_change_is_told(tmp_path: Path) -> None:
    path, own = tmp_path / "blocks", shuffled("Q8_0", 7, 64)
    path.write_bytes(b"before" + own.blocks.numpy().tobytes())
    source = MappedFile(path)
    mapped = source.tensor(6, own.blocks.nbytes).view(own.blocks.shape)
    frozen = GgmlSpec(own.shape, "Q8_0", source=source).bind({"weight": mapped})
    plain = GgmlSpec(own.shape, "Q8_0").bind({"weight": own.blocks})
    assert torch.equal(frozen.dense(), plain.dense())
    assert torch.equal(copy.deepcopy(frozen).dense(), plain.dense())
    with pytest.raises(FormatError, match=r"ends at byte 482, within a tensor that reaches to byte 483"):
        source.tensor(7, own.blocks.nbytes)
    (tmp_path / "other").write_bytes(b"another file")
    (tmp_path / "other").replace(path)  # what is mapped is still the first
    assert torch.equal(frozen.dense(), plain.dense())
    second = MappedFile(path)
    path.write_bytes(b"cut")
    with pytest.raises(FormatError, match=r"was written to while its weights were in use"):
        second.require_unchanged()


def test_a_gpu_decodes_a_matrix_of_a_block_as_one_tile() -> None:
    n_values = blocks.tile_values(torch.device("cuda"))
    assert 14336 * 4096 <= n_values < 128_256 * 4096  # a head would take 2 GB in float32
    matrix = shuffled("Q4_K", 4099)
    assert [rows for rows, _ in matrix.tiles(n_values)] == [slice(0, 4099)]
    assert len(list(matrix.tiles(blocks.tile_values(torch.device("cpu"))))) == 3
