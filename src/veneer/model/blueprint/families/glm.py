"""GLM and GLM-4: half of each head is rotated, in neighbouring pairs; GLM-4 has norms after its halves too."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("glm", "glm4"), interleaved=True)
