"""Texts are cut in llama.cpp as by the tokenizer itself: bytes and pieces. Skips without cyllama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from veneer.export.gguf.model import GgufOptions, export_gguf
from veneer.store.gguf.model import convert_gguf
from veneer.store.gguf.pre_tokenizer import TABLE

from .llama_cpp import LlamaCpp
from .tiny import tiny_model

PAGES = sorted((Path(__file__).parents[4] / "docs").glob("*.md"))
ODD = [
    "runs   of    spaces  \n\n\n and\ttabs\t\t end ",
    "emoji 👩‍👩‍👧 🎉, Khmer សួស្តី ពិភពលោក, 日本語 中文 한국어 العربية, naïve café Ǆ",
    "It's we'LL they've 1st 22nd ½ ² 12345678 3.14159 0x1F",
    "    def f(x):\n\t\treturn  x**2  # !!??...//\r\n",
    "",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]


def texts() -> list[str]:
    lines = [line for page in PAGES[:4] for line in page.read_text(encoding="utf-8").splitlines()]
    return [*ODD, *lines[:400]]


def folder_with(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer) + 3, num_hidden_layers=1).save_pretrained(folder)


def assert_same_tokens(folder: Path, tokenizer: Any) -> None:
    export_gguf(folder, folder / "x.gguf", GgufOptions(type="F32"))
    model = LlamaCpp(folder / "x.gguf")
    wrong = []
    for text in texts():
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        if text and model.tokens(text) != expected:
            wrong.append((text, model.tokens(text), expected))
    assert wrong == []


def assert_comes_back(folder: Path) -> None:
    """A file that is read and exported again says the same of its tokenizer, of tokens that only fill it up too."""
    convert_gguf(folder / "x.gguf", folder / "read")
    export_gguf(folder / "read", folder / "again.gguf", GgufOptions(type="F32"))
    first, again = (_told(folder / name) for name in ("x.gguf", "again.gguf"))
    assert first["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert again == first


def _told(file: Path) -> dict[str, Any]:
    fields = GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_bytes(tmp_path: Path, entry: Any) -> None:
    backend = Tokenizer(models.BPE(ignore_merges=bool(entry.whole)))
    backend.pre_tokenizer = entry.build()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    folder_with(tokenizer, tmp_path)
    assert_same_tokens(tmp_path, tokenizer)
    assert_comes_back(tmp_path)


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_without_a_sentencepiece_model(tmp_path: Path, prefix: bool) -> None:
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=tokens, show_progress=False, limit_alphabet=90)
    words = [word for text in texts() for word in text.replace(" ", "▁").split("▁")]
    backend.train_from_iterator((f"▁{word}" for word in words), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|user|>", normalized=False)]})
    folder_with(tokenizer, tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    assert_same_tokens(tmp_path, tokenizer)
    assert LlamaCpp(tmp_path / "x.gguf").vocab.get_add_bos()
    assert_comes_back(tmp_path)
