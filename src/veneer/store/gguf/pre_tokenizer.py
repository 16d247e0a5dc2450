"""Pre-tokenizers of byte-level vocabularies, by llama.cpp's names: matched for writing, built for reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from veneer.errors import FormatError

Step = tuple[str | bool, ...]
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, letters: str = r"\p{L}", other: str = r"[^\s\p{L}\p{N}]") -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?{other}+[\r\n]*{_ENDS}"


def _cased(digits: str, contractions: str = "") -> str:
    front = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{front}{_UPPER}*{_LOWER}+{contractions}|{front}{_UPPER}+{_LOWER}*{contractions}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDS}"
    )


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Pre-tokenizer of a byte-level vocabulary. ``name`` is its ``tokenizer.ggml.pre``.

    ``patterns`` split the text one after the other, after ``digits`` are separated. Without patterns it is GPT-2's.
    ``whole``: a word that is a token skips the merges.
    """

    name: str
    patterns: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    others: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """Steps of the pre-tokenizer, one by one."""
        digits: tuple[Step, ...] = (("Digits", True),) if self.digits else ()
        splits: tuple[Step, ...] = tuple(("Split", pattern, "Isolated", False) for pattern in self.patterns)
        return (*digits, *splits, ("ByteLevel", not self.patterns))

    def build(self) -> Any:
        """Return the pre-tokenizer as an object of the tokenizers library."""
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


TABLE = (
    PreTokenizer("gpt-2", others=("phi-2", "olmo", "mpt", "jais", "roberta-bpe")),
    PreTokenizer(
        "smollm",
        digits=True,
        others=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    PreTokenizer("llama-bpe", (_words(r"\p{N}{1,3}"),), whole=True, others=("llama3", "llama-v3", "falcon3")),
    PreTokenizer("dbrx", (_words(r"\p{N}{1,3}"),), others=("smaug-bpe",)),
    PreTokenizer("qwen2", (_words(r"\p{N}"),), others=("stablelm2", "deepseek-r1-qwen", "hunyuan")),
    PreTokenizer("qwen35", (_words(r"\p{N}", r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]"),)),
    PreTokenizer("tekken", (_cased(r"\p{N}"),), whole=True),
    PreTokenizer("gpt-4o", (_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?"),)),
    PreTokenizer(
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        ),
    ),
)
"""The first that fits is taken; ``others`` are names with which llama.cpp computes the same."""


def pre_tokenizer_name(content: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a ``tokenizer.json``.

    Raises FormatError, with the tokenizer's patterns, if no name in ``TABLE`` stands for them. Raises FormatError if
    the name stands for the opposite of the tokenizer's ``ignore_merges``.
    """
    steps = tuple(_steps(content.get("pre_tokenizer") or {}))
    whole = bool((content.get("model") or {}).get("ignore_merges", False))
    for each in TABLE:
        if each.steps == steps and each.whole == whole:
            return each.name
    shown = "; ".join(" ".join(map(str, step)) for step in steps) or "nothing"
    if same := next((each.name for each in TABLE if each.steps == steps), None):
        raise FormatError(
            f"the tokenizer splits words as {same} does, but with ignore_merges {whole}: for {same} the runtime keeps "
            f"{'no word' if whole else 'every word that is a token'} whole, so the tokens would differ"
        )
    raise FormatError(
        f"the tokenizer splits words in a way that has no name in GGUF files: {shown}. Under any other name the "
        "runtime would split them differently. Serve the model with `veneer serve`. Known: "
        f"{', '.join(each.name for each in TABLE)}"
    )


def pre_tokenizer_of(name: str | None) -> PreTokenizer | None:
    """Return the pre-tokenizer of a name in a file; None for an unknown one."""
    return next((each for each in TABLE if name in (each.name, *each.others)), None)


def _steps(content: Mapping[str, Any]) -> Iterator[Step]:
    kind = content.get("type")
    if kind == "Sequence":
        for each in content["pretokenizers"]:
            yield from _steps(each)
    elif kind == "Split":
        pattern = content["pattern"]
        text = pattern.get("Regex", json.dumps(pattern))
        yield "Split", text, content.get("behavior", ""), content.get("invert", False)
    elif kind == "Digits":
        yield "Digits", content.get("individual_digits", False)
    elif kind == "ByteLevel":
        prefix: Step = ("with a space in front",) if content.get("add_prefix_space") else ()
        yield "ByteLevel", content.get("use_regex", True), *prefix
    elif kind is not None:
        yield (str(kind),)
