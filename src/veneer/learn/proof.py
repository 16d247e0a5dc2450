"""Proof that the engine draws from the policy in training: its log-probabilities beside those of a training pass."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from veneer.errors import TrainingError

LARGEST, LARGEST_MEAN = 1e-3, 1e-4  # nats a token, in float32


class PolicyMismatchError(TrainingError):
    """Error for log-probabilities of an engine that are not those of the model in training."""


def require_same_policy(
    drawn: Float[Tensor, "b t"],
    own: Float[Tensor, "b t"],
    counted: Bool[Tensor, "b t"],
    answers: Sequence[Sequence[int]],
) -> None:
    """Raise PolicyMismatchError if two log-probabilities of a token differ by more than 1e-3 nats, or 1e-4 in the mean.

    ``drawn`` are the engine's, ``own`` those of the training pass; tokens that are not ``counted`` are padding.
    """
    differences = (drawn - own).abs().double().masked_fill(~counted, 0.0)
    worst, mean = float(differences.max()), float(differences.sum() / counted.sum().clamp_min(1))
    if worst <= LARGEST and mean <= LARGEST_MEAN:
        return
    row, place = divmod(int(differences.argmax()), differences.shape[1])
    raise PolicyMismatchError(
        f"answers are drawn from another policy than the one in training: token {answers[row][place]}, number {place} "
        f"of answer {row}, has log-probability {float(drawn[row, place]):.6f} in the engine and "
        f"{float(own[row, place]):.6f} in training (mean difference {mean:.1e}; allowed are {LARGEST:g}, and "
        f"{LARGEST_MEAN:g} in the mean). Set rollout_engine='generate' (rollouts.engine in a recipe), and report this"
    )
