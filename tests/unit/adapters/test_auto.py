"""A base and its adapter in one call, and PEFT's names for adapted models by task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, PreTrainedTokenizerFast

import veneer
from veneer import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    get_peft_model,
)
from veneer.errors import ConfigError
from veneer.methods import all_methods

from .conftest import VOCAB, logits


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "init_lora_weights": False, **changes})


def saved(tiny: Any, folder: Path, **changes: Any) -> tuple[Path, Any]:
    """A base on disk, an adapter on disk that names it, and the adapted model."""
    tiny().save_pretrained(folder / "base")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, config(**changes))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model.eval()


@pytest.mark.parametrize("auto", [AutoPeftModelForCausalLM, AutoPeftModel])
def test_the_base_that_the_adapter_names_with_the_adapter_on_it(
    tiny: Any, ids: Tensor, tmp_path: Path, auto: Any
) -> None:
    folder, model = saved(tiny, tmp_path, task_type="CAUSAL_LM")
    again = auto.from_pretrained(folder)
    assert isinstance(again, PeftModelForCausalLM)
    assert isinstance(again, LlamaForCausalLM)
    assert not isinstance(again, PeftModelForSequenceClassification)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=0)


def test_options_reach_the_base_and_the_adapter(tiny: Any, tmp_path: Path) -> None:
    folder, _ = saved(tiny, tmp_path, task_type="CAUSAL_LM")
    model: Any = AutoPeftModelForCausalLM.from_pretrained(folder, "second", True, dtype=torch.bfloat16, token=False)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.active_adapters == ["second"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    narrow = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_an_adapter_in_a_subfolder(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    folder, model = saved(tiny, tmp_path, task_type="CAUSAL_LM")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, subfolder=folder.name)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=0)


def test_a_larger_tokenizer_beside_the_adapter_resizes_the_base(tiny: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCAB + 2)
    get_peft_model(base, config(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])).save_pretrained(
        tmp_path / "a"
    )
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB + 2)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "a")
    model: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 2


def test_without_a_task_the_class_in_the_file_counts(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    folder, model = saved(tiny, tmp_path)
    torch.testing.assert_close(logits(AutoPeftModel.from_pretrained(folder), ids), logits(model, ids), rtol=0, atol=0)
    path = folder / "adapter_config.json"
    stored = json.loads(path.read_text())
    for mapping in (None, {"base_model_class": "Popen", "parent_library": "subprocess"}):
        path.write_text(json.dumps({**stored, "auto_mapping": mapping}))
        with pytest.raises(ConfigError, match="names neither a task nor a class of transformers"):
            AutoPeftModel.from_pretrained(folder)
    bare = AutoPeftModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(bare, LlamaForSequenceClassification)


def test_another_task_or_no_base_is_refused(tiny: Any, tmp_path: Path) -> None:
    folder, _ = saved(tiny, tmp_path, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="AutoPeftModelForSequenceClassification is for task_type=SEQ_CLS"):
        AutoPeftModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ConfigError, match="PeftModelForSequenceClassification is for task_type='SEQ_CLS'"):
        PeftModelForSequenceClassification.from_pretrained(tiny(), folder)
    get_peft_model(tiny(), config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "alone")
    with pytest.raises(ConfigError, match="does not name its base"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone")


def test_the_names_by_task_attach_and_load(tiny: Any, ids: Tensor, tmp_path: Path) -> None:
    model = PeftModelForCausalLM(tiny(), config(), "first")
    assert isinstance(model, PeftModelForCausalLM)
    assert issubclass(PeftModelForCausalLM, PeftModel)
    assert not isinstance(tiny(), PeftModelForCausalLM)
    assert model.peft_config["first"].task_type == "CAUSAL_LM"
    model.save_pretrained(tmp_path)
    again = PeftModelForCausalLM.from_pretrained(tiny(), tmp_path / "first", is_trainable=True)
    assert isinstance(again, PeftModelForCausalLM)
    assert any(parameter.requires_grad for parameter in again.parameters())
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=0)
    assert not isinstance(get_peft_model(tiny(), config()), PeftModelForCausalLM)


@pytest.mark.parametrize(
    "name", [name for name in veneer.__all__ if name.startswith(("PeftModelFor", "AutoPeftModelF"))]
)
def test_each_task_has_its_name(name: str) -> None:
    task = getattr(veneer, name).task
    names = {"Seq2SeqLM": "SEQ_2_SEQ_LM", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    names |= {"CausalLM": "CAUSAL_LM", "QuestionAnswering": "QUESTION_ANS", "FeatureExtraction": "FEATURE_EXTRACTION"}
    assert names[name.partition("ModelFor")[2]] == task


def test_feature_extraction_takes_the_model_without_a_head(tiny: Any, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    base = LlamaModel.from_pretrained(tmp_path / "base")
    get_peft_model(base, config(task_type="FEATURE_EXTRACTION")).save_pretrained(tmp_path / "a")
    assert isinstance(veneer.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "a"), LlamaModel)


def test_the_enum_of_methods_holds_those_that_are_here() -> None:
    assert set(veneer.PeftType) == set(all_methods())
    assert veneer.PeftType.LORA == LoraConfig().peft_type == "LORA"
    assert veneer.PeftType("IA3").value == "IA3"
