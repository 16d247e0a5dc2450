"""Settings of the trainers that learn from drawn answers: TRL's, with those that every trainer of veneer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import trl

from veneer.errors import ConfigError
from veneer.train.config import RunSettings
from veneer.train.preference.config import beta_problems, shared_reference_problems
from veneer.train.processes import n_processes


@dataclass
class _Drawing(RunSettings):
    """Settings and checks of trainers that learn from answers which the model in training generates.

    ``rollout_engine``: "engine" generates answers by veneer's engine, "generate" by transformers. "auto" chooses the
    engine if it supports the run; if not, it chooses transformers and logs the reason. ``disable_dropout`` is True, so
    that answers come from the policy that is scored. If ``rollout_journal``, the engine's answers are also written to
    ``rollouts/`` of the output folder, and a resumed run reads them. ``rollout_memory``: "one" packs the base's weights
    for the engine, and the training pass reads the packed weights. "beside" packs a second copy. "auto" is "one" if
    training on packed weights is no slower for this kind of base. On packed weights an adapter can be saved, but not
    merged. ``reward_…`` are the fields of `learn.rewards.RewardLimits`.
    """

    disable_dropout: bool = True
    rollout_engine: Literal["auto", "engine", "generate"] = "auto"
    rollout_journal: bool = True
    rollout_memory: Literal["auto", "one", "beside"] = "beside"
    reward_timeout: float | None = 60.0
    reward_on_error: Literal["stop", "none"] = "stop"
    reward_most_failed: float = 0.1

    def __post_init__(self) -> None:
        _require_whole_groups(self)
        super().__post_init__()

    def problems(self) -> list[str]:
        """Return all problems of the settings: of the reference model, the engine, the rewards and the
        answers' length.
        """
        found = [
            *beta_problems(self),
            *shared_reference_problems(self),
            *_engine_problems(self),
            *_reward_problems(self),
        ]
        if self.max_completion_length is None or self.max_completion_length < 1:
            found.append(f"max_completion_length={self.max_completion_length!r} must be at least 1")
        if getattr(self, "cast_lm_head_to_fp32", False):
            found.append("cast_lm_head_to_fp32=True replaces the head of the model: load it with dtype float32 instead")
        return found


@dataclass
class GRPOConfig(_Drawing, trl.GRPOConfig):  # type: ignore[misc]
    """TRL's ``GRPOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once.

    ``rollout_engine`` chooses the program that generates answers: "engine" (veneer's), "generate" (transformers) or
    "auto". ``use_vllm=True`` means "engine".

    Conversations that the engine generates have these limits, besides TRL's ``max_tool_calling_iterations`` and
    ``max_completion_length``. ``tool_timeout``: seconds for one call of a tool; the run ends if a call takes longer.
    ``rollout_timeout``: seconds for a whole conversation; a conversation that takes longer is cut. None means no limit.
    ``max_tool_response_length``: characters of a tool's response; the rest is cut off.
    """

    tool_timeout: float = 30.0
    rollout_timeout: float | None = None
    max_tool_response_length: int = 20_000

    def problems(self) -> list[str]:
        """Return all problems of the settings, with those of the limits of conversations."""
        found = super().problems()
        for name in ("tool_timeout", "rollout_timeout", "max_tool_response_length"):
            found += _limit_problems(self, name, is_optional=name == "rollout_timeout")
        return found


@dataclass
class RLOOConfig(_Drawing, trl.RLOOConfig):  # type: ignore[misc]
    """TRL's ``RLOOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once.

    ``rollout_engine`` chooses the program that generates answers: "engine" (veneer's), "generate" (transformers) or
    "auto". ``use_vllm=True`` means "engine".
    """


def _limit_problems(args: Any, name: str, *, is_optional: bool) -> list[str]:
    value = getattr(args, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    return [] if is_number or (is_optional and value is None) else [f"{name}={value!r} must be a finite number above 0"]


def _reward_problems(args: Any) -> list[str]:
    found = _limit_problems(args, "reward_timeout", is_optional=True)
    if args.reward_on_error not in ("stop", "none"):
        found.append(f"reward_on_error={args.reward_on_error!r} must be 'stop' or 'none'")
    share = args.reward_most_failed
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        found.append(f"reward_most_failed={share!r} must be a share between 0 and 1")
    return found


def _engine_problems(args: Any) -> list[str]:
    if args.rollout_engine not in ("auto", "engine", "generate"):
        return [f"rollout_engine={args.rollout_engine!r} must be 'auto', 'engine' or 'generate'"]
    found = []
    if args.rollout_memory not in ("auto", "one", "beside"):
        found.append(f"rollout_memory={args.rollout_memory!r} must be 'auto', 'one' or 'beside'")
    if not args.use_vllm:
        return found
    if args.vllm_mode != "colocate":
        found.append(
            f"vllm_mode={args.vllm_mode!r} draws in another process: answers are drawn here, by the adapter in "
            "training. Set vllm_mode='colocate', which asks for veneer's engine"
        )
    if args.vllm_tensor_parallel_size != 1:
        found.append(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} must be 1: the drawing "
            "engine does not split the base over devices. Leave it out"
        )
    if args.rollout_engine == "generate":
        found.append("use_vllm=True asks for the engine, and rollout_engine='generate' for transformers: drop one")
    return found


def _require_whole_groups(args: Any) -> None:
    """Raise ConfigError if the completions of a prompt could fall into different batches."""
    n, batch = args.num_generations, args.per_device_train_batch_size
    if not isinstance(n, int) or n < 2:
        raise ConfigError(
            f"num_generations={n!r} must be at least 2: the completions of a prompt are compared with one another"
        )
    if args.steps_per_generation is not None and args.generation_batch_size is not None:
        raise ConfigError("steps_per_generation and generation_batch_size say the same: give one of them")
    steps = args.steps_per_generation or args.gradient_accumulation_steps
    found = args.generation_batch_size or batch * steps * n_processes()
    if found % n:
        how = (
            f"generation_batch_size={found}"
            if args.generation_batch_size
            else f"per_device_train_batch_size={batch} × {steps} steps × {n_processes()} processes = {found}"
        )
        raise ConfigError(
            f"{how} completions are not a multiple of num_generations={n}, the completions of each prompt: use "
            f"per_device_train_batch_size={-(-batch // n) * n}, or a num_generations that divides {found}"
        )
    evals, held_out = args.num_generations_eval or n, args.per_device_eval_batch_size * n_processes()
    if args.eval_strategy != "no" and held_out % evals:
        raise ConfigError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} × {n_processes()} processes are not a "
            f"multiple of the {evals} completions of each held-out prompt (num_generations_eval, or num_generations): "
            f"use per_device_eval_batch_size={-(-args.per_device_eval_batch_size // evals) * evals}"
        )
