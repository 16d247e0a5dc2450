"""Products in 16 bits, where the CPU has an instruction for them and where they are computed in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flat_records import flat_record
from veneer.ops import matmul as ops
from veneer.ops.cross_entropy import HeadOptions, linear_cross_entropy
from veneer.ops.dispatch import kernel_isa
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import linears
from veneer.ops.matmul import FEW_ROWS, add_matmul, matmul, operand

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["own", "widened"])
def widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(ops, "float32_is_faster", lambda: request.param)
    return bool(request.param)


def matrices(dtype: torch.dtype, n: int = 37, k: int = 53, m: int = 29) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = ((n, k), (k, m), (n, m))
    a, b, y = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return a, b, y


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_a_product_is_rounded_once(dtype: torch.dtype, widened: bool) -> None:
    a, b, y = matrices(dtype)
    exact = a.double() @ b.double()
    plain = error(a @ b, exact)
    assert error(matmul(a, b, dtype), exact) <= 2 * plain
    assert error(matmul(operand(a), operand(b), dtype), exact) <= 2 * plain
    assert error(add_matmul(y.clone(), a, b), exact + y.double()) <= 2 * error(y + a @ b, exact + y.double())
    assert matmul(operand(a), b, dtype).dtype == dtype
    assert matmul(a, b, torch.float32).dtype == torch.float32


def test_what_was_widened_is_not_narrowed_again(widened: bool) -> None:
    few, b, _ = matrices(torch.bfloat16, n=FEW_ROWS - 1)
    exact = few.double() @ b.double()
    assert error(matmul(few, b.float(), torch.float32), exact) < 1e-6


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_it_goes_where_it_is_told(dtype: torch.dtype, widened: bool) -> None:
    a, b, _ = matrices(dtype)
    place = torch.zeros(37, 40, dtype=dtype)
    found = matmul(a, b, dtype, out=place[:, 5:34])
    assert found.data_ptr() == place[:, 5:].data_ptr()
    torch.testing.assert_close(place[:, 5:34], matmul(a, b, dtype), rtol=0, atol=0)
    assert not place[:, :5].any()
    assert not place[:, 34:].any()


def test_what_is_widened(widened: bool) -> None:
    a, _, _ = matrices(torch.bfloat16)
    assert operand(a).dtype == (torch.float32 if widened else torch.bfloat16)
    few = a[: FEW_ROWS - 1]
    assert operand(few) is few
    for wide in (a.float(), a.double()):
        assert operand(wide) is wide


def test_autocast_changes_nothing(widened: bool) -> None:
    a, b, _ = matrices(torch.float32)
    wanted = matmul(a, b, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matmul(a, b, torch.float32), wanted)


def test_adapted_layers_and_the_head_are_as_near_to_float64(widened: bool) -> None:
    torch.manual_seed(7)
    x = torch.randn(31, 43, dtype=torch.bfloat16, requires_grad=True)
    layers = [
        LinearLayer(
            weight=torch.randn(o, 43).bfloat16() / 7,
            records=(
                flat_record(
                    a=torch.randn(r, 43, requires_grad=True), b=torch.randn(o, r, requires_grad=True), scale=0.3
                ),
            ),
        )
        for o, r in ((59, 5), (19, 3))
    ]
    head, labels = torch.randn(61, 59).bfloat16() / 7, torch.randint(0, 61, (31,))
    leaves = [x, *(leaf for p in layers for leaf in p.record.tensors)]

    def gradients(wide: bool) -> list[Tensor]:
        if not wide:
            y, z = linears(x, layers)
            loss = linear_cross_entropy(y, head, labels, options=HeadOptions(chunk_bytes=13 * 61 * 2))
            return [*torch.autograd.grad(loss + z.float().square().mean(), leaves)]
        wanted = [leaf.detach().double().requires_grad_() for leaf in leaves]
        y, z = (
            wanted[0] @ (p.weight.double() + p.record.low_rank.scale * b @ a).T
            for p, a, b in zip(layers, wanted[1::2], wanted[2::2], strict=True)
        )
        loss = torch.nn.functional.cross_entropy(y @ head.double().T, labels) + z.square().mean()
        return [*torch.autograd.grad(loss, wanted)]

    for found, exact in zip(gradients(False), gradients(True), strict=True):
        assert error(found, exact) <= 0.02


def test_the_build_in_use_has_a_name() -> None:
    assert kernel_isa() in ("", "generic", "neon", "avx2", "avx512", "avx512_bf16", "amx")
