"""Families that the convention describes: their names and config keys determine everything."""

from veneer.model.blueprint.family import Family

FAMILY = Family(
    model_types=(
        "arcee", "cwm", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "ministral",
        "mistral", "nemotron", "olmo2", "olmo3", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
        "stablelm", "starcoder2", "vaultgemma",
    ),
)  # fmt: skip
