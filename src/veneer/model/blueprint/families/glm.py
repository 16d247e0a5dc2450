"""GLM and GLM-4: rotary embedding on half of each head, in neighbouring pairs. GLM-4 has norms after its parts too."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("glm", "glm4"), interleaved=True)
