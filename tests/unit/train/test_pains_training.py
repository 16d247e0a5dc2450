"""The most common complaints of users (docs/pains.md), as far as training goes."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from veneer import LoraConfig
from veneer.errors import DataError
from veneer.train.config import SFTConfig
from veneer.train.trainer import SFTTrainer

TEXTS = ["the cat sat on the mat", "yes", "a dog ran under the big red house and it was blue", "hello what did it say"]


@pytest.fixture
def train(tmp_path, tokenizer, make_model):
    """Trains LoRA on rows and returns the trainer."""

    def run(rows, **changes):
        base = {
            "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_steps": 2, "logging_steps": 1,
            "learning_rate": 0.01, "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False,
            "disable_tqdm": True, "max_length": 40, "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        trainer = SFTTrainer(
            make_model(),
            SFTConfig(**{**base, **changes}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=config,
        )
        trainer.train()
        return trainer

    return run


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def texts():
    return [{"text": text} for text in TEXTS]


def test_pain_05_packed_sequences_do_not_see_one_another(train):
    packed, apart = train(texts(), packing=True), train(texts())
    assert packed.train_dataset.num_rows < apart.train_dataset.num_rows
    assert losses(packed) == pytest.approx(losses(apart), rel=1e-4)


def test_pain_06_accumulating_batches_changes_nothing(train):
    whole = train(texts())
    parts = train(texts(), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_pain_13_the_end_is_learned_and_a_set_without_a_trained_token_is_an_error(train, tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    chat = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes please"}] for text in TEXTS]
    trainer = train([{"messages": turns} for turns in chat], assistant_only_loss=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    kept = [ids[label != -100].tolist() for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert kept == [tokenizer("yes please <end>")["input_ids"]] * 4
    assert torch.any(batch["attention_mask"] == 0)
    silent = [{"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "yes"}]}]
    with pytest.raises(DataError):
        train(silent, assistant_only_loss=True, max_length=2)
