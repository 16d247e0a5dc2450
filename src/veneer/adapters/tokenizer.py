"""Tokenizer that training saves with an adapter, and the choice between it and the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from veneer.errors import FormatError

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_CONFIG, "tokenizer.json", "chat_template.jinja")


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


def larger(base: Any, own: Any) -> Any:
    """Return the adapter's ``own`` tokenizer if it has more tokens than the base's, and otherwise the base's.

    Only its chat template and its end token are then used.
    """
    return own if len(own) > len(base) else base
