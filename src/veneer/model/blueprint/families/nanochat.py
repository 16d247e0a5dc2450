"""nanochat: norms without weights, one of them on the embeddings."""

from dataclasses import replace

from veneer.model.blueprint.family import Family
from veneer.model.blueprint.names import COMMON

FAMILY = Family(model_types=("nanochat",), names=replace(COMMON, embedding_norm=("norm",)))
