"""Adapters on a base in 4 bits: equal to PEFT on bitsandbytes, merged into a plain model, merged into new codes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models import gpt2_config, llama_config
from veneer import (
    BitsAndBytesConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from veneer.adapters.requantizing import merge_requantized, survival
from veneer.errors import CompositionError, ConfigError
from veneer.model.attach.attach import live_parameters
from veneer.model.quantized.quant_linear import QuantLinear

VOCAB = 101
# multiples of 64: elsewhere the CPU code of bitsandbytes is wrong
FAMILIES: dict[str, tuple[Any, list[str]]] = {
    "llama": (
        llama_config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
        ),
        ["q_proj", "up_proj", "down_proj"],
    ),
    "gpt2": (
        gpt2_config(
            vocab_size=VOCAB,
            n_embd=64,
            n_inner=128,
            n_head=4,
            n_positions=37,
            attn_pdrop=0,
            embd_pdrop=0,
            resid_pdrop=0,
            bos_token_id=1,
            eos_token_id=1,
        ),
        ["c_attn", "c_fc", "mlp.c_proj"],
    ),
}
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
METHODS: dict[str, Any] = {
    "lora": lambda targets: LoraConfig(r=3, lora_alpha=7, target_modules=targets),
    "dora": lambda targets: LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=True),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=targets[2:]),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family saved in bfloat16, biases not zero."""
    found = {}
    for name, (config, _) in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        for parameter in model.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
        found[name] = tmp_path_factory.mktemp(name)
        model.to(torch.bfloat16).save_pretrained(found[name])
    return found


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> PreTrainedModel:
    quantized = BitsAndBytesConfig(**NF4, **fields)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, dtype=dtype)


def with_adapter(model: PreTrainedModel, config: Any, size: float = 0.1) -> PeftModel:
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return adapted.eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


@every_family
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_equal_to_peft_on_bitsandbytes(
    family: str, method: str, double_quant: bool, folders: dict[str, Path], ids: Tensor, tmp_path: Path
) -> None:
    fields = {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_use_double_quant": double_quant}
    ours = with_adapter(load(folders[family], torch.float32, **fields), METHODS[method](FAMILIES[family][1]))
    ours.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        folders[family], dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**NF4, **fields)
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ours.train()
    theirs.train()  # in eval mode bitsandbytes computes with weights rounded to bfloat16
    here, there = ours(ids, labels=ids), theirs(input_ids=ids, labels=ids)
    torch.testing.assert_close(here.logits, there.logits, rtol=2e-5, atol=2e-6)
    here.loss.backward()
    there.loss.backward()
    grads = {key: t.grad for key, t in live_parameters(ours, ours.adapter_state, "default").items() if t.requires_grad}
    named = {n: p.grad if p.grad is not None else torch.zeros(()) for n, p in theirs.named_parameters()}
    expected = peft.get_peft_model_state_dict(theirs, named)
    assert grads
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=2e-4, atol=2e-6)


@every_family
@pytest.mark.parametrize("prepared", [False, True])
def test_merging_gives_a_plain_model_in_16_bits(
    family: str, prepared: bool, folders: dict[str, Path], ids: Tensor, tmp_path: Path
) -> None:
    """The expected weight is the base's codes read back, plus the update, rounded once."""
    base = load(folders[family])
    classes = {n: type(m) for n, m in AutoModelForCausalLM.from_pretrained(folders[family]).named_modules()}
    model = with_adapter(
        prepare_model_for_kbit_training(base) if prepared else base,
        LoraConfig(r=3, lora_alpha=7, target_modules=FAMILIES[family][1], bias="lora_only"),
    )
    expected = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            weight = layer.frozen_format().dense(torch.float32)
            if hasattr(layer, "adapters"):
                factors = layer.adapters["default"]
                weight = weight + factors["lora_B"] @ factors["lora_A"] * (7 / 3)
            expected[path] = weight.to(torch.bfloat16)
    adapted = logits(model, ids)
    merged = model.merge_and_unload()
    assert {n: type(m) for n, m in merged.named_modules()} == classes
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    for path, weight in expected.items():
        layer = merged.get_submodule(path)
        assert torch.equal(layer.weight.T if isinstance(layer, Conv1D) else layer.weight, weight), path
    assert (logits(merged, ids) - adapted).norm() / adapted.norm() < 0.02
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(logits(plain, ids), logits(merged, ids))
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folders[family] / "model.safetensors").keys()


def test_an_adapter_that_leaves_the_codes_alone_keeps_them(folders: dict[str, Path], ids: Tensor) -> None:
    model = with_adapter(load(folders["llama"]), LoraConfig(target_modules=["lm_head"]))
    merged = model.merge_and_unload()
    assert sum(isinstance(m, QuantLinear) for m in merged.modules()) == 14
    with pytest.raises(ConfigError, match="no layer that the adapters change is quantized"):
        with_adapter(merged, LoraConfig(target_modules=["lm_head"])).merge_and_unload(requantize=True)


@every_family
def test_requantizing_says_what_is_left(
    family: str, folders: dict[str, Path], ids: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The expected codes are those of bitsandbytes' layout for the merged weight: quantize(base + update)."""
    shares = {}
    for size in (0.002, 0.2):
        model = with_adapter(load(folders[family]), METHODS["lora"](FAMILIES[family][1]), size)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and hasattr(m, "adapters")}
        expected = {}
        for path, layer in layers.items():
            factors = layer.adapters["default"]
            weight = layer.frozen_format().dense(torch.float32) + factors["lora_B"] @ factors["lora_A"] * (7 / 3)
            expected[path] = layer.spec.quantize(weight.detach())
        report = merge_requantized(model, model.adapter_state, ("default",))
        shares[size] = [found.share for found in report]
        assert {found.path for found in report} == layers.keys()
        merged = model._unload()
        for path, parts in expected.items():
            layer = merged.get_submodule(path)
            assert type(layer) is QuantLinear
            assert all(torch.equal(layer.parts()[name], part) for name, part in parts.items())
    assert max(shares[0.002]) < 0.5 < 0.9 < min(shares[0.2])
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), ids), logits(merged, ids))

    model = with_adapter(load(folders[family]), METHODS["lora"](FAMILIES[family][1]), 0.2)
    again = model.merge_and_unload(requantize=True)
    assert torch.equal(logits(again, ids), logits(merged, ids))
    printed = capsys.readouterr().out
    assert f"re-quantized {len(shares[0.2])} layers" in printed


def test_survival() -> None:
    before = torch.tensor([[3.0, 4.0, 0.0]])
    wanted = before + torch.tensor([[0.0, 0.0, 1.0]])
    found = survival("a", before, wanted, before + torch.tensor([[1.0, 0.0, 1.0]]))
    assert found.path == "a"
    assert found.relative_size == pytest.approx(0.2)
    assert found.share == pytest.approx(0.5**0.5)
    assert found.gain == pytest.approx(1.0)
    assert survival("a", before, wanted, before).share == 0
    assert survival("a", before, before, before).share == 1
    assert survival("a", torch.zeros(1, 3), wanted, wanted).relative_size == float("inf")


def test_requantizing_that_fails_changes_nothing(folders: dict[str, Path], ids: Tensor) -> None:
    model = with_adapter(load(folders["llama"]), METHODS["lora"](["q_proj", "lm_head"]))
    before = logits(model, ids)
    model.lm_head.adapters["default"]["lora_B"].data[0, 0] = torch.inf
    with pytest.raises(CompositionError, match="lm_head"):
        model.merge_and_unload(safe_merge=True, requantize=True)
    model.lm_head.adapters["default"]["lora_B"].data[0, 0] = 0
    after = logits(model, ids)
    assert torch.equal(after[..., 1:], before[..., 1:])
    assert model.active_adapters == ["default"]
