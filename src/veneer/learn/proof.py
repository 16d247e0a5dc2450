"""Proves that the engine draws from the policy in training: both give the same log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from veneer.errors import TrainingError

LARGEST, LARGEST_MEAN = 1e-3, 1e-4  # nats a token, in float32
_PASSES = 100  # times as far as one rounding moves an answer: with 30 blocks two passes were 2 to 14 times as far apart


class PolicyMismatchError(TrainingError):
    """Error for an engine whose log-probabilities differ from those of the model in training."""


def beyond(drawn: Float[Tensor, "b t"], own: Float[Tensor, "b t"], counted: Bool[Tensor, "b t"]) -> bool:
    """Return True if the two log-probabilities of a ``counted`` token differ by more than 1e-3 nats."""
    return not bool(((drawn - own).abs() <= LARGEST)[counted].all())


@contextmanager
def rounded_otherwise(embeddings: nn.Module) -> Iterator[None]:
    """Enter a context in which token embeddings differ at random by one rounding error, to show how much a model
    amplifies such errors.

    The amplification matters after some prompts, such as one word repeated many times. There a float32 pass is 1e-3
    nats from one in float64.
    """

    def changed(module: nn.Module, given: object, found: Tensor) -> Tensor:
        return found * (1 + torch.finfo(found.dtype).eps * (torch.rand_like(found) - 0.5))

    hook = embeddings.register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()


def require_same_policy(
    drawn: Float[Tensor, "b t"],
    own: Float[Tensor, "b t"],
    counted: Bool[Tensor, "b t"],
    answers: Sequence[Sequence[int]],
    rounding: Float[Tensor, "b t"] | None = None,
) -> None:
    """Raise PolicyMismatchError if a token's log-probabilities differ by more than 1e-3 nats, or by 1e-4 in the mean.

    ``drawn`` are the engine's log-probabilities, ``own`` the training pass's. Tokens that are not ``counted`` are
    padding. ``rounding`` is the change that `rounded_otherwise` causes in each of the training pass's values. If it is
    given, an answer's tokens may differ by a hundred times the answer's largest change.
    """
    differences = (drawn - own).abs().double().masked_fill(~counted, 0.0)
    mean = float(differences.sum() / counted.sum().clamp_min(1))
    allowed = torch.full_like(differences, LARGEST)
    if rounding is not None:
        amplified = rounding.abs().double().masked_fill(~counted, 0.0).amax(dim=1, keepdim=True)
        allowed = allowed.maximum(_PASSES * amplified)
    if bool((differences <= allowed).all()) and mean <= LARGEST_MEAN:
        return
    row, place = divmod(int((differences - allowed).argmax()), differences.shape[1])
    raise PolicyMismatchError(
        f"answers are drawn from another policy than the one in training: token {answers[row][place]}, number {place} "
        f"of answer {row}, has log-probability {float(drawn[row, place]):.6f} in the engine and "
        f"{float(own[row, place]):.6f} in training (mean difference {mean:.1e}; allowed are "
        f"{float(allowed[row, place]):.1e}, and {LARGEST_MEAN:g} in the mean). "
        "Set rollout_engine='generate' (rollouts.engine in a recipe), and report this"
    )
