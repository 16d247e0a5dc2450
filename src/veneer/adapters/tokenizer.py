"""Loads the tokenizer that training saves with an adapter, and chooses between it and the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from veneer.errors import FormatError

TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER_CONFIG, "tokenizer.json", _TEMPLATE)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in an adapter's folder. Raises FormatError if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"the tokenizer in the adapter's folder {folder} cannot be read: {reason}. Save it again, or remove "
            f"{', '.join(TOKENIZER_FILES)} there to use the base's"
        ) from error


def template_in(folder: Path) -> str | None:
    """Return the chat template that is a separate file in an adapter's folder, or None if there is no such file.

    Raises FormatError if it cannot be read.
    """
    path = folder / _TEMPLATE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"the chat template {path} cannot be read: {error}. Save it again, or remove it to use the base's"
        ) from error


def larger(base: Any, own: Any) -> Any:
    """Return the adapter's ``own`` tokenizer if it has more tokens than the base's, and otherwise the base's.

    In the second case the base's tokenizer gets the chat template and the end token of ``own``.
    """
    return own if len(own) > len(base) else base
