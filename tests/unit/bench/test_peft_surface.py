"""The page on PEFT's names does not call a field present that refuses all values but one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import veneer
from veneer.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "peft.md"


def test_fields_without_a_choice_depart(script: Callable[[str], ModuleType]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for (config, name), note in script("peft_surface").NO_CHOICE.items():
        cells = re.search(rf"^\| `{config}` \|(.*)$", text, flags=re.MULTILINE)
        assert cells is not None, config
        _, present, departs, _ = [cell.strip() for cell in cells[1].split(" | ")][:4]
        assert f"`{name}`" not in present
        assert f"`{name}` ({note})" in departs


def test_they_have_none() -> None:
    with pytest.raises(ConfigError, match="save_only_topk_weights"):
        veneer.VBLoRAConfig(save_only_topk_weights=True, num_vectors=4, vector_length=2)
    with pytest.raises(ConfigError, match="encoder_dropout"):
        veneer.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_dropout=0.5)
