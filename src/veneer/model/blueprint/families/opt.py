"""OPT: learned positions from row 2 on, the feed-forward layers in the block itself."""

from typing import Any

from veneer.model.blueprint.family import Family


def _strange(config: Any) -> str | None:
    return (
        None
        if config.do_layer_norm_before
        else "its norms come after the residual sums (do_layer_norm_before=False: 350m)"
    )


FAMILY = Family(model_types=("opt",), strange=_strange)
