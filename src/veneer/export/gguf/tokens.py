"""Vocabulary in a GGUF file: tokens, their types, merges, and scores of pieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType, TokenType

from veneer.errors import FormatError
from veneer.export.gguf.pieces import BYTES, SPACE, piece_ranks
from veneer.export.gguf.tokenizer import SourceTokenizer
from veneer.store.gguf.keys import KeyValue
from veneer.store.gguf.pre_tokenizer import pre_tokenizer_name

PREFIX = "tokenizer.ggml."
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d*>|<pad>|<mask>")
_NORMALIZERS = (None, "NFC")  # the runtime has none; NFC changes no text that is in it already
ADDED_SCORE, PADDED_SCORE = -1000.0, -10000.0


def vocabulary_pairs(source: SourceTokenizer, n_rows: int) -> list[KeyValue]:
    """Return the vocabulary as metadata pairs, padded to ``n_rows``, the rows of the embeddings.

    Raises FormatError for a vocabulary longer than the embeddings, a tokenizer without merges, and anything that no key
    can hold.
    """
    model = source.content["model"]
    if model.get("type") != "BPE":
        raise FormatError(
            f"the tokenizer in {source.folder} is a {model.get('type')} model; GGUF files of decoders hold "
            "vocabularies of merges (BPE). Serve the model with `veneer serve`"
        )
    tokens = _tokens(source, n_rows)
    return _byte_level(source, tokens) if is_byte_level(source.content) else _pieces(source, tokens)


def is_byte_level(content: Mapping[str, Any]) -> bool:
    """Return True if the vocabulary is byte-level, not made of text pieces."""
    pre = content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre]) if pre.get("type") == "Sequence" else [pre]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _tokens(source: SourceTokenizer, n_rows: int) -> list[str]:
    known = source.vocabulary
    longest = max(known) + 1
    if longest > n_rows:
        last = known[max(known)]
        raise FormatError(
            f"the tokenizer in {source.folder} has {longest} tokens (the last is {last!r}), the embeddings have "
            f"{n_rows} rows: resize the model's embeddings, or take the tokenizer that it was trained with"
        )
    tokens = [known.get(number, _filler(number)) for number in range(n_rows)]
    twice = [token for token, n in Counter(tokens).items() if n > 1]
    if twice:
        raise FormatError(
            f"the tokens {twice[:5]} have several ids each, on which the runtime would abort: give each id its own "
            "token"
        )
    return tokens


def _byte_level(source: SourceTokenizer, tokens: list[str]) -> list[KeyValue]:
    normalizer = (source.content.get("normalizer") or {}).get("type")
    if normalizer not in _NORMALIZERS:
        raise FormatError(
            f"the tokenizer in {source.folder} changes texts first ({normalizer}); GGUF files have no key for that. "
            "Serve the model with `veneer serve`"
        )
    kinds = [_kind(source, number) for number in range(len(tokens))]
    texts = [_text(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
    merges = [_joined(merge) for merge in source.content["model"].get("merges") or ()]
    pairs = [
        _string("model", "gpt2"),
        _string("pre", pre_tokenizer_name(source.content)),
        _strings("tokens", texts),
        KeyValue(PREFIX + "token_type", kinds, GGUFValueType.ARRAY, GGUFValueType.INT32),
    ]
    return [*pairs, _strings("merges", merges)] if merges else pairs


def _pieces(source: SourceTokenizer, tokens: list[str]) -> list[KeyValue]:
    """Return the metadata of a vocabulary of SentencePiece's kind: tokens, scores and types.

    The runtime merges the pair with the best score first, so a merge's rank is its score.
    """
    ranks = piece_ranks(source, tokens)
    kinds = [_kind(source, number) for number in range(len(tokens))]
    texts = [_text(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
    scores = [_score(token, kind, ranks) for token, kind in zip(tokens, kinds, strict=True)]
    return [
        _string("model", "llama"),
        _string("pre", "default"),
        _strings("tokens", texts),
        KeyValue(PREFIX + "scores", scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        KeyValue(PREFIX + "token_type", kinds, GGUFValueType.ARRAY, GGUFValueType.INT32),
    ]


def _filler(number: int) -> str:
    """Return the token for a row of the embeddings beyond the tokenizer's vocabulary, as llama.cpp's converter names
    it.
    """
    return f"[PAD{number}]"


def _kind(source: SourceTokenizer, number: int) -> int:
    token, added = source.vocabulary.get(number, _filler(number)), source.added.get(number)
    if added is None and token == _filler(number):  # also one that a GGUF base brought along
        return int(TokenType.UNUSED)
    byte_level = is_byte_level(source.content)
    if not byte_level and token in BYTES:
        return int(TokenType.BYTE)
    if not byte_level and token == source.content["model"].get("unk_token"):
        return int(TokenType.UNKNOWN)
    if added is None:
        return int(TokenType.NORMAL)
    control = added.get("special") or _LOOKS_SPECIAL.fullmatch(token)
    return int(TokenType.CONTROL if control else TokenType.USER_DEFINED)


def _text(token: str, kind: int) -> str:
    return token.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else token


def _score(token: str, kind: int, ranks: Mapping[str, int]) -> float:
    if kind == TokenType.UNUSED:
        return PADDED_SCORE
    if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        return ADDED_SCORE
    if kind != TokenType.NORMAL or len(token) == 1:
        return 0.0
    return -float(ranks[token]) if token in ranks else PADDED_SCORE  # the runtime would merge it all the same


def _joined(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)


def _string(name: str, value: str) -> KeyValue:
    return KeyValue(PREFIX + name, value, GGUFValueType.STRING)


def _strings(name: str, values: list[str]) -> KeyValue:
    return KeyValue(PREFIX + name, values, GGUFValueType.ARRAY, GGUFValueType.STRING)
