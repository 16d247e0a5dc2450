"""Cohere's Command R7B: as Command R, but layers of full attention have no rotary embedding."""

from veneer.model.blueprint.family import Family

FAMILY = Family(
    model_types=("cohere2",),
    interleaved=True,
    rotates=lambda config, layer: config.layer_types[layer] == "sliding_attention",
)
