"""Model of a recipe itself, made as its run makes it, to compare a plan with a real run."""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from veneer.plan.model import adapter_of, with_adapter
from veneer.recipe.recipe import Recipe
from veneer.train.base_model import load_base


def measured_model(recipe: Recipe) -> PreTrainedModel:
    """Return the loaded base with its adapter, or with float32 weights if the whole model is trained, ready
    to train.
    """
    adapter = adapter_of(recipe.adapter)
    base = load_base(recipe.model, frozen=adapter is not None)
    model = base.float().requires_grad_(True) if adapter is None else with_adapter(base, adapter)
    return cast(PreTrainedModel, model.train())
