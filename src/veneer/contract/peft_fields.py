"""Fields of PEFT's configs that the methods here do not have, so that its files are read and written whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PeftFields:
    """Fields in which PEFT's configs and veneer's differ.

    ``neutral``: fields that only PEFT has, with the value that means "not used". This value is written and accepted;
    any other value asks for something that is not supported.

    ``unread``: the fields among ``neutral`` whose value changes nothing. ``quiet``: fields that only veneer's configs
    have, written only if they change something.
    """

    neutral: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()


COMMON = PeftFields(neutral={"auto_mapping": None}, unread=("auto_mapping", "peft_version", "runtime_config"))
OF_LORA = PeftFields(  # PEFT's config of AdaLoRA has them too
    neutral={
        "arrow_config": None,
        "corda_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
    },
    unread=("megatron_core",),
)
