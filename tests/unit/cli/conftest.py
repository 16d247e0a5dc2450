"""A tiny chat model with a tokenizer, adapters for it, and a runner for the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

from models import byte_tokenizer, llama_config
from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.cli.app import app


def tiny_model(seed: int = 7, hidden: int = 48) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = llama_config(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=61,
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
    byte_tokenizer().save_pretrained(folder)
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
