"""BLOOM: positions are a bias of attention. Attention and feed-forward part add to the residual stream themselves."""

from typing import Any

from veneer.model.blueprint.family import Family


def _strange(config: Any) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "the residual stream continues from the outputs of its norms (apply_residual_connection_post_layernorm)"
    return None


FAMILY = Family(model_types=("bloom",), alibi=lambda config: True, adds_inside=("attention", "mlp"), strange=_strange)
