"""Training on Ray: the members of a sweep on its workers, or one run in several workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def train_loop(config: Mapping[str, Any]) -> None:
    """Train a recipe in the workers of a ``ray.train.torch.TorchTrainer``, as its ``train_loop_per_worker``.

    ``config`` is its ``train_loop_config``: ``recipe``, a file on every node, and the fields of `training.Loop` that
    have a default. An interrupted run continues from its last checkpoint. The results are reported to Ray.

    Raises ConfigError for other keys, and the errors of `veneer.train.run.run_recipe`.
    """
    from veneer.ray.training import loop_of, run_here  # which import torch

    run_here(loop_of(config))
