"""The trainers on preferences take TRL's own settings, and transformers', and fill in those of veneer."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
import trl

import veneer
from veneer.errors import ConfigError
from veneer.train.preference.trainer import PreferenceTrainer

GROUPS = {"num_generations": 3, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
GIVEN: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 0.3, "loss_type": "ipo", "hub_token": "secret"}, "KTO": {"beta": 0.3},
    "Reward": {"center_rewards_coefficient": 0.2}, "GRPO": {"beta": 0.3, **GROUPS}, "RLOO": {"beta": 0.3, **GROUPS},
}  # fmt: skip


@pytest.mark.parametrize("kind", GIVEN)
def test_settings_of_trl_become_those_of_veneer(settings, kind):
    own, theirs = getattr(veneer, f"{kind}Config"), getattr(trl, f"{kind}Config")
    given = theirs(**{**settings, **GIVEN[kind]})
    found = PreferenceTrainer.own_settings(given, own)
    assert type(found) is own
    for name in given.to_dict().keys() - {"logging_dir"}:
        assert getattr(found, name) == getattr(given, name), name
    assert (found.fused, found.lora_plus) == ("auto", None)
    assert PreferenceTrainer.own_settings(found, own) is found


@pytest.mark.parametrize("kind", GIVEN)
def test_settings_of_transformers_are_filled_in(settings, kind):
    own = getattr(veneer, f"{kind}Config")
    batch = {"per_device_train_batch_size": 8}  # a multiple of TRL's own num_generations
    found = PreferenceTrainer.own_settings(transformers.TrainingArguments(**{**settings, **batch}), own)
    assert (type(found), found.learning_rate, found.max_steps) == (own, 0.01, 4)


@pytest.mark.parametrize(("given", "kind"), [("KTO", "DPO"), ("SFT", "DPO"), ("DPO", "Reward"), ("RLOO", "GRPO")])
def test_settings_of_another_trainer_are_refused(settings, given, kind):
    other, own = getattr(trl, f"{given}Config"), getattr(veneer, f"{kind}Config")
    with pytest.raises(
        ConfigError, match=rf"{given}Config: this trainer takes veneer\.{kind}Config, trl\.{kind}Config"
    ):
        PreferenceTrainer.own_settings(other(**{**settings, "per_device_train_batch_size": 8}), own)


def test_a_run_with_settings_of_trl_is_that_with_those_of_veneer(settings, make_model, tokenizer, pairs):
    runs = []
    for config in (trl.DPOConfig, veneer.DPOConfig):
        trainer = veneer.DPOTrainer(
            make_model(), args=config(**settings), train_dataset=pairs, processing_class=tokenizer,
            peft_config=veneer.LoraConfig(r=3, target_modules=["q_proj"]),
        )  # fmt: skip
        trainer.train()
        runs.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4
