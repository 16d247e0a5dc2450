"""MPT: positions are a bias of attention, and its modules have their own names."""

from veneer.model.blueprint.family import Family
from veneer.model.blueprint.names import Names, NormNames

FAMILY = Family(
    model_types=("mpt",),
    names=Names(
        final_norm=("norm_f",),
        joined=(("Wqkv", "joined"),),
        norms=(NormNames(attention="norm_1", feed_forward="norm_2"),),
        feed_forward=("ffn",),
    ),
    alibi=lambda config: True,
    adds_inside=("mlp",),
)
