"""Group relative policy optimization, on TRL's trainer."""

from __future__ import annotations

from typing import Any

import trl

from veneer.learn.config import GRPOConfig
from veneer.learn.trainer import DrawingTrainer
from veneer.model.placed.structure import evaluation


class GRPOTrainer(DrawingTrainer, trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's ``GRPOTrainer``, with its arguments but tools, rollouts and environments. ``peft_config`` is one of
    veneer's configs.

    Rows hold prompt and the columns that the reward functions read. A reward function returns a finite number for each
    completion. It may return None, for no opinion, if there are several functions. Completions are drawn by the model
    in training, without dropout. The reference, log-probabilities and checkpoints are those of `veneer.DPOTrainer`.

    Shao et al. 2024, arXiv:2402.03300. Raises ConfigError, DataError or TrainingError if the run could not do as asked.
    """

    task = "grpo"
    settings = GRPOConfig

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **options: Any) -> Any:
        drawn = self.drawn(prompt_ids)
        if drawn is None:
            with evaluation(self.model):
                return super()._generate_single_turn(prompt_ids, *args, **options)
        return [list(each.token_ids) for each in drawn], [list(each.logprobs) for each in drawn]
