"""Text that comes token by token is the text of the whole, and no character comes in halves."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from veneer.serve.requests.detokenizer import Detokenizer

TEXTS = ["a plain one", "über größe", "日本語 text", "🙂🙃 and 🏳️‍🌈", "e\u0301 combined", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "x", "a longer prompt, über"])
def test_bytes(tokenizer, text, prompt):
    reader = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"], True)
    parts = [reader.add(token) for token in tokenizer(text)["input_ids"]]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) + reader.finish() == text


def test_what_stays_unfinished_comes_at_the_end(tokenizer):
    reader = Detokenizer(tokenizer, [], True)
    parts = [reader.add(token) for token in [*b"ab", *"ü".encode()[:1]]]
    assert parts == ["a", "b", ""]
    assert (reader.finish(), reader.finish()) == ("\ufffd", "")


def test_random_bytes(tokenizer):
    draw = random.Random(3)
    for _ in range(50):
        ids = [draw.randrange(256) for _ in range(23)]
        reader = Detokenizer(tokenizer, [], True)
        found = "".join(reader.add(token) for token in ids) + reader.finish()
        assert found.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_special_tokens(tokenizer):
    for skips, text in ((True, "ab"), (False, "a<end>b")):
        reader = Detokenizer(tokenizer, [], skips)
        assert "".join(reader.add(token) for token in [97, tokenizer.eos_token_id, 98]) == text


def test_a_space_between_prompt_and_answer_is_the_answers():
    words = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "sat": 2}, unk_token="the"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    reader = Detokenizer(tokenizer, [0], True)
    assert reader.add(1) + reader.add(2) == " cat sat"


def test_all_at_once_is_token_by_token(tokenizer):
    """Whole characters, broken ones, an answer that was cut within one, and a prompt that ends within one."""
    draw = random.Random(5)
    broken = [[draw.randrange(256) for _ in range(draw.randrange(29))] for _ in range(40)]
    whole = [tokenizer(text)["input_ids"] for text in TEXTS]
    for ids in (*whole, *broken, [*b"ab", 195], [128, 153, *b" x"]):
        for prompt in ([], [*b"x"], [240, 159]):
            for final in (True, False):
                slow, fast = (Detokenizer(tokenizer, prompt, True) for _ in range(2))
                text = "".join(slow.add(token) for token in ids) + (slow.finish() if final else "")
                assert fast.read(ids, final=final) == text


def pieces() -> PreTrainedTokenizerFast:
    """Words with a mark before them, bytes where there is no word, as SentencePiece has them, and special tokens."""
    words = ["<unk>", "\u2581the", "\u2581cat", "s", "\u2581", ",", "日", "本"]
    vocabulary = {**{word: i for i, word in enumerate(words)}, **{f"<0x{b:02X}>": 8 + b for b in range(256)}}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def cleaned() -> PreTrainedTokenizerFast:
    """Words whose text changes behind them: "do" and "n't" become one."""
    words = Tokenizer(models.WordLevel({"do": 0, "not": 1, "n't": 2, ".": 3, "'": 4, "s": 5, "##s": 6}, unk_token="do"))
    words.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=words)


class Plain:
    """A tokenizer that is not of the tokenizers library."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.decode = tokenizer.decode


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("made", ["bytes", "pieces", "cleaned"])
def test_the_stream_is_two_decodes_a_token(tokenizer, made, skips):
    """Tokens in any order, characters that begin and never end, special tokens between, prompts that end within one."""
    made = {"bytes": lambda: tokenizer, "pieces": pieces, "cleaned": cleaned}[made]()
    draw, n = random.Random(7), len(made)
    likely = [*range(n), *[i % n for i in [*"é日🙂".encode()] * 9]]
    for _ in range(150):
        prompt, ids = ([draw.choice(likely) for _ in range(draw.randrange(most))] for most in (9, 25))
        fast, slow = Detokenizer(made, prompt, skips), Detokenizer(Plain(made), prompt, skips)
        assert slow._stream is None
        texts = ["".join(reader.add(id) for id in ids) + reader.finish() for reader in (fast, slow)]
        assert texts[0] == texts[1], (prompt, ids)


@pytest.mark.parametrize("text", TEXTS)
def test_the_stream_tells_characters_as_soon_as_two_decodes_do(tokenizer, text):
    fast, slow = Detokenizer(tokenizer, [], True), Detokenizer(Plain(tokenizer), [], True)
    assert fast._stream is not None
    for token in tokenizer(text)["input_ids"]:
        assert fast.add(token) == slow.add(token)
