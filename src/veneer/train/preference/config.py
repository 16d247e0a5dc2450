"""Settings of the trainers on preferences and of reward models: TRL's, with those that every trainer of veneer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trl

from veneer.train.config import RunSettings


@dataclass
class DPOConfig(RunSettings, trl.DPOConfig):  # type: ignore[misc]
    """TRL's ``DPOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once."""

    def problems(self) -> list[str]:
        """Return all problems of the loss and the choice of the reference."""
        return [*beta_problems(self), *_lengths(self), *shared_reference_problems(self)]


@dataclass
class KTOConfig(RunSettings, trl.KTOConfig):  # type: ignore[misc]
    """TRL's ``KTOConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once."""

    def problems(self) -> list[str]:
        """Return all problems of the loss and the choice of the reference."""
        found = [*beta_problems(self), *_lengths(self), *shared_reference_problems(self)]
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
        """Return all problems of the settings for the lengths of rows."""
        return _lengths(self)


def beta_problems(args: Any) -> list[str]:
    """Return the problems of ``beta``."""
    return [] if args.beta >= 0 else [f"beta={args.beta!r} must be at least 0"]


def _lengths(args: Any) -> list[str]:
    if getattr(args, "max_length", None) is None or args.max_length >= 2:
        return []
    return [f"max_length={args.max_length} leaves nothing to predict: use 2 or more"]


def shared_reference_problems(args: Any) -> list[str]:
    """Return the problems of a reference that training would change."""
    if not args.sync_ref_model:
        return []
    return ["sync_ref_model=True would move the reference, which here is the model with its adapter off: leave it out"]
