"""FastLanguageModel: Unsloth's calls, what they set, and a fused model that trains as the general one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from models import llama_config
from veneer import FastLanguageModel, LoraConfig
from veneer.errors import ConfigError
from veneer.model.fused.activation_memory import BlockActivations
from veneer.model.fused.decoder import is_fused, unfuse
from veneer.model.memory.checkpointing import is_selective
from veneer.model.quantized.quant_linear import QuantLinear

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)
    config = llama_config(
        hidden_size=42,
        intermediate_size=58,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        vocab_size=23,
        max_position_embeddings=37,
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(place)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(23)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(place)
    return place


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_loads_as_asked(folder: Path, load_in_4bit: bool) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=19, dtype=torch.float32, load_in_4bit=load_in_4bit
    )
    assert tokenizer.model_max_length == 19
    assert any(isinstance(m, QuantLinear) for m in model.modules()) is load_in_4bit
    assert model.dtype == torch.float32


def test_loads_in_eight_bits(folder: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False, load_in_8bit=True)
    assert "int8" in str(model.model.layers[0].mlp.up_proj.weight.dtype)
    assert tokenizer.model_max_length == 37


@pytest.mark.parametrize(
    ("options", "message"),
    [({"load_in_8bit": True}, "exclude each other"), ({"max_seq_length": 38}, "between 1 and the model's 37")],
)
def test_refuses_what_cannot_be(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastLanguageModel.from_pretrained(str(folder), **options)


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("checkpointing", ["unsloth", False])
def test_trains_fused(folder: Path, load_in_4bit: bool, checkpointing: Any) -> None:
    base, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32, load_in_4bit=load_in_4bit)
    model: Any = FastLanguageModel.get_peft_model(
        base, r=3, lora_alpha=5, use_rslora=True, use_gradient_checkpointing=checkpointing, init_lora_weights=False
    )
    assert model is base
    assert is_fused(model)
    assert model.training
    assert model.is_gradient_checkpointing is bool(checkpointing)
    assert model.peft_config["default"] == LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM",
        base_model_name_or_path=str(folder), target_modules=model.peft_config["default"].target_modules,
    )  # fmt: skip
    losses = []
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append((loss.item(), model.model.layers[0].self_attn.q_proj.adapters["default"]["lora_A"].grad.clone()))
        unfuse(model)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-3, atol=1e-6)
    assert not is_fused(FastLanguageModel.for_inference(FastLanguageModel.for_training(model)))
    assert not model.training


@pytest.mark.parametrize(
    ("asked", "kind"), [("unsloth", "as needed"), (True, "full"), ("selective", "selective"), (False, None)]
)
def test_what_is_said_of_checkpointing_holds(folder: Path, asked: Any, kind: str | None) -> None:
    base, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False)
    model: Any = FastLanguageModel.get_peft_model(base, use_gradient_checkpointing=asked)
    function = getattr(model.model.layers[0], "_gradient_checkpointing_func", None)
    found = {
        None: function is None,
        "as needed": isinstance(function, BlockActivations),
        "full": getattr(function, "keywords", None) == {"use_reentrant": False},
        "selective": is_selective(model.model.layers[1]),
    }
    assert [name for name, holds in found.items() if holds] == [kind]


def test_the_seed_draws_the_adapter_and_nothing_else(folder: Path) -> None:
    drawn = []
    for seed in (5, 5, 6):
        base, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False)
        torch.manual_seed(1)
        model: Any = FastLanguageModel.get_peft_model(base, random_state=seed, use_gradient_checkpointing=False)
        drawn.append((model.model.layers[0].self_attn.q_proj.adapters["default"]["lora_A"].clone(), torch.rand(1)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert drawn[0][1] == drawn[2][1]
