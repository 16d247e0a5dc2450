"""The family that CONTRIBUTING.md adds: its file as it stands there describes a model with those names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.model.blueprint.describe import describe

from .families import model_of

GUIDE = Path(__file__).parents[4] / "CONTRIBUTING.md"


def test_the_family_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(b for b in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "FAMILY = " in b)
    scope: dict[str, Any] = {}
    exec("\n".join(line.removeprefix("   ") for line in code.splitlines()), scope)
    model = model_of("llama", torch.float32)
    for block in model.model.layers:
        for holder, old, new in (
            (block.self_attn, "o_proj", "wo"),
            (block.mlp, "gate_proj", "w1"),
            (block.mlp, "down_proj", "w2"),
            (block.mlp, "up_proj", "w3"),
        ):
            setattr(holder, new, getattr(holder, old))
            delattr(holder, old)
    assert describe(model).strange
    monkeypatch.setattr("veneer.model.blueprint.source.family_of", lambda model_type: scope["FAMILY"])
    decoder = describe(model)
    assert not decoder.strange
    assert decoder.listed
    assert [linear.path.rpartition(".")[2] for linear in decoder.blocks[1].linears] == [
        "q_proj", "k_proj", "v_proj", "wo", "w1", "w3", "w2",
    ]  # fmt: skip
    rotary = decoder.attentions[0].rotary
    assert rotary is not None
    assert rotary.interleaved
