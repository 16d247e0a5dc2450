"""Rows of preferences over bytes, a tiny Llama, and settings of short runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from models import byte_tokenizer, llama_config


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def pairs() -> Dataset:
    """Eleven pairs of odd lengths."""
    return Dataset.from_list(
        [
            {"prompt": f"say {i} ", "chosen": "yes please " + "a" * (i % 4), "rejected": "no" + "b" * (2 * i % 7)}
            for i in range(11)
        ]
    )


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """``make_model(kind=LlamaForCausalLM)``: the same weights each time, large enough that a change shows."""

    def make(kind: type[PreTrainedModel] = LlamaForCausalLM, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(3)
        return kind(llama_config(vocab_size=len(tokenizer), initializer_range=0.3, num_labels=1, **changes))

    return make


@pytest.fixture
def settings(tmp_path: Any) -> dict[str, Any]:
    """Return settings of four steps in float32, each logged, without dropout."""
    return {
        "output_dir": str(tmp_path), "bf16": False, "max_steps": 4, "logging_steps": 1, "learning_rate": 0.01,
        "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True,
        "use_cpu": True, "per_device_train_batch_size": 4,
    }  # fmt: skip


LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}
