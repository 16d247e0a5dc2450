"""GPT-J: one norm for both halves, the first numbers of each head rotated in neighbouring pairs."""

from veneer.model.blueprint.family import Family

FAMILY = Family(model_types=("gptj",), interleaved=True)
