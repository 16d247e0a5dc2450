"""Tokenizer of an export: that of the first folder that has one, with the first chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from veneer.errors import FormatError
from veneer.export.gguf.tokenizer import read_tokenizer


def test_an_adapters_chat_template_in_a_file_alone_is_exported(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    with pytest.raises(FormatError, match="holds a tokenizer"):
        read_tokenizer([adapter, base])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    tokenizer.chat_template = "base"
    tokenizer.save_pretrained(base)
    assert read_tokenizer([adapter, base]).tokenizer.chat_template == "base"
    (adapter / "chat_template.jinja").write_text("own")
    found = read_tokenizer([adapter, base])
    assert (found.folder, found.tokenizer.chat_template) == (base, "own")
