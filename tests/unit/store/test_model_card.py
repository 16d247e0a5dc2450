"""Card of a saved adapter: its tags, its base, and the words that were written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from veneer import LoraConfig, get_peft_model


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 20, "intermediate_size": 23, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def test_the_model_card_keeps_what_was_written(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="someone/base")
    model = get_peft_model(base(), config)
    model.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.pipeline_tag) == (
        "peft", "someone/base", "text-generation",
    )  # fmt: skip
    assert set(card.data.tags) == {"lora", "transformers", "veneer", "base_model:adapter:someone/base"}
    assert "| lora_alpha | `8` |" in card.text
    card.text += "\nMy own words."
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    assert "My own words." in (tmp_path / "README.md").read_text()


def test_the_model_card_has_the_tags_of_the_base(tmp_path: Path) -> None:
    model = base()
    model.add_model_tags(["law", "french"])
    get_peft_model(model, LoraConfig(r=3)).save_pretrained(tmp_path)
    tags = huggingface_hub.ModelCard.load(tmp_path / "README.md").data.tags
    assert set(tags) == {"law", "french", "lora", "transformers", "veneer"}


def test_a_trainer_that_pushes_gets_its_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[str] = []

    def upload(self: Any, **options: Any) -> None:
        sent.extend(path.name for path in Path(options["folder_path"]).iterdir() if path.is_file())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: huggingface_hub.RepoUrl("someone/x"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model = get_peft_model(base(), LoraConfig(r=3, base_model_name_or_path="someone/base"))
    options = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, hub_model_id="someone/x")
    trainer = Trainer(model, options)
    trainer.init_hf_repo()
    trainer.push_to_hub()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(sent)
    assert "model.safetensors" not in sent
    assert huggingface_hub.ModelCard.load(tmp_path / "README.md").data.base_model == "someone/base"


def test_the_model_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "my-base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "my-base"), LoraConfig(r=3))
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "# LORA adapter of my-base\n" in text
    assert 'from_pretrained("BASE_MODEL")' in text
    assert str(tmp_path) not in text
    assert "base_model" not in text
