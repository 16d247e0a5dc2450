"""Cohere's Command R: q and k are rotated in neighbouring pairs."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("cohere",), interleaved=True)
