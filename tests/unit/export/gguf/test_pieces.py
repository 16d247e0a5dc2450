"""Vocabularies of pieces: written where the runtime cuts texts alike, refused by name where it would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from veneer.errors import FormatError
from veneer.export.gguf.model import GgufOptions, export_gguf

from .tiny import tiny_model

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("c", "d"), ("▁", "d")]
SPACES = normalizers.Replace(" ", "▁")
METASPACE = pre_tokenizers.Metaspace(split=False)


def written(
    folder: Path,
    normalizer: Any = SPACES,
    pre: Any = None,
    merges: Any = MERGES,
    others: tuple[str, ...] = (),
    pieces: list[str] = BYTES,
    **model: Any,
) -> dict[str, float]:
    """The scores of a file by its tokens."""
    tokens = ["<unk>", "<s>", "</s>", *pieces, *"▁abcd", *("".join(merge) for merge in merges), *others]
    settings = {"byte_fallback": True, "unk_token": "<unk>", **model}
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **settings))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(made) + 3, num_hidden_layers=1).save_pretrained(folder)
    export_gguf(folder, folder / "x.gguf", GgufOptions(type="F32"))
    fields = GGUFReader(folder / "x.gguf").fields
    names, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    return dict(zip(names, scores, strict=True))


@pytest.mark.parametrize(
    ("normalizer", "pre"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None),  # Llama, Phi-3
        (SPACES, pre_tokenizers.Split(" ", "merged_with_previous")),  # Gemma
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),  # Llama since 2024
        (None, pre_tokenizers.Metaspace()),
    ],
)
def test_the_forms_of_sentencepiece_are_written(tmp_path: Path, normalizer: Any, pre: Any) -> None:
    assert written(tmp_path, normalizer, pre)["▁abc"] == -2


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"normalizer": normalizers.Sequence([normalizers.Lowercase(), SPACES])}, "the normalizer Lowercase"),
        ({"normalizer": normalizers.NFKC(), "pre": METASPACE}, "the normalizer NFKC"),
        ({"normalizer": normalizers.Replace(Regex(" +"), "▁")}, r"the normalizer Replace \(pattern={'Regex': ' \+'}"),
        ({"normalizer": normalizers.Prepend("x")}, r"the normalizer Prepend \(prepend='x'\)"),
        ({"pre": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), METASPACE])},
         r"pre-tokenizer Digits \(individual_digits=True\)"),
        ({"pre": pre_tokenizers.Whitespace(), "pieces": BYTES[:99] + BYTES[101:]},
         r"pre-tokenizer Whitespace; no pieces for 2 of the 256 bytes \(<0x63> first\)"),
        ({"pre": pre_tokenizers.Metaspace(), "others": ("a▁d",)}, r"pre-tokenizer Metaspace .*split=True"),
        ({"byte_fallback": False}, "byte_fallback off"),
        ({"ignore_merges": True}, "ignore_merges"),
        ({"merges": [("b", "c"), ("a", "b"), ("ab", "c")]},
         r"1 pieces are split differently "
         r"\(the tokenizer splits 'abc' into \['a', 'bc'\], the runtime into \['abc'\]\)"),
    ],
)  # fmt: skip
def test_what_the_runtime_does_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any], seen: str) -> None:
    with pytest.raises(FormatError, match=f"would split texts differently.*{seen}"):
        written(tmp_path, **changes)
    assert not (tmp_path / "x.gguf").exists()


def test_a_piece_that_no_merge_makes_has_the_worst_score(tmp_path: Path) -> None:
    scores = written(tmp_path, others=("dd",))
    assert (scores["dd"], scores["d"], scores["<0x41>"], scores["cd"]) == (-10000.0, 0.0, 0.0, -3.0)
