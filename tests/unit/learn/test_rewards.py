"""Reward functions: those that are built in, and what those of users may return."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from datasets import Dataset

from veneer import AdaLoraConfig, GRPOConfig, GRPOTrainer, LoraConfig, RLOOConfig, RLOOTrainer
from veneer.errors import ConfigError, DataError, TrainingError
from veneer.learn.rewards import RewardLimits, checked_reward
from veneer.recipe.rewards import exact_match, length, regex, reward_function

from .conftest import LORA

LIMITS = RewardLimits()
CHAT = [[{"role": "assistant", "content": "so #### 12"}], [{"role": "assistant", "content": "#### 3 #### 4"}]]


def test_built_in_rewards():
    assert exact_match([" 12", "x"], answer=["12 ", "y"]) == [1.0, 0.0]
    assert exact_match(CHAT, answer=["12", "3"], pattern=r"#### (\d+)") == [1.0, 0.0]
    assert exact_match(CHAT, answer=["so #### 12", "#### 4"], pattern=r"#### (\d+)") == [1.0, 1.0]
    assert exact_match(["a"], gold=["a"], column="gold") == [1.0]
    assert regex(CHAT, pattern="3.*4") == [0.0, 1.0]
    assert length(["", "", ""], target=4, completion_ids=[[1] * 4, [1] * 3, [1] * 9]) == [1.0, 0.75, 0.0]
    with pytest.raises(DataError, match=r"the column 'answer', and the rows have \['gold', 'prompt'\]"):
        exact_match(["a"], gold=["a"], prompts=["b"])


@pytest.mark.parametrize(
    ("returned", "alone", "message"),
    [
        (None, True, "the reward function wrong returned None: it must return a list with one number"),
        ([1.0], True, "returned 1 rewards for 2 completions: it must return one for each"),
        ([1.0, None], True, r"returned None for completion 2.*None, for no opinion, is for one of several"),
        ([float("nan"), 1.0], False, "returned nan for completion 1: a reward is a finite number"),
        ([1.0, float("inf")], False, "returned inf for completion 2"),
        (["good", 1.0], True, "returned 'good' for completion 1"),
        ("12", True, "returned '12'"),
    ],
)
def test_what_a_reward_function_may_not_return(returned, alone, message):
    def wrong(completions, **row):
        return returned

    with pytest.raises(TrainingError, match=message):
        checked_reward(wrong, LIMITS, alone=alone)(prompts=["a", "b"], completions=["c", "d"])


def test_a_reward_function_that_raises_is_told_by_its_line():
    def wrong(completions, **row):
        return [answer["nope"] for answer in completions]

    line = wrong.__code__.co_firstlineno + 1
    with pytest.raises(
        TrainingError, match=rf"the reward function wrong raised TypeError: .*test_rewards.py, line {line}"
    ):
        checked_reward(wrong, LIMITS, alone=True)(prompts=["a"], completions=["c"])


def test_one_of_several_may_have_no_opinion():
    def judge(completions, **row):
        return [None, True]

    assert checked_reward(judge, LIMITS, alone=False)(completions=["a", "b"]) == [None, True]


def test_settings_are_bound_and_refused():
    bound = reward_function("regex", {"pattern": "a+"})
    assert bound.__name__ == "regex"
    assert isinstance(bound, functools.partial)
    told = r"math:fsum: 2 problems\n  wrong: it takes no such argument\n  it must take \*\*row"
    with pytest.raises(ConfigError, match=told):
        reward_function("math:fsum", {"wrong": 1})


def test_files_of_one_name_are_modules_of_their_own_and_a_failing_one_is_none(tmp_path):
    for folder, text in (("a", "def f(**row): return [2.0]"), ("b", "def f(**row): return [3.0]"), ("c", "1 / 0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards.py").write_text(text)
    before = set(sys.modules)
    first, second = (reward_function("rewards.py:f", {}, tmp_path / folder) for folder in "ab")
    assert (first(), second()) == ([2.0], [3.0])
    for function in (first, second):
        assert sys.modules[function.__module__].f is function
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        reward_function("rewards.py:f", {}, tmp_path / "c")
    assert set(sys.modules) - before == {first.__module__, second.__module__}


def test_a_run_ends_with_the_name_of_the_function(make_model, tokenizer, settings):
    def short(completions, **row):
        return [1.0]

    rows = Dataset.from_list([{"prompt": f"say {i}"} for i in range(5)])
    changes = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 3}
    made = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": LoraConfig(**LORA)}
    trainer = GRPOTrainer(make_model(), short, GRPOConfig(**{**settings, **changes}), **made)
    with pytest.raises(TrainingError, match="the reward function short returned 1 rewards for 4 completions"):
        trainer.train()
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        GRPOTrainer(make_model(), [], GRPOConfig(**{**settings, **changes}), **made)
    few = {**made, "train_dataset": rows.select(range(1))}
    with pytest.raises(DataError, match="1 prompts are fewer than the 2 that one batch of completions takes"):
        GRPOTrainer(make_model(), short, GRPOConfig(**{**settings, **changes}), **few).train()


@pytest.mark.parametrize("n_micro_batches", [1, 2])
def test_completions_trained_on_over_several_steps_are_in_the_checkpoint(
    make_model, tokenizer, settings, n_micro_batches
):
    rows = Dataset.from_list([{"prompt": f"say {i}"} for i in range(11)])
    args = GRPOConfig(
        **{
            **settings, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5,
            "num_iterations": 2, "beta": 0.1, "max_steps": 7, "save_strategy": "steps", "save_steps": 3,
            "gradient_accumulation_steps": n_micro_batches,
        }
    )  # fmt: skip

    def reward(completions, **row):
        return [len(text) / 7 for text in completions]

    def run(resume):
        made = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": LoraConfig(**LORA)}
        trainer = GRPOTrainer(make_model(), reward, args, **made)
        trainer.train(resume_from_checkpoint=resume)
        return [(line["loss"], line["grad_norm"], line["kl"]) for line in trainer.state.log_history if "loss" in line]

    whole = run(None)
    folder = f"{settings['output_dir']}/checkpoint-3"
    assert run(folder) == whole


def test_each_process_goes_on_with_its_own_completions(make_model, tokenizer, settings, monkeypatch, tmp_path):
    rows = Dataset.from_list([{"prompt": f"say {i}"} for i in range(11)])
    changes = {"num_generations": 2, "max_completion_length": 3, "num_iterations": 2}
    args = GRPOConfig(**{**settings, **changes})
    made = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": LoraConfig(**LORA)}
    trainer = GRPOTrainer(make_model(), lambda completions, **row: [0.3] * len(completions), args, **made)

    def go_on(rank, n_processes):
        monkeypatch.setattr(GRPOConfig, "process_index", rank)
        monkeypatch.setattr(GRPOConfig, "world_size", n_processes)
        trainer.restore_counters({"micro_steps": 3}, tmp_path)
        return trainer._buffered_inputs

    trainer._step = 3
    for rank in (0, 1):
        monkeypatch.setattr(GRPOConfig, "process_index", rank)
        monkeypatch.setattr(GRPOConfig, "world_size", 2)
        trainer._buffered_inputs = [{"completion_ids": torch.tensor([[rank + 5]])}]
        for name, content in trainer.own_files():
            (tmp_path / name).write_bytes(content)
    for rank in (0, 1):
        assert go_on(rank, 2)[0]["completion_ids"].tolist() == [[rank + 5]]
    assert go_on(1, 3) is None


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_penalty_of_a_step_is_the_same_over_any_number_of_micro_batches(make_model, tokenizer, settings, kind):
    trainer_type, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    rows = Dataset.from_list([{"prompt": f"say {i}"} for i in range(11)])
    adalora = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "orth_reg_weight": 0.7}

    def first_line(n_micro_batches):
        changes = {"num_generations": 2, "max_completion_length": 3, "beta": 0.0, "max_steps": 3}
        args = config(**{**settings, **changes, "gradient_accumulation_steps": n_micro_batches})
        peft_config = AdaLoraConfig(**adalora, target_modules=["q_proj"])
        made = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": peft_config}
        trainer = trainer_type(make_model(), lambda completions, **row: [0.3] * len(completions), args, **made)
        trainer.train()
        return next(line for line in trainer.state.log_history if "loss" in line)

    one, three = first_line(1), first_line(3)
    assert one["grad_norm"] > 0.0  # equal rewards: of the penalty alone
    assert three["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-5)
