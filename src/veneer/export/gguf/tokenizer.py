"""Tokenizer for the export, read complete from the model's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from veneer.adapters.tokenizer import template_in
from veneer.errors import FormatError

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
PROBE = ("What is seven?", "It is 8, minus 1.", "And nine?")


@dataclass(frozen=True)
class SourceTokenizer:
    """Tokenizer to export. ``tokenizer`` is transformers'; ``content`` its ``tokenizer.json``."""

    folder: Path
    tokenizer: Any
    content: Mapping[str, Any]

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """Tokens by id, added ones included."""
        found: dict[str, int] = self.tokenizer.get_vocab()
        return {number: token for token, number in found.items()}

    @cached_property
    def added(self) -> dict[int, Mapping[str, Any]]:
        """Added tokens by id, as ``tokenizer.json`` describes them."""
        return {entry["id"]: entry for entry in self.content.get("added_tokens") or ()}

    @cached_property
    def template(self) -> str | None:
        """Chat template that transformers uses; None if there is none."""
        found = self.tokenizer.chat_template
        if isinstance(found, Mapping):
            found = found.get("default")
        return found if isinstance(found, str) else None

    @property
    def named_templates(self) -> dict[str, str]:
        """Templates other than the default one, by name."""
        found = self.tokenizer.chat_template
        return {name: text for name, text in found.items() if name != "default"} if isinstance(found, Mapping) else {}

    def rendered(self, messages: Sequence[Mapping[str, str]], answer_next: bool = False) -> str:
        """Return a conversation as the template renders it. Raises FormatError if the template fails."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_next, chat_template=self.template
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise FormatError(
                f"the chat template in {self.folder} does not render a question and an answer: {error}. A runtime "
                "would fail on the first chat: correct the template, or delete it"
            ) from error
        return text


def read_tokenizer(folders: Sequence[Path]) -> SourceTokenizer:
    """Return the tokenizer of the first folder that has one, with the chat template of the first that has one.

    Raises FormatError if no folder has a tokenizer, or if it is not a fast one.
    """
    folder = next((each for each in folders if any((each / name).is_file() for name in _FILES)), None)
    if folder is None:
        names = " nor ".join(map(str, folders))
        raise FormatError(f"neither {names} holds a tokenizer (none of {list(_FILES)}): copy the base's there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}. Copy the base's there"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise FormatError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no tokenizer.json, and none can be made of "
            "it: a GGUF file holds vocabularies of merges only. Serve the model with `veneer serve`"
        )
    alone = next(filter(None, map(template_in, folders[: folders.index(folder)])), None)
    tokenizer.chat_template = alone or tokenizer.chat_template
    return SourceTokenizer(folder, tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()))


def probe_chat() -> list[dict[str, str]]:
    """Return a question, its answer and another question, all with distinct texts."""
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, PROBE, strict=True)]
