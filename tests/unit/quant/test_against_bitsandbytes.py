"""Codes, scales, values and the tensors on disk equal those of bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from veneer.errors import FormatError
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec
from veneer.quant.int8 import Int8Spec

SHAPES = [(7, 3), (13, 64), (61, 128), (127, 33), (576, 192)]


def weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.03).to(dtype)


def spec_of(w: Tensor, quant_type: str, double_quant: bool) -> FourBitSpec:
    return FourBitSpec(FourBitLayout((w.shape[0], w.shape[1]), quant_type, 64, w.dtype), double_quant)


def values_of(packed: Tensor, state: QuantState) -> Tensor:
    """The values of the codes: ``table[code] * absmax``. (bitsandbytes' CPU code fails at widths such as 32.)"""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().int()
    n = state.shape.numel()
    values = state.code[codes][:n] * absmax.repeat_interleave(state.blocksize)[:n]
    return values.view(state.shape).to(state.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_what_bitsandbytes_writes(
    shape: tuple[int, int], quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    w = weight(shape, dtype)
    packed, state = bnb.quantize_4bit(w, quant_type=quant_type, compress_statistics=double_quant)
    theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    spec = spec_of(w, quant_type, double_quant)
    parts = spec.quantize(w)
    ours = spec.to_disk(parts)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if "quant_state" not in key:
            assert torch.equal(ours[key], tensor), key
    read, read_parts = spec.from_disk(theirs)
    assert read == spec
    assert all(torch.equal(read_parts[name], part) for name, part in parts.items())
    back = QuantState.from_dict(
        {k.removeprefix("weight."): v for k, v in ours.items() if k != "weight"}, torch.device("cpu")
    )
    assert torch.equal(values_of(ours["weight"], back), spec.bind(parts).dense())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_codes_in_another_container(storage: torch.dtype) -> None:
    """``bnb_4bit_quant_storage`` changes only how the bytes are labelled."""
    w = weight((64, 32), torch.bfloat16)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    spec, parts = spec_of(w, "nf4", False).from_disk(theirs)
    assert torch.equal(spec.bind(parts).dense(), values_of(packed.view(torch.uint8), state))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape: tuple[int, int]) -> None:
    w = weight(shape, torch.float16)
    codes, scb, _ = bnb.int8_vectorwise_quant(w)
    spec = Int8Spec((shape[0], shape[1]), torch.float16)
    disk = spec.to_disk(spec.quantize(w))
    assert torch.equal(disk["weight"], codes)
    assert torch.equal(disk["SCB"], scb)
    assert int(disk["weight_format"]) == 0
    read, parts = spec.from_disk(disk)
    theirs = bnb.int8_vectorwise_dequant(codes, scb)
    assert torch.equal(read.bind(parts).dense(torch.float32), theirs.float())


def on_disk() -> tuple[FourBitSpec, dict[str, Tensor]]:
    w = weight((13, 64), torch.bfloat16)
    spec = spec_of(w, "nf4", True)
    return spec, spec.to_disk(spec.quantize(w))


def state_key(text: bytes) -> dict[str, Tensor]:
    return {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}


STATE = (
    b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [13, 64], "nested_blocksize": 256, '
    b'"nested_offset": 0.1}'
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight.absmax": torch.ones(3)}, r"absmax is torch.float32 \(3,\)"),
        ({"weight.nested_absmax": None}, "nested_absmax is missing"),
        ({"weight.quant_map": torch.zeros(16)}, "quant_map is another table"),
        ({"weight.quant_map": None}, "quant_map is missing"),
        ({"weight.nested_quant_map": torch.zeros(256)}, "nested_quant_map is another table"),
        ({"weight": torch.zeros(7, 1, dtype=torch.uint8)}, r"weight is torch.uint8 \(7, 1\)"),
        ({"weight.quant_state.bitsandbytes__nf4": None}, "exactly one tensor named"),
        (state_key(b"{"), "not JSON"),
        (state_key(b"[]"), "must hold"),
        (state_key(b'{"quant_type": "nf4"}'), "must hold"),
        (state_key(STATE.replace(b"[13, 64]", b"[64, 13]")), r"stored for shape \(64, 13\)"),
        (state_key(STATE.replace(b"256", b"128")), "nested_blocksize is 128"),
        (state_key(STATE.replace(b"bfloat16", b"float7")), "float7"),
        (state_key(STATE.replace(b"bfloat16", b"float64")), "dtype is torch.float64"),
        (state_key(STATE.replace(b'"nf4"', b'"nf5"')), "quant_type is 'nf5'"),
        (state_key(STATE.replace(b'"nf4"', b"4")), "quant_type is 4"),
        (state_key(STATE.replace(b"64,", b"65,", 1)), "block_size is 65"),
        (state_key(STATE.replace(b"64,", b"64.0,", 1)), "blocksize is 64.0"),
        (state_key(STATE.replace(b"[13, 64]", b"832")), "shape is 832"),
        (state_key(STATE.replace(b"0.1", b"NaN")), "nested_offset is nan"),
        (state_key(STATE.replace(b"0.1", b'"0.1"')), "nested_offset is '0.1'"),
        (state_key(STATE[:40]), "not JSON"),
        ({"weight.quant_state.bitsandbytes__nf4": torch.ones(5)}, "should be the bytes of a JSON text"),
        ({"weight": None}, "weight is missing"),
        ({"weight.nested_absmax": torch.tensor([float("nan")])}, "nested_absmax holds NaN or infinity"),
    ],
)
def test_damage_is_named(changes: dict[str, Tensor | None], message: str) -> None:
    spec, disk = on_disk()
    damaged = {key: tensor for key, tensor in (disk | changes).items() if tensor is not None}
    with pytest.raises(FormatError, match=message):
        spec.from_disk(damaged)


def test_damage_of_int8_is_named() -> None:
    spec = Int8Spec((7, 5))
    disk = spec.to_disk(spec.quantize(weight((7, 5), torch.float32)))
    with pytest.raises(FormatError, match=r"SCB is missing.*weight_format is 2"):
        spec.from_disk({"weight": disk["weight"], "weight_format": torch.tensor(2)})
    disk["SCB"][3] = float("inf")
    with pytest.raises(FormatError, match=r"SCB holds NaN or infinity.*weight_format is \[1, 2\]"):
        spec.from_disk(disk | {"weight_format": torch.tensor([1, 2])})
