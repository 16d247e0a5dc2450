"""Models as TRL's trainers call them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.adapters.token_scores import PreferenceScoring, token_scores


class ScoredModel:
    """Model (or the wrapper that joins the gradients of processes), callable as TRL calls one with its fused head.

    ``model(…, labels=labels, fused_lm_head=True)`` gives `TokenScores`; any other call is the model's own.
    """

    def __init__(self, model: nn.Module, scoring: PreferenceScoring) -> None:
        self.model, self.scoring = model, scoring

    def __call__(self, *, labels: Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return self.model(**inputs, **({} if labels is None else {"labels": labels}))
        return token_scores(self.model, {**inputs, "labels": labels}, self.scoring)
