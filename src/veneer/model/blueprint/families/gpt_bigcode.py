"""GPT-BigCode (StarCoder): GPT-2's names; without multi-query attention, q, k and v of one head after the other."""

from veneer.model.blueprint.family import Family
from veneer.model.blueprint.names import Names

FAMILY = Family(model_types=("gpt_bigcode",), names=Names(joined=(("c_attn", "by head"),)))
