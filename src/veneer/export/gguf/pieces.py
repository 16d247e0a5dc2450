"""Checks of SentencePiece vocabularies for differences between runtime and tokenizer.

The runtime knows only SentencePiece's algorithm. Spaces become "▁", and the whole text is merged at once. Any two
neighbours that form a piece are merged, in the order of the piece's score. Text outside the pieces becomes bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from veneer.errors import FormatError
from veneer.export.gguf.tokenizer import SourceTokenizer

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"  # what pieces have for a space


def piece_ranks(source: SourceTokenizer, tokens: list[str]) -> dict[str, int]:
    """Return the rank of each piece that a merge makes: the index of the first such merge.

    Raises FormatError, with all reasons, for normalizers and pre-tokenizers other than SentencePiece's, for missing
    byte pieces, and for pieces that the runtime merges but the tokenizer does not.
    """
    merges = [_pair(merge) for merge in source.content["model"].get("merges") or ()]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    problems = list(_problems(source.content, tokens)) or list(_merge_problems(source, ranks, set(merges)))
    if problems:
        raise FormatError(
            f"the GGUF runtime would split texts differently from the tokenizer in {source.folder}, because it "
            f"supports SentencePiece's rules alone: {'; '.join(problems)}. Serve the model with `veneer serve`"
        )
    return ranks


def _problems(content: Mapping[str, Any], tokens: list[str]) -> Iterator[str]:
    for step in _steps(content, "normalizer"):
        if not _is_for_spaces(step):
            yield f"the normalizer {_told(step)}"
    for step in _steps(content, "pre_tokenizer"):
        if not _cuts_nothing(step, tokens):
            yield f"the pre-tokenizer {_told(step)}"
    if content["model"].get("ignore_merges"):
        yield "ignore_merges, by which a text that is a piece is not split"
    if missing := sorted(BYTES - set(tokens)):
        yield f"no pieces for {len(missing)} of the 256 bytes ({missing[0]} first): the runtime needs all of them"
    elif not content["model"].get("byte_fallback"):
        yield "byte_fallback off: the runtime would split unknown text into bytes instead of the unknown token"


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge if isinstance(merge, list) else merge.split(" ")
    return left, right


def _steps(content: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a part of ``tokenizer.json``, with nested sequences flattened."""
    step = content.get(name)
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
    for each in step.get("normalizers") or step.get("pretokenizers") or ():
        yield from _steps({name: each}, name)


def _is_for_spaces(step: Mapping[str, Any]) -> bool:
    """Return True for a normalizer that adds a leading space, or replaces spaces by the mark that tokens use."""
    if step["type"] == "Prepend":
        return bool(step["prepend"] == SPACE)
    return step["type"] == "Replace" and bool(step["pattern"] == {"String": " "} and step["content"] == SPACE)


def _cuts_nothing(step: Mapping[str, Any], tokens: list[str]) -> bool:
    """Return True if a pretokenizer never cuts a text within what could be one token.

    Metaspace never does if it does not split words, or if no token spans a space. Nor does Gemma's split on spaces,
    since its normalizer has replaced all spaces.
    """
    if step["type"] == "Split":
        return bool(step["pattern"] == {"String": " "})
    if step["type"] != "Metaspace" or step["replacement"] != SPACE:
        return False
    return not step.get("split", True) or not any(SPACE in token[1:] for token in tokens)


def _told(step: Mapping[str, Any]) -> str:
    more = " ".join(f"{key}={value!r}" for key, value in step.items() if key != "type")
    return f"{step['type']}{more and f' ({more})'}"


def _merge_problems(source: SourceTokenizer, ranks: Mapping[str, int], merges: set[tuple[str, str]]) -> Iterator[str]:
    """Yield a problem if the runtime would merge two tokens that the tokenizer does not merge.

    A token is tried only if some split of it into two tokens is no merge. A vocabulary converted from SentencePiece
    has every merge, so that none needs to be tried.
    """
    vocabulary = source.content["model"]["vocab"]
    cut = source.tokenizer.backend_tokenizer.model.tokenize
    wrong = []
    for piece in ranks:
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if any(a in vocabulary and b in vocabulary and (a, b) not in merges for a, b in splits):
            ours = [token.value for token in cut(piece)]
            if ours != (theirs := _merged(piece, vocabulary, ranks)):
                wrong.append(f"the tokenizer splits {piece!r} into {ours}, the runtime into {theirs}")
    if wrong:
        yield f"missing merges: {len(wrong)} pieces are split differently ({wrong[0]})"


def _merged(text: str, vocabulary: Mapping[str, int], ranks: Mapping[str, int]) -> list[str]:
    """Return the runtime's cut of a text: it merges the best pair of neighbours first, the leftmost if two are
    equal.
    """
    parts = list(text)
    worst = len(ranks)
    while True:
        found = [(ranks.get(a + b, worst), at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in vocabulary]
        if not found:
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
