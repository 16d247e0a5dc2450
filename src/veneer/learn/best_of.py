"""Training on the best of several answers, which the model in training draws."""

from __future__ import annotations

from typing import Any

import torch
import trl
from jaxtyping import Bool, Float
from torch import Tensor

from veneer.learn.best_of_config import BestOfConfig
from veneer.learn.grpo import GRPOTrainer

_OF_TRL = frozenset(
    {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages", "num_items_in_batch",
     "sampling_per_token_logps", "old_per_token_logps", "importance_sampling_ratio"}
)  # fmt: skip
"""Keys of a micro-batch that a forward pass does not take."""


class _Likelihood(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with the negative log-likelihood of the answers of advantage 1 as its loss."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids, attended = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], dim=1) for n in ("ids", "mask"))
        n, more = inputs["completion_ids"].shape[1], {key: inputs[key] for key in inputs.keys() - _OF_TRL}
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attended, n, compute_entropy=True, **more
        )
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        totals = self.accelerator.reduce(torch.stack([(entropies * mask).sum(), mask.sum().float()]), reduction="sum")
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"].append((totals[0] / totals[1].clamp(min=1)).item())
        share = inputs["num_items_in_batch"] / self.accelerator.num_processes  # gradients are averaged over processes
        loss: Tensor = -(logps * mask * inputs["advantages"].unsqueeze(1)).sum() / share
        return loss


class BestOfTrainer(GRPOTrainer, _Likelihood):
    """`GRPOTrainer` that fine-tunes on the best of the ``num_generations`` answers to each prompt.

    The loss is the mean negative log-likelihood, in nats per token, of the best answers of an optimizer step, at the
    temperature of the draw. The first of equally good answers is the best. A prompt whose answers have equal rewards,
    or whose best reward is less than ``reward_floor``, is left out; ``best_of/kept`` is the share of the others. Each
    draw is a round, on which ``steps_per_generation`` × ``num_iterations`` micro-batches are trained. In rounds of many
    steps, this is RAFT: Dong et al. 2023, arXiv:2304.06767. Raises ConfigError, DataError or TrainingError if the run
    is impossible as configured.
    """

    task = "best_of"
    settings = BestOfConfig

    def weigh(self, found: dict[str, Any]) -> None:
        """Set the advantages to 1 for the best answer to each prompt and to 0 for others, and ``num_items_in_batch`` to
        the number of trained tokens of an optimizer step.
        """
        super().weigh(found)
        if self._rewards is None:
            return
        mode = "train" if self.model.training else "eval"
        n = self.num_generations if self.model.training else self.num_generations_eval
        advantages: Tensor = found["advantages"]
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights).nansum(dim=1).masked_fill(self._rewards.isnan().all(dim=1), torch.nan)
        best, first = best_answers(rewards, n, self.args.reward_floor), self.args.process_index * len(advantages)
        advantages.copy_(best[first : first + len(advantages)])
        self._metrics[mode]["best_of/kept"].append(best.sum().item() * n / len(best))
        if best.any():
            self._metrics[mode]["best_of/reward"].append(rewards[best].mean().item())
        mask = found["completion_mask"] * found.get("tool_mask", 1) * advantages.unsqueeze(1)
        n_tokens = self.accelerator.gather(mask.sum()).sum().clamp(min=1)
        n_steps = self.args.steps_per_generation / self.args.gradient_accumulation_steps if mode == "train" else 1
        found["num_items_in_batch"] = n_tokens / n_steps


def best_answers(rewards: Float[Tensor, " b"], n: int, floor: float | None = None) -> Bool[Tensor, " b"]:
    """Return a mask of the best answer in each group of ``n``: the first with the highest reward.

    A reward of NaN means no opinion: such an answer is never the best. No answer of a group is the best if all opinions
    are equal, or if the highest reward is less than ``floor``.
    """
    groups = rewards.view(-1, n)
    highest, place = groups.nan_to_num(nan=-torch.inf).max(dim=1).values, groups.nan_to_num(nan=-torch.inf).argmax(1)
    kept = highest > groups.nan_to_num(nan=torch.inf).amin(dim=1)
    if floor is not None:
        kept &= highest >= floor
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, place.unsqueeze(1), kept.unsqueeze(1)).flatten()
