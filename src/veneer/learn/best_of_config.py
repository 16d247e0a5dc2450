"""Settings of training on the best of several answers."""

from __future__ import annotations

from dataclasses import dataclass, fields

from veneer.learn.config import GRPOConfig

_OF_ADVANTAGES = (
    "beta", "epsilon", "epsilon_high", "delta", "loss_type", "scale_rewards", "importance_sampling_level",
    "multi_objective_aggregation", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
    "off_policy_mask_threshold", "use_bias_correction_kl", "router_aux_loss_coef",
)  # fmt: skip


@dataclass
class BestOfConfig(GRPOConfig):
    """`GRPOConfig` of `BestOfTrainer`. Raises ConfigError with all problems at once.

    ``reward_floor`` is the lowest reward with which an answer is trained on; None means no floor. Fields of GRPO's loss
    (``beta``, ``epsilon``, ``loss_type`` and others) have no effect, and other values than their defaults are refused.
    """

    reward_floor: float | None = None
    vllm_importance_sampling_correction: bool = False

    def problems(self) -> list[str]:
        """Return all problems of the settings, with those of fields that have no effect."""
        usual = {each.name: each.default for each in fields(self)}
        found = super().problems()
        found += [
            f"{name}={getattr(self, name)!r} has no effect on the likelihood of the best answer: leave it out"
            for name in _OF_ADVANTAGES
            if getattr(self, name) != usual[name]
        ]
        floor = self.reward_floor
        is_number = isinstance(floor, int | float) and not isinstance(floor, bool) and abs(floor) < float("inf")
        return found if floor is None or is_number else [*found, f"reward_floor={floor!r} must be a finite number"]
