"""Settings of the trainers on preferences and rewards: TRL's, with those that every trainer of veneer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trl

from veneer.errors import ConfigError
from veneer.train.config import RunSettings
from veneer.train.processes import n_processes


@dataclass
class DPOConfig(RunSettings, trl.DPOConfig):  # type: ignore[misc]
    """TRL's ``DPOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once."""

    def problems(self) -> list[str]:
        """Return all problems of the loss and the choice of the reference."""
        return [*_beta(self), *_lengths(self), *_shared_reference(self)]


@dataclass
class KTOConfig(RunSettings, trl.KTOConfig):  # type: ignore[misc]
    """TRL's ``KTOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once."""

    def problems(self) -> list[str]:
        """Return all problems of the loss and the choice of the reference."""
        found = [*_beta(self), *_lengths(self), *_shared_reference(self)]
        if self.loss_type == "kto" and self.per_device_train_batch_size < 2:
            found.append(
                "per_device_train_batch_size=1 leaves KTO nothing to estimate its KL term from (each prompt with the "
                "completion of another row of the batch): use 2 or more, or loss_type='apo_zero_unpaired'"
            )
        return found


@dataclass
class RewardConfig(RunSettings, trl.RewardConfig):  # type: ignore[misc]
    """TRL's ``RewardConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once."""

    def problems(self) -> list[str]:
        """Return all problems of the lengths."""
        return _lengths(self)


class _Generating(RunSettings):
    """Checks of trainers that generate their own completions."""

    def __post_init__(self) -> None:
        _require_whole_groups(self)
        super().__post_init__()

    def problems(self) -> list[str]:
        """Everything that is wrong with the reference and the completions."""
        found = [*_beta(self), *_shared_reference(self)]
        if self.max_completion_length is None or self.max_completion_length < 1:
            found.append(f"max_completion_length={self.max_completion_length!r} must be at least 1")
        if self.use_vllm:
            found.append("use_vllm=True: vLLM does not load veneer's models; leave it out, and transformers generates")
        if getattr(self, "cast_lm_head_to_fp32", False):
            found.append("cast_lm_head_to_fp32=True replaces the head of the model: load it with dtype float32 instead")
        return found


@dataclass
class GRPOConfig(_Generating, trl.GRPOConfig):  # type: ignore[misc]
    """TRL's ``GRPOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once."""


@dataclass
class RLOOConfig(_Generating, trl.RLOOConfig):  # type: ignore[misc]
    """TRL's ``RLOOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once."""


def _beta(args: Any) -> list[str]:
    return [] if args.beta >= 0 else [f"beta={args.beta!r} must be at least 0"]


def _lengths(args: Any) -> list[str]:
    if getattr(args, "max_length", None) is None or args.max_length >= 2:
        return []
    return [f"max_length={args.max_length} leaves nothing to predict: use 2 or more"]


def _shared_reference(args: Any) -> list[str]:
    if not args.sync_ref_model:
        return []
    return ["sync_ref_model=True would move the reference, which here is the model with its adapter off: leave it out"]


def _require_whole_groups(args: Any) -> None:
    """Raise ConfigError where the completions of a prompt would not all be in one batch."""
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
