"""Cache of tokenized rows, keyed by their sources. Any number of processes may use it at once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from veneer.data.encoding import Encoder
from veneer.disk.cache import cache_dir
from veneer.disk.folder import build_once
from veneer.errors import DiskError

FOLDER = "encoded"
FEWEST_ROWS = 1000  # fewer are tokenized in the time that a look takes
_KEPT = 24  # sets
_FORMAT = 2  # goes up when the same rows would be encoded otherwise
_DONE = "dataset_info.json"


def encoded_once(rows: Dataset, encoder: Encoder, encode: Callable[[], Dataset]) -> Dataset:
    """Return the rows encoded by ``encode``, or its cached result for the same rows, mapped from disk.

    Nothing is cached for small sets of rows, for tokenizers whose description is incomplete, or if the cache cannot be
    written.
    """
    key = _key(rows, encoder) if len(rows) >= FEWEST_ROWS else None
    if key is None:
        return encode()
    target = cache_dir() / FOLDER / key
    made: list[Dataset] = []

    def build(scratch: Path) -> None:
        made.append(encode())
        made[0].save_to_disk(str(scratch))

    try:
        build_once(target, lambda folder: (folder / _DONE).is_file(), build, lambda: None)
    except DiskError:
        return made[0] if made else encode()
    _drop_oldest(target)
    return made[0] if made else load_from_disk(str(target))


def _key(rows: Dataset, encoder: Encoder) -> str | None:
    """Return a hash of the rows, the tokenizer and the settings, or None if the tokenizer has no
    complete description.
    """
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings: dict[str, Any] = {name: value for name, value in vars(encoder).items() if name != "tokenizer"}
    state = hashlib.blake2b(digest_size=16)
    about = [_FORMAT, settings, encoder.tokenizer.chat_template, encoder.tokenizer.special_tokens_map, backend.to_str()]
    state.update(json.dumps(about, sort_keys=True, default=str).encode())
    for row in rows:
        state.update(json.dumps(row, sort_keys=True, default=str).encode())
    return state.hexdigest()


def _drop_oldest(newest: Path) -> None:
    """Mark the tokenized rows at ``newest`` as just used, and delete all but the most recently used cached sets of
    rows. A process that has mapped a deleted set can still read it.
    """
    with suppress(OSError):
        newest.touch()
        others = [each for each in newest.parent.iterdir() if each.is_dir() and not each.name.startswith(".")]
        for each in sorted(others, key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(each, ignore_errors=True)
