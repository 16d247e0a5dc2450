"""Models by kind: those with images are loaded for their text, and all that predict no next token are named."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from veneer.errors import ConfigError
from veneer.plan.model import meta_base
from veneer.recipe.parts import ModelPart
from veneer.store.kinds import auto_class
from veneer.store.source import load_model

SIZES = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 67}
OTHERS = {
    transformers.BertModel: "an encoder",
    transformers.ModernBertForMaskedLM: "an encoder",
    transformers.BertForSequenceClassification: "a model with a head of classes",
    transformers.T5ForConditionalGeneration: "an encoder with a decoder",
    transformers.LlamaForSequenceClassification: "a model with a head of classes",
    transformers.ViTForImageClassification: "of no kind that predicts the next token",
}


def test_models_that_predict_no_next_token_are_named(tmp_path):
    for kind, told in OTHERS.items():
        config = kind.config_class()
        config.architectures = [kind.__name__]
        config.save_pretrained(tmp_path / kind.__name__)
        (tmp_path / kind.__name__ / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        allowed = "with images too; encoders with a decoder are served, and planned with --serve. Give one of them"
        with pytest.raises(ConfigError, match=f"{kind.__name__} is {told} .*{allowed}"):
            load_model(tmp_path / kind.__name__)
        with pytest.raises(ConfigError, match=f"is {told}"):
            meta_base(config, ModelPart(source=str(tmp_path / kind.__name__)))


def test_decoders_of_encoder_types_and_models_with_images_have_a_class():
    assert auto_class("m", {"model_type": "bert", "architectures": ["BertLMHeadModel"]}) is AutoModelForCausalLM
    assert auto_class("m", {"model_type": "bart", "is_decoder": True}) is AutoModelForCausalLM
    assert auto_class("m", {"model_type": "llama"}) is AutoModelForCausalLM
    named = ["SmolVLMForConditionalGeneration"]
    assert auto_class("m", {"model_type": "smolvlm", "architectures": named}) is AutoModelForImageTextToText


def test_a_model_with_images_is_loaded_for_its_text(tmp_path):
    text = transformers.LlamaConfig(**SIZES, pad_token_id=0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
    }
    config = transformers.SmolVLMConfig(
        text_config=text.to_dict(), vision_config={**vision, "patch_size": 4}, pad_token_id=0, image_token_id=66
    )
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(load_model(tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)
