"""Stacks of experts in codes: the laws of a storage format for each, and gate above up in formats of their own."""

from __future__ import annotations

import pytest
import torch

from veneer.errors import FormatError
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec
from veneer.quant.fp8 import Fp8Spec
from veneer.quant.int8 import Int8Spec
from veneer.quant.mxfp4_stack import Mxfp4StackSpec
from veneer.quant.nvfp4 import Nvfp4Spec
from veneer.quant.stack import DenseStack, StackSpec
from veneer.records.frozen import FrozenStack, FrozenWeight

SHAPES = (19, 64), (23, 64)
SPECS = {
    "nf4": StackSpec(5, tuple(FourBitSpec(FourBitLayout(shape, "nf4"), True) for shape in SHAPES), ("w1", "w3")),
    "fp8": StackSpec(5, tuple(Fp8Spec(shape, block=(7, 11)) for shape in SHAPES), ("gate_proj", "up_proj")),
    "nvfp4": StackSpec(5, tuple(Nvfp4Spec(shape) for shape in SHAPES), ("gate_proj", "up_proj")),
    "two formats": StackSpec(5, (Int8Spec(SHAPES[0]), Fp8Spec(SHAPES[1])), ("gate_proj", "up_proj")),
    "mxfp4": Mxfp4StackSpec.of("gate_up_proj", (5, 42, 64), torch.float32),
}
specs = pytest.mark.parametrize("name", SPECS)


def weights() -> torch.Tensor:
    return torch.randn(5, 42, 64, generator=torch.Generator().manual_seed(3)) * 0.1


@specs
def test_the_laws_of_a_format(name: str) -> None:
    spec, dense = SPECS[name], weights()
    parts = spec.quantize(dense)
    assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == spec.part_layout()
    stack = spec.bind(parts)
    assert isinstance(stack, FrozenStack)
    assert stack.shape == spec.shape == (5, 42, 64)
    assert stack.nbytes == sum(part.nbytes for part in parts.values())
    assert float((stack.dense() - dense).norm() / dense.norm()) < 0.15
    disk = spec.to_disk(parts)
    assert all(spec.owns(key) for key in disk)
    assert not spec.owns("5x.gate_proj.weight")
    again, same = spec.from_disk(disk)
    assert {key: part.data_ptr() for key, part in same.items()}.keys() == parts.keys()
    assert torch.equal(again.bind(same).dense(), stack.dense())


@specs
def test_an_expert_is_a_frozen_weight(name: str) -> None:
    """Quantized like its matrix alone; its product, and the gradient of that, are those of the dense weight."""
    spec, dense = SPECS[name], weights()
    stack = spec.bind(spec.quantize(dense))
    expert = stack.expert(3)
    assert isinstance(expert, FrozenWeight)
    assert expert.shape == (42, 64)
    own = expert.dense(torch.float32)
    assert torch.equal(own, stack.dense(torch.float32)[3])
    rows = torch.split(dense[3], [piece.shape[0] for piece in spec.pieces])
    alone = [piece.bind(piece.quantize(part)).dense() for piece, part in zip(spec.pieces, rows, strict=True)]
    assert torch.equal(own, torch.cat(alone))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    y = expert.matmul(x)
    torch.testing.assert_close(y, x @ own.T, rtol=1e-5, atol=1e-5)
    dy = torch.randn(2, 3, 42, generator=torch.Generator().manual_seed(7))
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expert.matmul_t(dy), dy @ own, rtol=1e-5, atol=1e-5)
    assert 0 < expert.nbytes <= stack.nbytes // 5 + 4


def test_a_dense_stack_shares_its_memory() -> None:
    stored = weights().mT.contiguous()
    stack = DenseStack(stored.mT)
    assert stack.shape == (5, 42, 64)
    assert stack.expert(2).dense().data_ptr() == stored[2].data_ptr()
    assert stack.dense(torch.bfloat16).dtype == torch.bfloat16
    assert stack.nbytes == stored.nbytes


def test_misfits_are_told_by_expert() -> None:
    spec = SPECS["fp8"]
    disk = spec.to_disk(spec.quantize(weights()))
    broken = disk | {f"{n}.up_proj.weight_scale_inv": torch.zeros(4, 6) for n in range(5)}
    with pytest.raises(FormatError, match=r"(?s)0\.up_proj: .*zero or negative.*3\.up_proj: .*\n  and 1 more"):
        spec.from_disk(broken)
    with pytest.raises(FormatError, match=r"the model has 5 experts, and the files have tensors of expert 7"):
        spec.from_disk(disk | {"7.up_proj.weight": disk["0.up_proj.weight"]})
    with pytest.raises(FormatError, match="experts 0 and 2 are stored in different formats"):
        spec.from_disk(disk | {"2.gate_proj.weight_scale_inv": disk["2.gate_proj.weight_scale_inv"].bfloat16()})
