"""REINFORCE leave-one-out, on TRL's trainer."""

from __future__ import annotations

from typing import Any

import trl

from veneer.learn.config import RLOOConfig
from veneer.learn.trainer import DrawingTrainer
from veneer.model.sites.structure import evaluation


class RLOOTrainer(DrawingTrainer, trl.RLOOTrainer):  # type: ignore[misc]
    """TRL's ``RLOOTrainer``, with its arguments. ``peft_config`` is one of veneer's configs.

    Rows hold a prompt and the columns that the reward functions read. A reward function returns a finite number for
    each completion; if there are several functions, it may return None for no opinion. The model in training generates
    the completions, without dropout. The reference, log-probabilities and checkpoints are those of `veneer.DPOTrainer`.
    Ahmadian et al. 2024, arXiv:2402.14740. Raises ConfigError, DataError or TrainingError if the run is impossible as
    configured.
    """

    task = "rloo"
    settings = RLOOConfig

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **options: Any) -> Any:
        drawn = self.drawn(prompt_ids)
        if drawn is None:
            with evaluation(self.model):
                return super()._generate_single_turn(prompt_ids, *args, **options)
        return [list(each.token_ids) for each in drawn]
