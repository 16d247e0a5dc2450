"""A tiny chat model with a tokenizer, adapters for it, and a runner for the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner, Result

from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.cli.app import app

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *bytes_to_unicode().values()])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template = TEMPLATE
    return made


def tiny_model(seed: int = 7, hidden: int = 48) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=61,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=131,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(model_folder: Path) -> Path:
    """A LoRA adapter that changes the model's answers."""
    folder = model_folder.parent / "adapter"
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]),
    )
    fill(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_adapter(model_folder: Path) -> Path:
    """An adapter of a model of another width."""
    folder = model_folder.parent / "other"
    model = get_peft_model(tiny_model(hidden=24), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.save_pretrained(folder)
    return folder


def fill(model: torch.nn.Module) -> None:
    """Adapter parameters that are not neutral."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data.normal_(0, 0.5)


@pytest.fixture
def veneer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs a command in a wide terminal with a cache of its own."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return run
