"""Faults of what users bring: each ends in words or is counted, and nothing waits for what hangs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset

from patience import PATIENCE
from veneer import GRPOConfig, GRPOTrainer, LoraConfig, RLOOConfig, RLOOTrainer
from veneer.errors import ConfigError, DivergedError, TrainingError
from veneer.learn.journal import read_journal
from veneer.learn.rewards import RewardError, RewardLimits, checked_reward

from .conftest import LORA
from .test_conversation import CALL, HANGING, Game, ends
from .test_conversation import ROWS as CHATS
from .test_conversation import tokenizer as chat_tokenizer

__all__ = ["chat_tokenizer"]
NONE = RewardLimits(PATIENCE, "none", 0.5)


@pytest.fixture
def stop():
    event = threading.Event()
    yield event
    event.set()


def asked(function: Any, limits: RewardLimits, n: int = 4, **row: Any) -> Any:
    """What a wrapped function gives for answers "0", "1", …, and what it logs."""
    told: dict[str, float] = {}
    wrapped = checked_reward(function, limits, alone=True)
    given = {"completions": [str(i) for i in range(n)], "log_metric": told.__setitem__, **row}
    found = wrapped(**given)
    return asyncio.run(found) if asyncio.iscoroutine(found) else found, told


def test_a_reward_that_hangs(stop):
    def hangs(completions, **row):
        stop.wait(HANGING)

    async def waits(completions, **row):
        await asyncio.sleep(HANGING)

    def yields(completions, **row):
        yield 1.0
        stop.wait(HANGING)

    async def yields_later(completions, **row):
        return yields(completions)

    for function in (hangs, waits, yields, yields_later):
        told = (
            rf"the reward function {function.__name__} did not return within 0.2 seconds, and is no longer waited for"
            ".*or set reward_timeout higher"
        )
        with pytest.raises(RewardError, match=told):
            asked(function, RewardLimits(0.2))
        assert asked(function, replace(NONE, seconds=0.2)) == ([None] * 4, {f"rewards/{function.__name__}/failed": 1.0})


def test_a_reward_that_fails_on_some_answers_has_no_opinion_on_them():
    def raises(completions, answer, trainer_state, **row):
        assert trainer_state == "state"
        return [1 / (int(text) - own) for text, own in zip(completions, answer, strict=True)]

    def nan(completions, **row):
        return [math.nan if text == "2" else 0.5 for text in completions]

    async def later(completions, **row):
        return [math.inf if text == "2" else 0.5 for text in completions]

    def leaves(completions, **row):
        if "2" in completions:
            raise SystemExit(3)
        return torch.full((len(completions),), 0.5)

    row = {"answer": [2, 2, 2, 2], "trainer_state": "state"}
    assert asked(raises, NONE, **row) == ([-0.5, -1.0, None, 1.0], {"rewards/raises/failed": 0.25})
    for function in (nan, later, leaves):
        found, told = asked(function, NONE)
        assert found == [0.5, 0.5, None, 0.5]
        assert told == {f"rewards/{function.__name__}/failed": 0.25}
        with pytest.raises(
            RewardError, match=f"the reward function {function.__name__} (returned (nan|inf)|raised Sys)"
        ):
            asked(function, RewardLimits())
    assert asked(lambda completions, **row: [None, 1, 1, 1], NONE)[1] == {"rewards/<lambda>/failed": 0.0}
    with pytest.raises(RewardError, match="returned 1 rewards for 4 completions"):
        asked(lambda completions, **row: [1.0], RewardLimits())


@pytest.mark.parametrize("limits", [RewardLimits(PATIENCE), RewardLimits(None)])
def test_a_generator_is_read_within_the_limit(limits):
    def endless(completions, **row):
        return itertools.repeat(1.0)

    def raises(completions, **row):
        yield 1.0
        raise OSError("no judge")

    async def raises_later(completions, **row):
        return raises(completions)

    assert asked(lambda completions, **row: (float(text) for text in completions), limits)[0] == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(RewardError, match="endless returned 5 rewards for 4 completions"):
        asked(endless, limits)

    async def leaves_later(completions, **row):
        return (sys.exit(3) for _ in completions)

    with pytest.raises(RewardError, match="leaves_later raised SystemExit, which ends a program"):
        asked(leaves_later, limits)
    for function in (raises, raises_later):
        with pytest.raises(RewardError, match=f"the reward function {function.__name__} raised OSError: no judge"):
            asked(function, limits)


@pytest.mark.parametrize("limits", [RewardLimits(PATIENCE), RewardLimits(None)])
def test_an_asynchronous_reward_that_ends_its_loop_or_times_out_itself_is_told(limits):
    async def refused(completions, **row):
        raise TimeoutError("the judge does not answer")

    async def leaves(completions, **row):
        raise SystemExit(3)

    loop = asyncio.new_event_loop()  # on a thread of its own, as TRL's is: one that ends is waited for without end
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    for function, told in ((leaves, "raised SystemExit"), (refused, "raised TimeoutError: the judge does not answer")):
        found = checked_reward(function, limits, alone=True)(completions=["0"])
        with pytest.raises(RewardError, match=rf"the reward function {function.__name__} {told}"):
            asyncio.run_coroutine_threadsafe(found, loop).result(PATIENCE)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_too_many_failures_end_the_run():
    def worse(completions, **row):
        return [math.nan if i < row["n"] else 1.0 for i in range(len(completions))]

    wrapped = checked_reward(worse, RewardLimits(PATIENCE, "none", 0.1), alone=True)
    for n in (4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4):  # of ten calls, one alone failed at any time
        wrapped(completions=["x"] * 4, n=n)
    with pytest.raises(
        RewardError, match=r"worse failed on 12% of the answers of its last 10 calls.*reward_most_failed"
    ):
        wrapped(completions=["x"] * 4, n=1)
    wrapped = checked_reward(worse, RewardLimits(PATIENCE, "none", 0.1), alone=True)
    wrapped(completions=["x"] * 4, n=4)
    with pytest.raises(RewardError, match=r"worse failed on 62% of the answers of its last 2 calls: of those of 10"):
        wrapped(completions=["x"] * 4, n=1)


def test_without_a_limit_a_reward_runs_on_the_trainers_thread():
    def where(completions, **row):
        return [float(threading.current_thread() is threading.main_thread())] * len(completions)

    assert asked(where, RewardLimits(None))[0] == [1.0] * 4
    assert asked(where, RewardLimits())[0] == [0.0] * 4


@pytest.fixture
def trainer_of(make_model, tokenizer, settings):
    def make(function: Any, trainer: Any = GRPOTrainer, config: Any = GRPOConfig, **changes: Any) -> Any:
        small = {"num_generations": 2, "max_completion_length": 5, "max_steps": 2, "rollout_engine": "engine"}
        rows = changes.pop("rows", None) or Dataset.from_list([{"prompt": f"say {i}"} for i in range(11)])
        args = config(**{**settings, **small, **changes})
        return trainer(make_model(), function, args, rows, processing_class=tokenizer, peft_config=LoraConfig(**LORA))

    return make


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_an_answer_without_an_opinion_leaves_its_group(trainer_of, tmp_path, kind):
    def some(completions, **row):
        values = [float(i) for i in range(len(completions))]
        return [math.nan, *values[1:]]  # one of the first group's three, one of the second's

    def run(**changes: Any) -> Any:
        trainer, config = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
        made = trainer_of(some, trainer, config, per_device_train_batch_size=6, num_generations=3, **changes)
        made.train()
        return made

    with pytest.raises(TrainingError, match="returned nan for completion 1"):
        run()
    trainer = run(reward_on_error="none", reward_most_failed=0.2)
    lines = [line for line in read_journal(tmp_path) if line["draw"] == 0]
    assert [line["reward"] for line in lines] == [None, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert [line["rewards"] for line in lines[:2]] == [[None], [1.0]]
    advantages = [line["advantage"] for line in lines]
    assert advantages[0] == 0.0
    assert advantages[1] == pytest.approx(-advantages[2])
    assert advantages[1] < 0 < advantages[2]
    told = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["rewards/some/failed"] for line in told] == pytest.approx([1 / 6] * 2)


def test_a_group_of_one_opinion_has_no_advantage(trainer_of, tmp_path):
    def one(completions, **row):
        return [None, 0.3, 0.1, 0.2]

    trainer_of(one, reward_on_error="none").train()
    advantages = [line["advantage"] for line in read_journal(tmp_path)]
    assert advantages[:2] == [0.0, 0.0]
    assert all(advantages[2:4])


def test_wrong_limits_of_rewards_are_refused(settings):
    for changes, told in (
        ({"reward_timeout": 0}, "reward_timeout=0 must be a finite number above 0"),
        ({"reward_on_error": "skip"}, "reward_on_error='skip' must be 'stop' or 'none'"),
        ({"reward_most_failed": 2}, "reward_most_failed=2 must be a share between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            RLOOConfig(**{**settings, "num_generations": 2, **changes})


def test_ten_draws_of_equal_rewards_are_told_once(trainer_of, caplog):
    trainer = trainer_of(lambda completions, **row: [0.1] * len(completions), max_steps=23)
    trainer.train()
    assert all(line["grad_norm"] == 0 for line in trainer.state.log_history if "loss" in line)
    assert caplog.text.count("in 10 draws one after another, all answers to each prompt had equal rewards") == 1


def test_an_adapter_that_is_not_finite_ends_the_run_with_its_last_checkpoint(trainer_of, tmp_path):
    trainer = trainer_of(
        lambda completions, **row: [float(len(text)) for text in completions], save_strategy="steps", save_steps=1
    )

    class Poison:
        def __getattr__(self, name: str) -> Any:
            return lambda args, state, control, **more: control

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **more: Any) -> Any:
            if state.global_step == 1:
                own = next(p for p in model.parameters() if p.requires_grad)
                with torch.no_grad():
                    own[0, 0] = math.nan
            return control

    trainer.add_callback(Poison())
    with pytest.raises(
        DivergedError, match=r"not finite after step 1, and the last checkpoint is .*checkpoint-1: lower"
    ):
        trainer.train()


class Flaky(Game):
    """A game whose ``reset`` fails by a plan: one truth value a call, of all instances."""

    plan: tuple[bool, ...] = ()
    seen: list[Any]

    def reset(self, **row: Any) -> str:
        type(self).seen.append(row)
        fails = self.plan[len(self.seen) - 1] if len(self.seen) <= len(self.plan) else False
        if fails:
            raise OSError("no board")
        return super().reset()


def test_an_environment_that_cannot_begin(make_model, chat_tokenizer, settings, tmp_path, caplog):
    def run(*plan: bool) -> Any:
        Flaky.plan, Flaky.seen = plan, []
        forced = {"use_vllm": True, "vllm_structured_outputs_regex": CALL, "max_tool_calling_iterations": 1}
        small = {"num_generations": 2, "max_completion_length": 90, "max_steps": 1, "rollout_engine": "engine"}
        trainer = GRPOTrainer(
            make_model(max_position_embeddings=701), None, GRPOConfig(**{**settings, **small, **forced}), CHATS,
            processing_class=chat_tokenizer, peft_config=LoraConfig(**LORA), environment_factory=Flaky,
        )  # fmt: skip
        with contextlib.suppress(TrainingError) if all(plan) and len(plan) > 2 else contextlib.nullcontext():
            trainer.train()
        return [line.get("rollouts/reset_failed") for line in trainer.state.log_history if "loss" in line]

    assert run(True) == [0.0]  # the second attempt begins
    assert len(Flaky.seen) == 5
    assert Flaky.seen[0] == Flaky.seen[1]
    assert run(True, True) == [0.5]
    assert "rollout 0: Flaky.reset raised OSError: no board" in caplog.text
    lines = [*read_journal(tmp_path)]
    assert [line["reward"] is None for line in lines] == [True, True, False, False]
    assert [line["advantage"] for line in lines[:2]] == [0.0, 0.0]
    Flaky.plan = (True,) * 8
    assert run(*Flaky.plan) == []


def test_a_prompt_longer_than_the_context_is_told(trainer_of):
    long = Dataset.from_list([{"prompt": "x" * 5000}] * 4)
    ends(
        trainer_of(lambda completions, **row: [0.0] * len(completions), rows=long),
        "maximum context length is 2048 tokens and the prompt has 5000",
        ConfigError,
    )
