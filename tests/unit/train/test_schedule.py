"""AdaLoRA's budget is spent by the trainers themselves, and a resumed run spends it as the whole one does."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from veneer import AdaLoraConfig, SFTConfig, SFTTrainer, get_peft_model
from veneer.adapters.schedules import layers_of
from veneer.errors import TrainingError
from veneer.train.schedule import AdapterSchedule

STEPS = 9
FIELDS: dict[str, Any] = {
    "init_r": 4,
    "target_r": 1,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 2,
    "lora_alpha": 7,
    "orth_reg_weight": 0.2,
    "target_modules": ["q_proj", "down_proj"],
}
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def words() -> Dataset:
    vocabulary = ["the", "cat", "dog", "sat", "ran", "red", "blue", "tree"]
    return Dataset.from_list([{"text": " ".join(vocabulary[(i * j + 3) % 8] for j in range(4))} for i in range(11)])


@pytest.fixture
def start(tmp_path, tokenizer, make_model):
    def make(folder: str = "run", **changes: Any) -> SFTTrainer:
        return SFTTrainer(
            make_model(),
            SFTConfig(**{"output_dir": str(tmp_path / folder), "max_length": 16, **ARGUMENTS, **changes}),
            train_dataset=words(),
            processing_class=tokenizer,
            peft_config=AdaLoraConfig(**FIELDS),
        )

    return make


def n_left(model: Any) -> int:
    return sum(int((params["lora_E"] != 0).sum()) for params in layers_of(model, "default").values())


def test_the_budget_is_spent_over_the_run(start):
    trainer = start()
    trainer.train()
    assert trainer.model.peft_config["default"].total_step == STEPS
    assert n_left(trainer.model) == 4  # target_r of four layers


def test_a_resumed_run_spends_it_as_the_whole_one(tmp_path, start):
    whole = start()
    whole.train()
    for step in (1, 4, 8):
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", tmp_path / f"from{step}" / f"checkpoint-{step}")
        again = start(f"from{step}")
        again.train(resume_from_checkpoint=True)
        for (name, ours), (_, expected) in zip(
            again.model.named_parameters(), whole.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, expected), (step, name)


def test_accumulated_steps_add_the_pull_towards_orthogonality_once(start):
    """Four rows at once, or two and two, are the same step."""
    models = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = start(
            f"n{size}", max_steps=5, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        models.append(dict(trainer.model.named_parameters()))
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-4, atol=1e-5)


def test_transformers_own_trainer_takes_the_callback(tmp_path, make_model):
    model = get_peft_model(make_model(), AdaLoraConfig(**FIELDS))
    rows = [{"input_ids": [5 + i, 9, 11, 3], "labels": [5 + i, 9, 11, 3]} for i in range(6)]
    arguments = TrainingArguments(str(tmp_path), **ARGUMENTS)
    Trainer(model, arguments, train_dataset=rows, callbacks=[AdapterSchedule()]).train()
    assert n_left(model) == 4


def test_transformers_own_trainer_resumes_where_the_scores_are(tmp_path, make_model):
    rows = [{"input_ids": [5 + i, 9, 11, 3], "labels": [5 + i, 9, 11, 3]} for i in range(6)]

    def run(folder, resume=None):
        torch.manual_seed(3)
        model = get_peft_model(make_model(), AdaLoraConfig(**FIELDS))
        arguments = TrainingArguments(str(folder), **ARGUMENTS)
        Trainer(model, arguments, train_dataset=rows, callbacks=[AdapterSchedule()]).train(
            resume_from_checkpoint=resume
        )
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "run")
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS - 4}"
    resumed = run(tmp_path / "run", str(checkpoint))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    (checkpoint / "schedule.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"the scores that its adapter's schedule needs, is not there"):
        run(tmp_path / "run", str(checkpoint))
