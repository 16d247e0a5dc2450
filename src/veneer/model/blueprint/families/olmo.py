"""OLMo 1: LayerNorms without weights, whose epsilon is a constant of their code."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("olmo",), norm_eps=1e-5)
