"""Training capabilities of a method, in addition to its forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from veneer.contract.parameters import Params


class Schedule(Protocol):
    """Actions of a method on its parameters between the steps of a training run."""

    def step(self, step: int) -> None:
        """Act after the optimizer step of this number, before its gradients are cleared."""

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that the next step depends on, by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the tensors of `state`."""


class Training:
    """Actions of a method in a training run. By default there are none."""

    def fields_for(self, n_steps: int) -> Mapping[str, object]:
        """Return the fields of the config that follow from the length of the run."""
        return {}

    def penalty(self, layers: Sequence[Params]) -> Tensor | None:
        """Return a weighted term of the loss, computed from the parameters of all layers; None if there is none."""
        return None

    def schedule(self, layers: Mapping[str, Params]) -> Schedule | None:
        """Return the schedule that acts on the parameters of all layers (by path) after each optimizer step.

        Return None if the method has no such actions.
        """
        return None


def distances_from_orthonormal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``|A Aᵀ - I|`` and ``|Bᵀ B - I|`` (Frobenius): the distances of low-rank factors from orthonormal ones.

    A has shape (r, i), B (o, r).
    """
    one = torch.eye(len(a), dtype=a.dtype, device=a.device)
    return torch.linalg.matrix_norm(a @ a.T - one), torch.linalg.matrix_norm(b.T @ b - one)
