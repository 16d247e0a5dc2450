"""Ministral 3: queries grow with the logarithm of their position beyond the original context."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("ministral3",), scales_queries=True)
