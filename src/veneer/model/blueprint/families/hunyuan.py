"""Hunyuan, dense and mixture: queries and keys have norms after the rotation, whose base a fixed alpha may stretch."""

from veneer.model.blueprint.family import Family

FAMILY = Family(
    model_types=("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text"), experts="softmax", stretches_theta=True
)
