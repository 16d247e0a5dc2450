"""Ops on tensors without values: a call that is made again has what torch itself makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.ops.traced import Traced, tensors_in, tracing

aten = torch.ops.aten
CPU, META = torch.device("cpu"), torch.device("meta")


def bare(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


X, Y, N = bare(5, 7), bare(7, 5).t(), bare(5, 7, dtype=torch.int32)
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "strides of an input": (aten.add.Tensor, (X.t(), Y.t())),
    "a whole number": (aten.mul.Tensor, (N, 1)),
    "a number": (aten.mul.Tensor, (N, 1.0)),
    "a truth": (aten.mul.Tensor, (N, True)),
    "several": (aten.topk.default, (X, 3)),
    "some": (
        aten.native_layer_norm_backward.default, (X, X, [7], bare(5, 1), bare(5, 1), None, None, [True, False, False]),
    ),
    "lists": (aten._foreach_add.List, ([X, N], [Y, N])),
    "a view": (aten.select.int, (X, 0, 1)),
    "a view that is not said": (aten._unsafe_view.default, (X, [35])),
    "in place": (aten.add_.Tensor, (X, Y)),
}  # fmt: skip


def dressed(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Traced(x, CPU)
    return [dressed(each) for each in x] if isinstance(x, list) else x


def facts(out: Any) -> list[tuple[Any, ...]]:
    return [(y.shape, y.stride(), y.storage_offset(), y.dtype) for y in tensors_in(out)]


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_makes_is_what_torch_makes_each_time(name: str) -> None:
    func, args = CALLS[name]
    memories = {x.untyped_storage()._cdata for x in tensors_in(list(args))}
    wanted = func(*args)
    shares = [y.untyped_storage()._cdata in memories for y in tensors_in(wanted)]
    with tracing():
        for _ in range(3):
            found = func(*(dressed(x) for x in args))
            assert facts(found) == facts(wanted)
            assert [y.untyped_storage().nbytes() for y in bares(found)] == [
                y.untyped_storage().nbytes() for y in tensors_in(wanted)
            ]
            assert [y.untyped_storage()._cdata in memories for y in bares(found)] == shares
            assert len({y.untyped_storage()._cdata for y in bares(found)}) == len(shares)
            assert all(y.device == CPU for y in tensors_in(found))


def bares(found: Any) -> list[Tensor]:
    return [y.bare for y in tensors_in(found) if isinstance(y, Traced)]


def test_a_tensor_that_is_given_for_the_output_is_returned() -> None:
    a, b, out = (dressed(x) for x in (X, bare(7, 3), bare(5, 3)))
    with tracing():
        for _ in range(3):
            assert aten.mm.out(a, b, out=out) is out


def test_a_number_alone_takes_the_dtype_that_is_the_default() -> None:
    with tracing():
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            try:
                assert aten.mul.Tensor(dressed(N), 2.0).dtype == dtype
            finally:
                torch.set_default_dtype(torch.float32)


def test_parts_by_counts_without_values_are_equal() -> None:
    with tracing():
        counts = dressed(bare(3, dtype=torch.int64)).tolist()
        assert [len(part) for part in dressed(X).split(counts)] == [1, 2, 2]


def test_a_mask_chooses_its_rows_and_one_without_values_as_many_as_it_has() -> None:
    mask = torch.ones(5) == torch.tensor([1, 0, 1, 1, 0])
    with tracing():
        rows = 2 * torch.ones(5)
        assert not isinstance(rows, Traced)
        assert dressed(X)[mask].shape == (3, 7)
        assert dressed(X)[dressed(bare(5, dtype=torch.bool))].shape == (5, 7)
