"""Conversations with tools and environments: TRL's own loop is the oracle, and nothing that hangs holds the run."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import trl
from datasets import Dataset

from models import byte_tokenizer
from patience import PATIENCE
from veneer import GRPOConfig, GRPOTrainer, LoraConfig
from veneer.errors import ConfigError, DataError, TrainingError

from .conftest import LORA

HANGING = 2 * PATIENCE  # seconds: a run that waits so long is ended by pytest
CALL = r'<tool_call>\{"name": "(add|lost)", "arguments": \{"a": [0-9]\}\}</tool_call>'
ROLES = ("<|user|>", "<|assistant|>", "<|tool|>")
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|end\|>\s*", "content": "text"},
    },
}  # fmt: skip
ROWS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"sum {i}" + "?" * (i % 3)}]} for i in range(11)])


@pytest.fixture
def tokenizer() -> Any:
    made = byte_tokenizer(ROLES)
    made.chat_template, made.response_template = TEMPLATE, RESPONSE
    return made


def add(a: int) -> str:
    """Add seven.

    Args:
        a: A number.
    """
    return f"it is {a + 7}"


def reward(completions: list[Any], **row: Any) -> list[float]:
    return [len(json.dumps(each)) % 7 / 7 for each in completions]


@pytest.fixture
def trainer_of(make_model, tokenizer, settings):
    def make(reward_funcs: Any = reward, rows: Any = ROWS, peft_config: Any = None, **changes: Any) -> Any:
        given = {
            name: changes.pop(name) for name in ("tools", "environment_factory", "rollout_func") if name in changes
        }
        forced = {"use_vllm": True, "vllm_structured_outputs_regex": CALL, "max_tool_calling_iterations": 2}
        small = {"num_generations": 2, "max_completion_length": 250, "max_steps": 2, "rollout_engine": "engine"}
        small |= {"tool_timeout": PATIENCE, "reward_timeout": PATIENCE}
        args = GRPOConfig(**{**settings, **small, **forced, **changes})
        model = make_model(max_position_embeddings=701)
        return GRPOTrainer(
            model, reward_funcs, args, rows, processing_class=tokenizer, peft_config=LoraConfig(**LORA), **given
        )

    return make


async def later(a: int) -> str:
    """Answer later.

    Args:
        a: A number.
    """
    return f"later {a}"


def conversations(trainer: Any, tools: list[Any]) -> Any:
    """What TRL's `_generate` gives, and the metrics of it."""
    trainer.model.train()
    trainer._sync_tool_dicts = [{each.__name__: each for each in tools if each is not lost}] * 4
    trainer._async_tool_dicts = [{"lost": lost} if lost in tools else {}] * 4
    found = trainer._generate([ROWS[i // 2]["prompt"] for i in range(4)])
    return [*found[:5], dict(trainer._metrics["train"])]


def fails(a: int) -> str:
    """Fail.

    Args:
        a: A number.
    """
    raise ValueError(f"no {a}")


def lists(a: int) -> list[dict[str, str]]:
    """Answer by content blocks.

    Args:
        a: A number.
    """
    return [{"type": "text", "text": "block"}]


lost = later
lost.__name__ = "lost"


def named(function: Any, name: str = "add") -> Any:
    function.__name__ = name
    return function


def test_conversations_are_those_of_trls_loop(trainer_of, monkeypatch):
    for module in ("rollouts", "policy"):  # an answer depends on the tokens before it alone
        monkeypatch.setattr(f"veneer.learn.{module}.seed_of", lambda *key: 5)
    seen = []
    for tools in ([add], [add, lost], [named(fails)], [named(lists)]):
        for length in (400, 160, 97, 75):  # the second answer is cut, a response leaves no room
            own, theirs = (trainer_of(tools=tools, max_completion_length=length) for _ in range(2))
            theirs._tool_call_loop = lambda *args, theirs=theirs: trl.GRPOTrainer._tool_call_loop(theirs, *args)
            found, wanted = (conversations(each, tools) for each in (own, theirs))
            assert found == wanted
            seen.append((sum(map(len, found[3])), found[5]["tools/failure_frequency"][0]))
    assert {n for n, _ in seen} >= {4, 20}  # no response, and two for each
    assert {0.0, 1.0} <= {failures for _, failures in seen}


def lines(trainer: Any) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "reward", "tools/call_frequency", "completions/mean_length")
    return [{name: line[name] for name in names} for line in trainer.state.log_history if "loss" in line]


def test_a_run_trains_on_what_the_model_drew_alone(trainer_of):
    for changes in ({}, {"beta": 0.1, "num_iterations": 2}, {"bf16": True}):
        trainer = trainer_of(tools=[add, lost], **changes)
        trainer.train()
        assert trainer.policy.is_proved != ("bf16" in changes)
        told = [line for line in trainer.state.log_history if "loss" in line]
        most = 1e-4 if trainer.policy.is_exact else 1
        seen = [line["rollouts/logprob_difference/max"] for line in told[:: trainer.num_iterations]]
        assert all(0 < each < most for each in seen)
        assert all(line["tools/call_frequency"] == 2 for line in told[:: trainer.num_iterations])


def test_tools_that_answer_in_any_order_change_no_token(trainer_of):
    def run(seconds: dict[int, float]) -> Any:
        def slow(a: int) -> str:
            """Answer after a while.

            Args:
                a: A number.
            """
            time.sleep(seconds.get(a, 0))
            return f"it is {a + 7}"

        trainer = trainer_of(tools=[named(slow)])
        trainer.train()
        return lines(trainer)

    assert run({}) == run({a: 0.2 if a % 2 else 0.01 for a in range(10)})


def ends(trainer: Any, told: str, error: type[Exception] = TrainingError) -> None:
    """The run ends with an error, and waits for nothing that hangs."""
    with pytest.raises(error, match=told):
        trainer.train()


def test_a_tool_that_hangs_is_left_and_one_that_ends_the_program_ends_the_run(trainer_of):
    stop = threading.Event()

    def hangs(a: int) -> str:
        """Wait.

        Args:
            a: A number.
        """
        stop.wait(HANGING)
        return ""

    def leaves(a: int) -> str:
        """Exit.

        Args:
            a: A number.
        """
        raise SystemExit(3)

    async def away(a: int) -> str:
        """Exit.

        Args:
            a: A number.
        """
        raise KeyboardInterrupt

    trainer = trainer_of(tools=[named(hangs)], tool_timeout=0.1, max_steps=1)  # the model is told, and the run goes on
    trainer.train()
    assert trainer.state.log_history[0]["tools/failure_frequency"] == 1
    said = [each["content"] for messages in conversations(trainer, [named(hangs)])[3] for each in messages[1:2]]
    assert "{'error': 'timed out after 0.1 seconds'}" in said
    ends(
        trainer_of(tools=[named(leaves)]),
        r"the tool add, called in rollout \d, raised SystemExit, which ends a program",
    )
    ends(trainer_of(tools=[named(away, "lost")]), r"the tool lost, .* raised KeyboardInterrupt")
    trainer = trainer_of(tools=[named(hangs)], rollout_timeout=0.2)  # cut, and the run goes on
    trainer.train()
    assert trainer.state.log_history[0]["rollouts/timed_out"] > 0
    stop.set()


def test_a_long_response_is_cut(trainer_of):
    def long(a: int) -> str:
        """Say much.

        Args:
            a: A number.
        """
        return "x" * 10**7

    trainer = trainer_of(tools=[named(long)], max_tool_response_length=7, max_tool_calling_iterations=1)
    said = [each["content"] for messages in conversations(trainer, [long])[3] for each in messages[1:2]]
    assert "xxxxxxx… (10,000,000 characters, cut to 7)" in said


class Game:
    """An environment that counts its calls."""

    def __init__(self) -> None:
        self.n = 0

    def reset(self, **row: Any) -> str:
        self.n = 0
        return " go"

    def add(self, a: int) -> str:
        """Count.

        Args:
            a: A number.
        """
        self.n += 1
        return f"{self.n} of {a}"

    def get_reward(self) -> float:
        return self.n / 3


def test_environments(trainer_of, caplog):
    class Odd(Game):
        def get_reward(self) -> float:
            return float("nan")

    stop = threading.Event()

    class Slow(Game):
        def reset(self, **row: Any) -> str:
            stop.wait(HANGING)
            return ""

    class Broken(Game):
        def reset(self, **row: Any) -> str:
            raise OSError("no board")

    class Unset:
        def add(self, a: int) -> str:
            return ""

    trainer = trainer_of(None, environment_factory=Game)
    trainer.train()
    assert all(0 < line["reward"] < 1 for line in lines(trainer))
    ends(trainer_of(None, environment_factory=Odd), "the reward function Odd returned nan for completion 1")
    for factory, seconds, told in (
        (Slow, 0.1, "Slow.reset did not return within 0.1 seconds"), (Broken, PATIENCE, "OSError: no board"),
    ):  # fmt: skip
        trainer = trainer_of(None, environment_factory=factory, tool_timeout=seconds)
        ends(trainer, "in every group, the reset of an environment failed twice")
        assert told in caplog.text
    stop.set()
    with pytest.raises(ConfigError, match="must define a callable `reset`"):
        trainer_of(environment_factory=Unset)


def test_rollout_functions(trainer_of, tokenizer):
    def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        ids = [tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in prompts]
        trainer.vllm_generation.sync_weights()
        _, drawn, logprobs, _ = trainer.vllm_generation.generate(ids, None, 2)
        second = trainer.vllm_generation.generate([p + d for p, d in zip(ids, drawn, strict=True)])[1]
        assert second != drawn
        return {
            "prompt_ids": ids, "completion_ids": drawn, "logprobs": [[x for (x,) in row] for row in logprobs],
            "env_mask": [[1] * (len(each) - 1) + [0] for each in drawn],
        }  # fmt: skip

    def changed(**changes: Any) -> Any:
        return lambda prompts, trainer: {**rollouts(prompts, trainer), **changes}

    trainer = trainer_of(rollout_func=rollouts, tools=None)
    trainer.train()
    assert all(
        0 < line["rollouts/logprob_difference/max"] < 1e-4 for line in trainer.state.log_history if "loss" in line
    )
    trainer_of(rollout_func=rollouts, bf16=True).train()
    for wrong, told in (
        (lambda prompts, trainer: [], r"it returned \[\]; return a dict with prompt_ids"),
        (lambda prompts, trainer: {"prompt_ids": []}, "its output lacks completion_ids, logprobs"),
        (changed(completion_ids=[[]]), "completion_ids must be a list with an entry for each of the 4 prompts"),
        (
            changed(completion_ids=[[3], [], [3], [3]], logprobs=None, env_mask=[[1]] * 4),
            "env_mask, row 1, has 1 entries for 0 tokens",
        ),
        (changed(env_mask=[[1]] * 4), r"env_mask, row 0, has 1 entries for \d+ tokens"),
    ):
        ends(trainer_of(rollout_func=wrong), told)


@pytest.mark.parametrize("masked", [False, True])
def test_an_answer_of_no_token_is_rewarded_and_adds_nothing_to_the_loss(trainer_of, tokenizer, masked):
    seen: list[list[str]] = []

    def judge(completions: list[Any], **row: Any) -> list[float]:
        seen.append([each[0]["content"] for each in completions])
        return [0.25 if not text else 0.5 + 0.125 * i for i, text in enumerate(seen[-1])]

    def run(empty: tuple[int, ...], given: list[int]) -> Any:
        def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            ids = [[] if row in empty else given[: 3 + row] for row in range(4)]
            asked = tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True, return_dict=False)
            told = {"prompt_ids": [asked] * 4, "completion_ids": ids, "logprobs": None}
            return told | ({"env_mask": [[1] * len(each) for each in ids]} if masked else {})

        trainer = trainer_of(judge, rollout_func=rollouts, tools=None, max_steps=1, logging_steps=1)
        trainer.train()
        return trainer.state.log_history[0]

    told = run((1,), [65, 66, 67, 68, 69, 70])
    assert [not text for text in seen[0]] == [False, True, False, False]
    assert told["completions/min_length"] == 0
    assert told["completions/mean_length"] == (3 + 0 + 5 + 6) / 4
    assert told["reward"] == (0.5 + 0.25 + 0.75 + 0.875) / 4
    assert told["grad_norm"] > 0
    told = run((0, 1, 2, 3), [])
    assert (told["completions/max_length"], told["loss"], told["grad_norm"]) == (0, 0, 0)


def test_wrong_settings_of_conversations_are_refused(trainer_of, tokenizer):
    with pytest.raises(DataError, match="tools and environments are for conversations, and the first prompt is a text"):
        trainer_of(tools=[add], rows=Dataset.from_list([{"prompt": "say"}] * 4))
    for name in ("tool_timeout", "max_tool_response_length", "rollout_timeout"):
        with pytest.raises(ConfigError, match=f"{name}=0 must be a finite number above 0"):
            trainer_of(tools=[add], **{name: 0})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="chat template does not support tool calling"):
        trainer_of(tools=[add])
