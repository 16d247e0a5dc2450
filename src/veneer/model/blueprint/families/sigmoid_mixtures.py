"""Mixtures in DeepSeek V3's form: experts are chosen by sigmoids and a bias within groups, beside a shared expert.

MiniMax-M2's have neither groups nor a shared expert.
"""

from veneer.model.blueprint.family import Family

FAMILY = Family(
    model_types=(
        "deepseek_v3", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "minimax_m2",
        "solar_open",
    ),
    experts="sigmoid",
)  # fmt: skip
