"""LFM2: short convolutions between layers of attention; the norm in front of the head is named after embeddings.

Its mixture chooses experts by sigmoids and a bias.
"""

from veneer.model.blueprint.family import Family
from veneer.model.blueprint.names import Names

FAMILY = Family(model_types=("lfm2", "lfm2_moe"), names=Names(final_norm=("embedding_norm",)), experts="sigmoid")
