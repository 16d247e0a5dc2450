"""The tiny model, tokenizer and settings of tests of preferences."""

from __future__ import annotations

from tests.unit.train.preference.conftest import LORA, make_model, settings, tokenizer

__all__ = ["LORA", "make_model", "settings", "tokenizer"]
