"""Quantized bases in the program: packed codes, one call a step, and the answers of transformers' generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.serve.conftest import METHODS, byte_tokenizer, make_model, save_adapter
from tests.unit.serve.test_llm_exact import PROMPTS, answers, generated

from veneer import LLM, BitsAndBytesConfig, LoRARequest, PeftModel
from veneer.errors import ConfigError
from veneer.model.quantized.packed_linear import PackedQuantLinear, unpack
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops.packed_codes import PackedCodes
from veneer.serve.program.effects import Lookup, read_effects
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.runners.program_runner import proved
from veneer.store.source import load_model

from .test_native_step import Run, kinds, pair_of, step_with

FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
EIGHT = ("lora", "dora", "ia3", "lora_bias", "adalora", "bottleneck", "saved", "rslora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths are multiples of 16, with its tokenizer."""
    place = tmp_path_factory.mktemp("wide")
    make_model("wide").save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def wide_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoRARequest]:
    place = tmp_path_factory.mktemp("adapters")
    return {
        name: LoRARequest(name, number, str(save_adapter(place / name, METHODS[name](), "wide", seed=number)))
        for number, name in enumerate((*EIGHT, "vera", "prefix", "prompt"), start=1)
    }


def quantized(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, dtype=dtype, quantization=BitsAndBytesConfig(**FORMATS[kind]))


def loaded(folder: Path, kind: str, dtype: torch.dtype, adapters: dict[str, LoRARequest]) -> Interpreter:
    model = quantized(folder, kind, dtype)
    interpreter = proved(model, 100)
    for name in EIGHT:
        effects = read_effects(Lookup(model), interpreter.program, Path(adapters[name].lora_path))
        interpreter.take(name, interpreter.packed(effects))
    return interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_one_call_in_codes(folder, kind, dtype):
    interpreter = proved(quantized(folder, kind, dtype), 100)
    assert kinds(interpreter, step_with(interpreter, None)) == ["NativeStretch", "Logits"]
    groups = [linears.group for linears in interpreter._linears]
    weights = [part for group in groups[:-1] if group is not None for part in group.parts]
    assert len(weights) == 14
    assert all(isinstance(weight, PackedCodes) and weight.coding == kind for weight in weights)
    assert sum(group is not None and group.whole is not None for group in groups) == 2  # queries, keys and values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_eight_methods_in_one_batch_are_what_they_are_alone(folder, kind, dtype, wide_adapters):
    """Bit for bit, by the step in C++ and instruction by instruction."""
    fast, slow = pair_of(loaded(folder, kind, dtype, wide_adapters))
    together = [(s, 0, 3 + s % 5, version) for s, version in enumerate([None, *EIGHT, "lora", None])]
    both = fast.step(*together)
    assert torch.equal(both, slow.step(*together))
    at = 0
    for chunk in together:
        alone = Run(fast.interpreter, native=True).step(chunk)
        assert torch.equal(both[at : at + chunk[2]], alone)
        assert chunk[3] is None or not torch.equal(alone, Run(fast.interpreter, native=True).step((*chunk[:3], None)))
        at += chunk[2]


@pytest.mark.parametrize("kind", FORMATS)
def test_greedy_is_generate_on_the_same_model(folder, kind, wide_adapters, tokenizer):
    model: Any = quantized(folder, kind)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert expected != [generated(make_model("wide"), prompt) for prompt in PROMPTS]
    llm = LLM(quantized(folder, kind), tokenizer=tokenizer, max_num_batched_tokens=11)
    assert answers(llm, PROMPTS) == expected
    for name, request in wide_adapters.items():
        model = PeftModel.from_pretrained(model, request.path, adapter_name=name)
    names = list(wide_adapters)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(names))]
    each = [generated(model, p, adapter_names=[name]) for p, name in zip(prompts, names, strict=True)]
    assert answers(llm, prompts, [wide_adapters[name] for name in names]) == each
    assert llm.engine.runner.general is None


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_are_given_up_and_come_back(folder, kind):
    model = quantized(folder, kind)
    before = {name: {k: v.clone() for k, v in m.parts().items()} for name, m in _layers(model, QuantLinear)}
    assert len(before) == 14
    proved(model, 100, give_up=True)
    packed = dict(_layers(model, PackedQuantLinear))
    assert packed.keys() == before.keys()
    layer = packed["model.layers.1.mlp.down_proj"]
    assert not list(layer.buffers())
    unpack(model)
    for name, module in _layers(model, QuantLinear):
        parts = module.parts()
        assert all(torch.equal(parts[k], v) for k, v in before.pop(name).items())
    assert not before


def _layers(model: Any, kind: type) -> list[Any]:
    return [(name, module) for name, module in model.named_modules() if type(module) is kind]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("general", [False, True])
def test_a_head_in_int8(folder, tmp_path, general, tie):
    """The model's own head is int8, and its embeddings are not."""
    if tie:
        model = make_model("wide")
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(tmp_path / "tied")
        byte_tokenizer().save_pretrained(tmp_path / "tied")
        folder = tmp_path / "tied"
    llm = LLM(folder, quantize_head="int8", general_runner=general)
    runner: Any = llm.engine.runner
    if not general:
        [group] = runner.interpreter._linears[-1].group.parts
        assert (group.coding, group.shape) == ("int8", (263, 64))
    plain = load_model(folder)
    kept = load_model(folder, dtype="float32").get_output_embeddings().weight
    table = runner.model.get_input_embeddings().weight
    assert torch.equal(table, plain.get_input_embeddings().weight)
    codes = runner.model.get_output_embeddings().frozen_format().dense()
    torch.testing.assert_close(codes, kept, atol=kept.abs().max().item() / 250, rtol=0)
    plain.get_output_embeddings().weight = torch.nn.Parameter(codes)
    assert answers(llm, PROMPTS) == [generated(plain, prompt) for prompt in PROMPTS]


def test_a_head_is_kept_in_int8_or_as_it_is(folder, tokenizer):
    with pytest.raises(ConfigError, match="quantize_head='nf4' is not supported, only"):
        LLM(folder, quantize_head="nf4")
    with pytest.raises(ConfigError, match="quantize_head='int8' is for a model that is loaded here"):
        LLM(make_model("wide"), tokenizer=tokenizer, quantize_head="int8")
