"""The policy that a trainer draws from: its engine, the sampling settings from TRL, and the answers of the current
draw.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.errors import CompositionError, ConfigError, DescriptionError
from veneer.evaluate.scoring import context_length
from veneer.learn.conversation import Conversation, Turn, converse
from veneer.learn.rollouts import (
    DrawnAnswer,
    Rollouts,
    answer_of,
    is_of_adapter,
    require_answered,
    require_drawn_by,
    seed_of,
)
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.sharded.sharding import is_cut
from veneer.quant.ggml import GgmlWeight
from veneer.serve.program.effects import UnsaidError
from veneer.serve.schedule.adapter_version import AdapterVersion
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.sampling_params import SamplingParams, StructuredOutputsParams
from veneer.train.processes import n_processes

log = logging.getLogger(__name__)
ONLY_ON_CPUS = "weights are packed on CPUs only"
_CANNOT = (ConfigError, DescriptionError, UnsaidError, CompositionError)
"""Errors of a model, an adapter or settings by which the engine cannot draw."""


class Policy:
    """A model with its adapter in training, from which an engine generates answers.

    ``is_exact``: engine and training pass both compute in float32, so that their log-probabilities are equal up to
    rounding. ``is_proved``: a batch has shown that they are equal.
    """

    def __init__(self, rollouts: Rollouts, adapter: str, params: SamplingParams, *, is_exact: bool) -> None:
        self.rollouts, self.adapter, self.params = rollouts, adapter, params
        self.is_exact, self.is_proved = is_exact, False
        self._answers: list[DrawnAnswer] | None = None
        self._drawn_by: tuple[tuple[int, ...], Sequence[int]] = (), ()  # key and rows of the draw in progress

    def draw(self, prompts: Sequence[Sequence[int]], key: Sequence[int], rows: Sequence[int]) -> list[DrawnAnswer]:
        """Return an answer to each prompt. Raises StaleAnswerError, and the errors of `Rollouts.draw`."""
        now, self._drawn_by = self.rollouts.hand_over(self.adapter), (tuple(key), rows)
        drawn = self.rollouts.draw(prompts, self.params, adapter=now, key=key, rows=rows)
        return self._taken([answer for each in drawn for answer in each.answers], now)

    def converse(self, conversations: Sequence[Conversation]) -> None:
        """Continue each conversation to its end. Its first answer is one of those that `draw` returned last.

        Raises the errors of `draw` and `Conversation.run`.
        """
        now, number_of, (key, rows) = self.rollouts.hand_over(self.adapter), dict[str, int](), self._drawn_by
        with self.rollouts.requests() as requests:

            def ask(number: int, turn: Turn) -> None:
                seed = seed_of(*key, rows[number], turn.number)
                asked = self.rollouts.turn(turn.ids, replace(self.params, max_tokens=turn.n_tokens), now, seed)
                number_of[asked.id] = number
                requests.add(asked)

            def step() -> list[tuple[int, DrawnAnswer]]:
                version = self.rollouts.engine.versions.of(now)
                ended = require_answered(requests.step())
                return [(number_of[each.request_id], answer_of(each.outputs[0], version)) for each in ended]

            converse(conversations, ask, step)
        self._taken([each.rollout.answer for each in conversations], now)

    def _taken(self, answers: list[DrawnAnswer], now: LoRARequest) -> list[DrawnAnswer]:
        require_drawn_by(answers, self.rollouts.engine.versions.of(now).id)
        self._answers = answers
        return answers

    def version(self) -> AdapterVersion:
        """Return the version of the adapter's current state. The version's id is a hash of the adapter's content."""
        return self.rollouts.engine.versions.of(self.rollouts.hand_over(self.adapter))

    def context(self) -> int:
        """Return the most tokens that a prompt and its answer may have together."""
        return self.rollouts.engine.scheduler.limits.max_model_len - self.version().n_front

    def recall(self, answers: list[DrawnAnswer]) -> list[DrawnAnswer]:
        """Set the current answers to ``answers``, generated earlier and read from a journal. Return them.

        Raises StaleAnswerError if another adapter than the current one generated them.
        """
        require_drawn_by(answers, self.version().id)
        self._answers = answers
        return answers

    @property
    def answers(self) -> list[DrawnAnswer]:
        """Answers of the current draw: those that were generated last, until `end` is called."""
        return self._answers or []

    @property
    def has_drawn(self) -> bool:
        """Return True if there are current answers: they have been generated, and `end` has not been called."""
        return self._answers is not None

    @property
    def knows(self) -> bool:
        """Return True if there are current answers and their log-probabilities equal those that a training pass would
        compute.
        """
        return self.is_exact and self.has_drawn

    def logprobs(self, completion_ids: Int64[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """Return the log-probabilities of the current answers, one row for each answer, padded with zeros."""
        found = torch.zeros(completion_ids.shape, dtype=torch.float32)
        for row, answer in zip(found, self._answers or (), strict=True):
            row[: len(answer.logprobs)] = torch.tensor(answer.logprobs)
        return found.to(completion_ids.device)

    @property
    def kept_mass(self) -> float:
        """The mean, over generated tokens, of the probability mass that remained after ``min_p``, ``top_k``, ``top_p``
        and masks.
        """
        kept = torch.tensor([each for answer in self.answers for each in answer.kept])  # float32, as in a journal
        return float(kept.double().exp().mean()) if len(kept) else 1.0

    def end(self) -> None:
        """Drop the current answers, after they have been scored."""
        self._answers = None


def policy_of(trainer: Any) -> Policy | None:
    """Return the policy of a trainer whose model and settings are complete, or None if transformers generates the
    answers.

    Raises ConfigError if ``rollout_engine`` is "engine" and the engine cannot generate them. For "auto", the reason is
    logged.
    """
    args = trainer.args
    if args.rollout_engine == "generate":
        return None
    try:
        adapter = _adapter(trainer)
        params = _params(trainer)
        rollouts = trainer.rollouts_of_base or _rollouts(trainer.model, trainer.processing_class, args)
        _require_room(rollouts, rollouts.hand_over(adapter), trainer.max_completion_length)
    except _CANNOT as reason:
        if args.rollout_engine == "engine":
            raise ConfigError(
                f"rollout_engine='engine': veneer's engine cannot generate the answers: {reason}. Set it to 'auto' "
                "(rollouts.engine in a recipe) to let transformers generate them"
            ) from reason
        is_packed = trainer.rollouts_of_base is not None and trainer.rollouts_of_base.is_one
        packed = "" if not is_packed else ", on the weights that were packed for it"
        log.warning("transformers draws the answers, slowly%s, since veneer's engine cannot: %s", packed, reason)
        return None
    is_exact = trainer.model.dtype == torch.float32 and not (args.bf16 or args.fp16)
    return Policy(rollouts, adapter, params, is_exact=is_exact)


def rollouts_of_base(base: PreTrainedModel, tokenizer: Any, args: Any, config: MethodConfig | None) -> Rollouts | None:
    """Pack a base for the engine before a fresh adapter is attached. Return the engine, which holds the only copy.

    ``config`` is that of the adapter. Return None if the engine does not support this base, or if the base must keep
    its own weights (see `keeps_one_copy`). The base is then unchanged. Raises ConfigError if ``rollout_memory`` is
    "one" and the run needs a second copy.
    """
    if not keeps_one_copy(base, args, config, _is_for_transformers(tokenizer, args)):
        return None
    try:
        base.requires_grad_(False)
        return _rollouts(base, tokenizer, args, memory="one")
    except _CANNOT as reason:
        log.info("the base keeps its own weights, because veneer's engine cannot draw answers with it: %s", reason)
        return None


def rollouts_of_members(
    base: PreTrainedModel, tokenizer: Any, members: Sequence[tuple[Any, MethodConfig | None]]
) -> Rollouts | None:
    """Return an engine on a base that several runs share, each given by its settings and its adapter's config.

    The engine's packed weights are the only copy of the base if `keeps_one_copy` is True for every run. Return None if
    the engine does not support the base. Raises the errors of `rollouts_of_base`.
    """
    drawing = [args for args, _ in members if args.rollout_engine != "generate"]
    once = [keeps_one_copy(base, args, config, _is_for_transformers(tokenizer, args)) for args, config in members]
    if not drawing or _is_for_transformers(tokenizer, drawing[0]) is not None:
        return None
    try:
        base.requires_grad_(False)
        return _rollouts(base, tokenizer, drawing[0], memory="one" if all(once) else "beside")
    except _CANNOT as reason:
        log.info("veneer's engine cannot draw answers with the base that the members share: %s", reason)
        return None


def keeps_one_copy(
    base: PreTrainedModel, args: Any, config: MethodConfig | None, reason: str | None = None, n_training: int = 0
) -> bool:
    """Return True if the engine's packed weights are to be the only copy of a base, before an adapter is attached.

    ``reason``, if not None, says why one copy is impossible. ``n_training`` is the number of processes that train; if
    it is 0, they are counted here. Raises ConfigError if ``rollout_memory`` is "one" and the run needs a second copy.
    """
    if args.rollout_memory == "beside" or args.rollout_engine == "generate":
        return False
    reason = reason or _needs_own_copy(base, args, config, n_training or n_processes())
    if reason is not None and args.rollout_memory == "one":
        raise ConfigError(f"rollout_memory='one' is impossible: {reason}. Set 'auto' or 'beside'")
    return reason is None and (args.rollout_memory == "one" or _is_as_fast_packed(base, args))


def _needs_own_copy(base: PreTrainedModel, args: Any, config: MethodConfig | None, n_training: int) -> str | None:
    """Return why a base cannot train on packed weights, or None if it can."""
    if isinstance(base, PeftModel) or not isinstance(config, MethodConfig):
        return "weights are packed before a fresh adapter is attached, and this run has none (peft_config)"
    if config.extras.modules or config.extras.parameters:
        return f"the adapter trains copies of {sorted((*config.extras.modules, *config.extras.parameters))}"
    if base.device.type != "cpu" or args.device.type != "cpu":
        return ONLY_ON_CPUS
    if n_training > 1 or args.deepspeed or args.fsdp:
        return "several processes train, and move or shard the base"
    return None


def _is_as_fast_packed(base: PreTrainedModel, args: Any) -> bool:
    """Return True if a training step on packed weights was measured to take at most 1.05 times as long as on the
    unpacked weights.

    That is so for dense weights in their own dtype and for quantized weights in float32. Quantized weights in bfloat16
    take longer (1.4 times for NF4). The result is also False for a GGUF file, because its blocks would stay in memory
    beside the packed copy.
    """
    if (args.bf16 or args.fp16) and base.dtype == torch.float32:
        return False
    coded = [module for module in base.modules() if isinstance(module, QuantLinear)]
    return not coded or (base.dtype == torch.float32 and not any(isinstance(m.bound(), GgmlWeight) for m in coded))


def _rollouts(model: PreTrainedModel, tokenizer: Any, args: Any, **how: Any) -> Rollouts:
    given = {"max_model_len": args.vllm_max_model_length} if args.use_vllm else {}
    return Rollouts(model, tokenizer, **given, **how)


def _is_for_transformers(tokenizer: Any, args: Any) -> str | None:
    """Return why only transformers can generate the answers, or None if the engine may be able to.

    The reason comes from the tokenizer and the settings alone, so it is known before the model has an adapter.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return "the engine reads only text"
    if getattr(args, "use_transformers_continuous_batching", False):
        return "use_transformers_continuous_batching=True asks for transformers"
    return None


def _adapter(trainer: Any) -> str:
    """Return the name of the adapter in training. Raises ConfigError, with the reason, if the engine cannot generate
    answers with this adapter.
    """
    model, args = trainer.model, trainer.args
    if not isinstance(model, PeftModel):
        raise ConfigError("the base itself is trained, and would have to be packed for each draw")
    if is_cut(model):
        raise ConfigError("the base is sharded over processes")
    reason = _is_for_transformers(trainer.processing_class, args)
    if reason is not None:
        raise ConfigError(reason)
    active = model.adapter_state.active
    if len(active) != 1:
        raise ConfigError(f"{len(active)} adapters are active, but answers are drawn with exactly one")
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    strange = next((name for name in trained if not is_of_adapter(name)), None)
    if strange is not None:
        raise ConfigError(f"the parameter {strange} is trained too, and the engine draws with the adapter's alone")
    return str(active[0])


def _require_room(rollouts: Rollouts, adapter: LoRARequest, n_tokens: int) -> None:
    """Raise ConfigError if the engine's memory cannot hold the keys and values of a prompt and an answer beside the
    adapter.

    ``n_tokens`` is the answer's length.
    """
    engine, context = rollouts.engine, context_length(rollouts.model)
    room = engine.scheduler.pages.capacity(engine.versions.of(adapter).n_bytes)
    if room <= n_tokens and (context is None or room < context):
        raise ConfigError(
            f"max_completion_length={n_tokens} leaves no memory for a prompt: beside the adapter, memory holds the "
            f"keys and values of {room} tokens. Lower max_completion_length, or free memory"
        )


def _params(trainer: Any) -> SamplingParams:
    """Return TRL's generation settings as the engine's sampling parameters."""
    args, more = trainer.args, dict(trainer.args.generation_kwargs or {})
    if args.use_vllm and args.vllm_structured_outputs_regex:
        more["structured_outputs"] = StructuredOutputsParams(regex=args.vllm_structured_outputs_regex)
    given = {
        "temperature": trainer.temperature, "top_p": trainer.top_p, "top_k": trainer.top_k or 0,
        "min_p": trainer.min_p or 0.0, "repetition_penalty": trainer.repetition_penalty,
        "max_tokens": trainer.max_completion_length, "ignore_eos": True,
        "stop_token_ids": list(trainer.eos_token_ids), "policy_logprobs": True,
    }  # fmt: skip
    return SamplingParams(**{**given, **more})
