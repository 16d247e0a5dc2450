"""veneer: parameter-efficient fine-tuning of transformers models."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AdaLoraConfig": "veneer.methods.adalora",
    "AutoPeftModel": "veneer.adapters.auto",
    "AutoPeftModelForCausalLM": "veneer.adapters.auto",
    "AutoPeftModelForFeatureExtraction": "veneer.adapters.auto",
    "AutoPeftModelForQuestionAnswering": "veneer.adapters.auto",
    "AutoPeftModelForSeq2SeqLM": "veneer.adapters.auto",
    "AutoPeftModelForSequenceClassification": "veneer.adapters.auto",
    "AutoPeftModelForTokenClassification": "veneer.adapters.auto",
    "BitsAndBytesConfig": "veneer.store.quantization",
    "BottleneckConfig": "veneer.methods.bottleneck",
    "EvaConfig": "veneer.inits.eva",
    "FastLanguageModel": "veneer.adapters.fast_language_model",
    "IA3Config": "veneer.methods.ia3",
    "LoraConfig": "veneer.methods.lora",
    "PeftConfig": "veneer.adapters.peft_config",
    "PeftModel": "veneer.adapters.peft_model",
    "PeftModelForCausalLM": "veneer.adapters.task_models",
    "PeftModelForFeatureExtraction": "veneer.adapters.task_models",
    "PeftModelForQuestionAnswering": "veneer.adapters.task_models",
    "PeftModelForSeq2SeqLM": "veneer.adapters.task_models",
    "PeftModelForSequenceClassification": "veneer.adapters.task_models",
    "PeftModelForTokenClassification": "veneer.adapters.task_models",
    "PeftType": "veneer.adapters.peft_config",
    "PrefixTuningConfig": "veneer.methods.prefix",
    "PromptEncoderConfig": "veneer.methods.ptuning",
    "PromptTuningConfig": "veneer.methods.prompt",
    "SFTConfig": "veneer.train.config",
    "SFTTrainer": "veneer.train.trainer",
    "TaskType": "veneer.core.tasks",
    "VeraConfig": "veneer.methods.vera",
    "get_base_model_state_dict": "veneer.adapters.base_state",
    "get_eva_state_dict": "veneer.adapters.eva",
    "get_layer_status": "veneer.adapters.status",
    "get_model_status": "veneer.adapters.status",
    "get_peft_config": "veneer.adapters.peft_config",
    "get_peft_model": "veneer.adapters.peft_model",
    "get_peft_model_state_dict": "veneer.adapters.functional",
    "initialize_kv_prefix_from_past_key_values": "veneer.adapters.prefix_start",
    "initialize_kv_prefix_from_text": "veneer.adapters.prefix_start",
    "initialize_lora_eva_weights": "veneer.adapters.eva",
    "inject_adapter_in_model": "veneer.adapters.functional",
    "load_peft_weights": "veneer.adapters.functional",
    "prepare_model_for_kbit_training": "veneer.model.prepare",
    "replace_lora_weights_loftq": "veneer.adapters.loftq",
    "set_base_model_state_dict": "veneer.adapters.base_state",
    "set_peft_model_state_dict": "veneer.adapters.functional",
}

__all__ = [
    "AdaLoraConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BitsAndBytesConfig",
    "BottleneckConfig",
    "EvaConfig",
    "FastLanguageModel",
    "IA3Config",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "SFTConfig",
    "SFTTrainer",
    "TaskType",
    "VeraConfig",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``import veneer`` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
