"""Wraps models so that TRL's trainers can call them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.adapters.token_scores import PreferenceScoring, token_scores


class ScoredModel:
    """Wrapper of a model, or of its DDP wrapper, that accepts TRL's call for a fused head.

    ``model(…, labels=labels, fused_lm_head=True)`` returns `TokenScores`. Any other call is the model's own.
    """

    def __init__(self, model: nn.Module, scoring: PreferenceScoring) -> None:
        self.model, self.scoring = model, scoring

    def __call__(self, *, labels: Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return self.model(**inputs, **({} if labels is None else {"labels": labels}))
        return token_scores(self.model, {**inputs, "labels": labels}, self.scoring)
