"""Pre-tokenizers: matched by what they do, never by a guess."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from veneer.errors import FormatError
from veneer.store.gguf.pre_tokenizer import TABLE, PreTokenizer, pre_tokenizer_name, pre_tokenizer_of

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def content(pre: object, whole: bool = False) -> dict[str, object]:
    tokenizer = Tokenizer(models.BPE(vocab={}, merges=[], ignore_merges=whole))
    tokenizer.pre_tokenizer = pre  # type: ignore[assignment]
    found: dict[str, object] = json.loads(tokenizer.to_str())
    return found


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_what_a_name_builds_is_matched_to_it(entry: object) -> None:
    assert pre_tokenizer_name(content(entry.build(), entry.whole)) == entry.name  # type: ignore[attr-defined]


def test_llama_3_s_pattern_is_llama_bpe_where_whole_words_skip_merges() -> None:
    pre = {"pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False, "type": "Split"}
    steps = [pre, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    given = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {"ignore_merges": True}}
    assert pre_tokenizer_name(given) == "llama-bpe"
    assert pre_tokenizer_name({**given, "model": {}}) == "dbrx"


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_whole_words_that_the_runtime_merges_or_the_reverse_are_refused(entry: PreTokenizer) -> None:
    if entry.name in ("llama-bpe", "dbrx"):
        pytest.skip("one name for each way")
    given = content(entry.build(), not entry.whole)
    with pytest.raises(
        FormatError,
        match=f"as {entry.name} does, but with ignore_merges {not entry.whole}: for {entry.name} the runtime",
    ):
        pre_tokenizer_name(given)


@pytest.mark.parametrize(
    ("pre", "seen"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "ByteLevel True with a space in front"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel()]), '"String": "x"'),
        (pre_tokenizers.Whitespace(), "Whitespace"),
    ],
)
def test_what_has_no_name_is_refused_with_the_pattern_seen(pre: object, seen: str) -> None:
    with pytest.raises(FormatError, match="no name in GGUF files") as refusal:
        pre_tokenizer_name(content(pre))
    assert seen in str(refusal.value)


def test_an_unknown_name_means_nothing() -> None:
    assert pre_tokenizer_of("later-invention") is None
    assert pre_tokenizer_of(None) is None
