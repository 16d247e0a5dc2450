"""Group relative policy optimization, on TRL's trainer."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import trl
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.chat_template_utils import parse_response

from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.data.preference import Task
from veneer.errors import DataError, TrainingError
from veneer.learn.config import GRPOConfig
from veneer.learn.conversation import Conversation, Rollout, RolloutLimits, RolloutTools, Speech
from veneer.learn.environments import limited_environments
from veneer.learn.rollout_function import Generation, checked_rollouts
from veneer.learn.trainer import DrawingTrainer
from veneer.model.sites.structure import evaluation
from veneer.train.config import RunSettings
from veneer.train.library_errors import refusals_told

log = logging.getLogger(__name__)


class GRPOTrainer(DrawingTrainer, trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's ``GRPOTrainer``, with its arguments. ``peft_config`` is one of veneer's configs.

    Rows hold a prompt and the columns that the reward functions read. A reward function returns a finite number for
    each completion; if there are several functions, it may return None for no opinion. The model in training generates
    the completions, without dropout. The reference, log-probabilities and checkpoints are those of `veneer.DPOTrainer`.

    With ``tools`` or an ``environment_factory``, completions are conversations. If veneer's engine generates them, each
    conversation continues as soon as its own tools have answered, within the limits of `veneer.GRPOConfig`. Shao et al.
    2024, arXiv:2402.03300. Raises ConfigError, DataError or TrainingError if the run is impossible as configured.
    """

    task: ClassVar[Task] = "grpo"
    settings = GRPOConfig
    reward_funcs: list[Any]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: RunSettings | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: MethodConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Callable[..., Any] | None = None,
        environment_factory: Any = None,
    ) -> None:
        if tools or environment_factory:
            _require_messages(train_dataset)
        conversing: dict[str, Any] = {"tools": tools, "environment_factory": None, "rollout_func": None}
        if rollout_func is not None:
            conversing["rollout_func"] = checked_rollouts(rollout_func)
        if environment_factory is not None:
            conversing["environment_factory"] = limited_environments(
                environment_factory, lambda: self.args.tool_timeout, self._observed
            )
        with refusals_told(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="You are using '.*', which is an experimental", category=UserWarning
            )
            super().__init__(
                model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
                callbacks, optimizers, quantization_config, peft_config, conversing,
            )  # fmt: skip
        self.reward_funcs = [
            self.limited(each, alone=len(self.reward_funcs) == 1, name=name) if name in self._environments() else each
            for each, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.policy is not None:
            self.draws_by_function = rollout_func is not None
            self.vllm_generation, self._last_loaded_step = Generation(self), -1

    def _observed(self, reset: Callable[[], Any]) -> Any:
        """Return an environment's first observation: from the journal if it holds the current batch of answers, else
        from ``reset``.

        If ``reset`` fails twice, return None; the group of answers that needs this environment is then not trained on.
        """
        place = len(self.observations)
        found = self._begun(reset, place) if self._recalled is None else self._recalled[place]["observation"]
        self.observations = [*self.observations, found]
        return found

    def _begun(self, reset: Callable[[], Any], place: int) -> Any:
        """Return the result of ``reset``, called again if the first call fails.

        If both calls fail, add ``place``, the answer's index in the batch, to ``left_out`` and return None.
        """
        for _ in range(2):
            try:
                return reset()
            except TrainingError as error:
                log.warning("rollout %d: %s", place, error)
        self.left_out.add(place)
        return None

    def _environments(self) -> set[str]:
        """Return the class names of the environments. TRL selects the rewards of an environment by its class name."""
        pools = getattr(self, "_environment_pool", {})
        return {type(each).__name__ for pool in pools.values() for each in pool}

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        if self.rollout_func is not None and self.policy is not None:
            self.policy.end()  # the function has chosen among what was drawn
            self.rollouts = []
        return found

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **options: Any) -> Any:
        drawn = self.drawn(prompt_ids)
        if drawn is None:
            with evaluation(self.model):
                return super()._generate_single_turn(prompt_ids, *args, **options)
        return [list(each.token_ids) for each in drawn], [list(each.logprobs) for each in drawn]

    def _tool_call_loop(
        self, prompts: Any, prompt_ids: Any, completion_ids: Any, completions: Any, *args: Any, **options: Any
    ) -> Any:
        if self.policy is None:
            return super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, *args, **options)
        rollouts, limits = self.rollouts, self.rollout_limits()
        if self._recalled is not None:
            self.policy.recall([each.answer for each in rollouts])
        else:
            for rollout, messages in zip(rollouts, completions, strict=True):
                rollout.messages = messages
            self.policy.converse([self._conversation(number, each, limits) for number, each in enumerate(rollouts)])
        if limits.seconds is not None:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["rollouts/timed_out"].append(sum(each.timed_out for each in rollouts) / len(rollouts))
        return (
            [each.mask for each in rollouts], [each.messages for each in rollouts], [each.ids for each in rollouts],
            [each.logprobs for each in rollouts], sum(each.n_calls for each in rollouts),
            sum(each.n_failures for each in rollouts), [[] for _ in rollouts],
        )  # fmt: skip

    def rollout_limits(self) -> RolloutLimits:
        """Return the limits of a conversation."""
        context = 0 if self.policy is None else self.policy.context()
        return RolloutLimits(
            self.max_tool_calling_iterations, self.max_completion_length, context,
            self.args.rollout_timeout, self.args.tool_timeout, self.args.max_tool_response_length,
        )  # fmt: skip

    def _conversation(self, number: int, rollout: Rollout, limits: RolloutLimits) -> Conversation:
        exposed = self.tools
        if self.environment_factories is not None:
            exposed = self._env_tools[self._batch_environments[number]]

        def message_of(ids: list[int], prefix: list[int]) -> dict[str, Any]:
            return dict(parse_response(self._tokenizer, ids, prefix=prefix, tools=exposed))

        def run(coroutine: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, self.async_loop)

        tools = RolloutTools(self._sync_tool_dicts[number], self._async_tool_dicts[number], run)
        speech = Speech(self._get_tool_suffix_ids, message_of)
        return Conversation(rollout, tools, speech, limits, f"rollout {number}")


def _require_messages(rows: Any) -> None:
    """Raise DataError if the first prompt is not a list of messages."""
    first = rows[0].get("prompt") if isinstance(rows, Dataset) and len(rows) else None
    if isinstance(first, str):
        raise DataError(
            "tools and environments are for conversations, and the first prompt is a text: give a list of messages, "
            '[{"role": "user", "content": …}]'
        )
