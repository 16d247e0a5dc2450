"""Helium and ERNIE 4.5: Llama with q and k rotated in neighbouring pairs."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("helium", "ernie4_5"), interleaved=True)
