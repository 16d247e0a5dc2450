"""Training on the best of several answers: which is chosen, the likelihood that TRL's SFT has, rounds, a resume."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset

import veneer
from veneer import BestOfConfig, BestOfTrainer, LoraConfig
from veneer.errors import ConfigError
from veneer.learn.best_of import best_answers
from veneer.learn.journal import read_journal

from .conftest import LORA

ROWS = Dataset.from_list([{"prompt": f"say {i} " + "x" * (5 * i % 17)} for i in range(11)])
SMALL = {"num_generations": 3, "per_device_train_batch_size": 6, "max_completion_length": 7}
NAN = float("nan")


def reward(completions: list[str], **row: Any) -> list[float]:
    return [len(set(text)) / 7 for text in completions]


@pytest.fixture
def trainer_of(make_model, tokenizer, settings):
    def make(function: Any = reward, **changes: Any) -> Any:
        args = BestOfConfig(**{**settings, **SMALL, **changes})
        return BestOfTrainer(
            make_model(), function, args, ROWS, processing_class=tokenizer, peft_config=LoraConfig(**LORA)
        )

    return make


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def lines(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("rewards", "floor", "kept"),
    [
        ([0.2, 0.7, 0.7, 0.1, 0.1, 0.1], None, [1]),  # the first of equal ones; a group of equal rewards is left out
        ([0.2, 0.7, 0.7, -3.0, -2.0, -2.5], None, [1, 4]),
        ([0.2, 0.7, 0.7, -3.0, -2.0, -2.5], -1.9, [1]),
        ([0.2, 0.7, 0.7, -3.0, -2.0, -2.5], 0.9, []),
        ([NAN, 0.3, 0.4, NAN, 0.6, NAN], None, [2]),  # one opinion alone is no best
        ([NAN, NAN, NAN, -5.0, NAN, -6.0], None, [3]),
    ],
)
def test_which_answer_is_the_best(rewards, floor, kept):
    assert best_answers(torch.tensor(rewards), 3, floor).nonzero().flatten().tolist() == kept


def test_a_step_is_the_step_of_sft_on_the_best_answers(trainer_of, make_model, tokenizer, settings, tmp_path):
    ours = trainer_of(max_steps=1, gradient_accumulation_steps=2, rollout_engine="engine")
    start = {k: v.clone() for k, v in veneer.get_peft_model_state_dict(ours.model).items()}
    ours.train()
    drawn = [*read_journal(tmp_path)]
    kept = [line for line in drawn if line["advantage"]]
    assert len(drawn) == 12
    assert 1 < len(kept) <= 4
    rows = []
    for line in kept:
        group = [each for each in drawn if each["row"] // 3 == line["row"] // 3]
        best = max(group, key=lambda each: each["reward"])  # the first of equal ones
        assert line is best
        prompt = tokenizer(line["prompt"])["input_ids"]
        mask = [0] * len(prompt) + [1] * len(line["ids"])
        rows.append({"input_ids": prompt + line["ids"], "completion_mask": mask})
    args = trl.SFTConfig(
        **{**settings, "max_steps": 1, "per_device_train_batch_size": len(rows)}, completion_only_loss=True
    )
    theirs = trl.SFTTrainer(
        make_model(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft.LoraConfig(**LORA),
    )  # fmt: skip
    peft.set_peft_model_state_dict(theirs.model, start)
    theirs.train()
    (own,), (other,) = lines(ours), lines(theirs)
    assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert own["best_of/kept"] == pytest.approx(len(kept) / 4)
    assert own["best_of/reward"] == pytest.approx(sum(line["reward"] for line in kept) / len(kept), abs=1e-6)
    after = peft.get_peft_model_state_dict(theirs.model)
    for name, value in veneer.get_peft_model_state_dict(ours.model).items():
        torch.testing.assert_close(value, after[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ["engine", "generate"])
def test_nothing_is_learned_if_no_answer_is_kept(trainer_of, engine):
    for function, changes in (
        (lambda completions, **row: [0.5 for _ in completions], {}),
        (reward, {"reward_floor": 9}),
    ):
        trainer = trainer_of(function, max_steps=2, rollout_engine=engine, **changes)
        before = trained(trainer)
        trainer.train()
        assert [line["best_of/kept"] for line in lines(trainer)] == [0, 0]
        assert [line["loss"] for line in lines(trainer)] == [0, 0]
        assert all(torch.equal(value, before[name]) for name, value in trained(trainer).items())


def test_a_round_of_several_steps_goes_on_to_the_bit(trainer_of, tmp_path):
    def run(resume: str | None) -> Any:
        trainer = trainer_of(
            max_steps=7, save_strategy="steps", save_steps=3, steps_per_generation=2, num_iterations=2, seed=5,
            rollout_engine="engine",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        losses = [line["loss"] for line in lines(trainer)]
        return trained(trainer), losses, [line["ids"] for line in read_journal(tmp_path)]

    (whole, losses, drawn), (again, others, redrawn) = run(None), run(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert losses == others
    assert drawn == redrawn
    assert len(drawn) == 2 * 12
    assert losses[2] < losses[0]  # the same answers a second time


def test_the_best_answers_are_evaluated_alike_by_both_engines(trainer_of, make_model, tokenizer, settings):
    args = BestOfConfig(**{**settings, **SMALL, "per_device_eval_batch_size": 6, "max_steps": 1})
    trainer = BestOfTrainer(make_model(), reward, args, ROWS, ROWS, tokenizer, peft_config=LoraConfig(**LORA))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert 0 < first["eval_loss"] == second["eval_loss"]
    assert 0 < first["eval_best_of/kept"] == second["eval_best_of/kept"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.1}, "beta=0.1 has no effect on the likelihood of the best answer: leave it out"),
        ({"loss_type": "dr_grpo", "epsilon": 0.3}, r"(?s)epsilon=0.3 has no effect.*loss_type='dr_grpo' has no effect"),
        ({"reward_floor": NAN}, "reward_floor=nan must be a finite number"),
        ({"reward_floor": "high"}, "reward_floor='high' must be a finite number"),
        ({"num_generations": 1}, "num_generations=1 must be at least 2"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        BestOfConfig(**{**settings, **SMALL, **changes})
