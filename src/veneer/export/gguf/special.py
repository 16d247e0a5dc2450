"""Special tokens of a GGUF file: their ids, the tokens before a text, the end of a turn, the chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf import GGUFValueType

from veneer.errors import FormatError
from veneer.export.gguf.tokenizer import PROBE, SourceTokenizer, probe_chat
from veneer.export.gguf.tokens import PREFIX, is_byte_level
from veneer.store.gguf.keys import KeyValue

_IDS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "separator", "pad": "padding", "cls": "cls", "mask": "mask",
}  # fmt: skip


def special_pairs(source: SourceTokenizer, config: Any) -> list[KeyValue]:
    """Return ids, flags and templates as metadata pairs. If the tokenizer does not name a token's id, the id is that in
    ``config``.

    Raises FormatError for a template that does not render, and for tokens around a text that no flag can express.
    """
    ids = {name: found for name in _IDS if (found := _id(source, config, name)) is not None}
    pairs = [_number(f"{_IDS[name]}_token_id", value) for name, value in ids.items()]
    if source.template is not None:
        end = end_of_turn(source)
        if end is not None and end != ids.get("eos"):
            pairs.append(_number("eot_token_id", end))
    pairs += _flags(source, ids.get("bos"), ids.get("eos"))
    return [*pairs, *_templates(source)]


def end_of_turn(source: SourceTokenizer) -> int | None:
    """Return the id of the special token that follows an answer in the chat template; None if text follows.

    Raises FormatError if the template does not render.
    """
    text = source.rendered(probe_chat())
    _, found, behind = text.partition(PROBE[1])
    if not found:
        raise FormatError(
            f"the chat template in {source.folder} leaves answers out: a rendered conversation does not hold them. "
            "Correct the template"
        )
    behind = behind.partition(PROBE[2])[0].lstrip()
    special = {entry["content"]: number for number, entry in source.added.items()}
    matches = [token for token in special if behind.startswith(token)]
    return special[max(matches, key=len)] if matches else None


def _id(source: SourceTokenizer, config: Any, name: str) -> int | None:
    found = getattr(source.tokenizer, f"{name}_token_id", None)
    if found is None:
        found = getattr(config, f"{name}_token_id", None)
        found = found[0] if isinstance(found, list) else found
    return found if isinstance(found, int) and found in source.vocabulary else None


def _flags(source: SourceTokenizer, bos: int | None, eos: int | None) -> Iterator[KeyValue]:
    plain = source.tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = source.tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    front, back = whole[:at], whole[at + len(plain) :]
    if front not in ([], [bos]) or back not in ([], [eos]):
        names = [source.vocabulary.get(number) for number in (*front, *back)]
        raise FormatError(
            f"the tokenizer in {source.folder} puts {names} around a text; a GGUF file holds at most one BOS in "
            "front and one EOS at the end. Serve the model with `veneer serve`"
        )
    yield _flag("add_bos_token", bool(front))
    yield _flag("add_eos_token", bool(back))
    if not is_byte_level(source.content):
        yield _flag("add_space_prefix", source.vocabulary[plain[0]].startswith("▁"))


def _templates(source: SourceTokenizer) -> Iterator[KeyValue]:
    if source.template is not None:
        yield KeyValue("tokenizer.chat_template", source.template, GGUFValueType.STRING)
    others = source.named_templates
    if others:
        names = KeyValue("tokenizer.chat_templates", list(others), GGUFValueType.ARRAY, GGUFValueType.STRING)
        yield names
    for name, text in others.items():
        yield KeyValue(f"tokenizer.chat_template.{name}", text, GGUFValueType.STRING)


def _number(name: str, value: int) -> KeyValue:
    return KeyValue(PREFIX + name, value, GGUFValueType.UINT32)


def _flag(name: str, value: bool) -> KeyValue:
    return KeyValue(PREFIX + name, value, GGUFValueType.BOOL)
