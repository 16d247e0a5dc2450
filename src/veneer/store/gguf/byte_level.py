"""Tokenizers of GGUF files with byte-level vocabularies, rebuilt from the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from veneer.store.gguf.pre_tokenizer import pre_tokenizer_of

_TOKENS = "tokenizer.ggml."
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


def byte_level_tokenizer(values: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a file by the values of its whole header; None if its vocabulary is not byte-level or its
    pre-tokenizer is unknown.
    """
    entry = pre_tokenizer_of(values.get(_TOKENS + "pre"))
    if values.get(_TOKENS + "model") != "gpt2" or entry is None:
        return None
    tokens = values[_TOKENS + "tokens"]
    merges = [tuple(merge.split(" ")) for merge in values.get(_TOKENS + "merges") or ()]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=entry.whole))
    backend.pre_tokenizer, backend.decoder = entry.build(), decoders.ByteLevel()
    _add_special(backend, tokens, values.get(_TOKENS + "token_type") or [])
    ids = {name: values.get(f"{_TOKENS}{key}_token_id") for name, key in _NAMED.items()}
    named = {name: tokens[found] for name, found in ids.items() if found is not None and found < len(tokens)}
    if values.get(_TOKENS + "add_bos_token") and "bos_token" in named:
        bos = named["bos_token"]
        around = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
        backend.post_processor = around
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = values.get("tokenizer.chat_template")
    return tokenizer


def _add_special(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    special, others = [], []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in _SPECIAL:
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == TokenType.USER_DEFINED:
            others.append(AddedToken(token, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(others)
