"""HyperCLOVA X: Granite with norms after both halves; ``logits_scaling`` multiplies the logits."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("hyperclovax",), multiplies_logits=True)
