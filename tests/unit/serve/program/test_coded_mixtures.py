"""Mixtures whose experts are in codes, in the C++ step: the answers of their own code, and the codes given back."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.model.blueprint.families import SIZES
from tests.unit.serve.conftest import byte_tokenizer, make_model, save_adapter
from tests.unit.store.test_coded_experts import whole
from transformers import Qwen3MoeConfig

from quantized_folders import FORMATS as ON_DISK
from quantized_folders import make_folder, qwen3_moe_config
from veneer import BitsAndBytesConfig, LoraConfig
from veneer.model.adapted.packed_experts import pack_experts
from veneer.model.blueprint.describe import describe
from veneer.model.program.program import compile_program
from veneer.model.quantized.packed_linear import PANEL, unpack
from veneer.model.quantized.packed_stack import PackedCodedStack
from veneer.model.quantized.stack import CodedStack
from veneer.ops.packed_codes import PackedCodes
from veneer.ops.traced import tracing
from veneer.plan.model import make_traced
from veneer.serve.program.effects import Lookup, read_effects
from veneer.serve.runners.program_runner import proved
from veneer.store.source import load_model

from .test_native_step import Run, kinds, pair_of, step_with

CONFIG = Qwen3MoeConfig(
    num_experts=5, num_experts_per_tok=3, moe_intermediate_size=64,
    **{**SIZES, "hidden_size": 96, "num_hidden_layers": 2, "head_dim": 16},
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose widths fill panels."""
    place = tmp_path_factory.mktemp("mixture")
    make_model(CONFIG).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = LoraConfig(r=3, lora_alpha=7, target_parameters=["all-experts"])
    return save_adapter(tmp_path_factory.mktemp("adapter"), lora, CONFIG, 4)


def quantized(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, dtype=dtype, quantization=BitsAndBytesConfig(**KINDS[kind]))


def coded(model: Any, kind: type) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module) is kind}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_in_a_crowd(folder, kind, dtype, adapter):
    """And that of the ops, one by one, in one call of C++."""
    model = quantized(folder, kind, dtype)
    interpreter = proved(model, 40)
    interpreter.take("lora", interpreter.packed(read_effects(Lookup(model), interpreter.program, adapter)))
    assert kinds(interpreter, step_with(interpreter, None, "lora")) == ["NativeStretch", "Logits"]
    fast, slow = pair_of(interpreter)
    crowd = [(s, 0, 3 + s % 4, "lora" if s % 3 == 1 else None) for s in range(7)]
    together = fast.step(*crowd)
    assert torch.equal(together, slow.step(*crowd))
    for chunk, rows in zip(crowd, together.split([n for _, _, n, _ in crowd]), strict=True):
        assert torch.equal(Run(interpreter, native=True).step(chunk), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_its_own_code(folder, kind):
    model, ids = quantized(folder, kind), torch.tensor([[13 * position % 97 for position in range(9)]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    found = Run(proved(model, 40, give_up=True), native=True).step((0, 0, 9, None))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_given_up_and_come_back(folder, kind):
    model = quantized(folder, kind)
    before = {path: {k: v.clone() for k, v in m.parts().items()} for path, m in coded(model, CodedStack).items()}
    assert len(before) == 4
    proved(model, 40, give_up=True)
    held = coded(model, PackedCodedStack)
    assert held.keys() == before.keys()
    for stack in held.values():
        packed = stack.packed_stack
        assert isinstance(packed.first, PackedCodes)
        assert packed.first.coding == kind
        assert not list(stack.buffers())
    unpack(model)
    for path, stack in coded(model, CodedStack).items():
        wanted = before.pop(path)
        assert stack.parts().keys() == wanted.keys()
        assert all(torch.equal(part, wanted[name]) for name, part in stack.parts().items())
    assert not before


@pytest.mark.parametrize("kind", KINDS)
def test_planned_bytes_are_those_held(folder, kind):
    model = quantized(folder, kind)
    planned, program = deepcopy(model), compile_program(describe(model), 40)
    [paths, *_] = [tuple(stack.path for stack in stacks) for stacks in program.stacks]
    with tracing():
        make_traced(planned)
        wanted = pack_experts(planned, paths, give_up=True)
    held = pack_experts(model, paths, give_up=True)
    assert [stack.nbytes for stack in wanted] == [stack.nbytes for stack in held]
    assert all(stack.panels.untyped_storage().nbytes() == stack.nbytes for stack in held)


UNPACKED = ("fp8 blocks", "gptq 4", "pack-quantized")  # blocks of 36 inputs, and columns sorted by group


@pytest.mark.parametrize("width", [128, 96])
@pytest.mark.parametrize("kind", ON_DISK)
def test_codes_of_files(kind, width, tmp_path):
    """Gate and up are quantized apart. If they fill no panels, the experts run by their own code."""
    config = qwen3_moe_config()
    config.moe_intermediate_size, config.vocab_size = width, 97
    make_folder(whole(ON_DISK[kind]), tmp_path, config=config)
    model, ids = load_model(tmp_path / "coded"), torch.tensor([[13 * position % 97 for position in range(9)]])
    before = {path: {k: v.clone() for k, v in m.parts().items()} for path, m in coded(model, CodedStack).items()}
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    found = Run(proved(model, 40, give_up=True), native=True).step((0, 0, 9, None))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    is_packed = width % PANEL == 0 and kind not in UNPACKED
    assert len(coded(model, PackedCodedStack if is_packed else CodedStack)) == len(before)
    unpack(model)
    for path, stack in coded(model, CodedStack).items():
        wanted = before.pop(path)
        assert all(torch.equal(part, wanted[name]) for name, part in stack.parts().items())
    assert not before
