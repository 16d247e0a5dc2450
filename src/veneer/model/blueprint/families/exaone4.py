"""EXAONE 4: if some layers have sliding windows, the layers without one have no rotary embedding."""

from veneer.model.blueprint.family import Family

FAMILY = Family(
    model_types=("exaone4",),
    rotates=lambda config, layer: not config.sliding_window or config.layer_types[layer] == "sliding_attention",
)
