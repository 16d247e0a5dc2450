"""Builds the command that queries a trained model in the form of its rows: plain text or a chat, with a
system message.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.data.files import numbered_rows
from veneer.data.preference import PreferenceReader
from veneer.data.reader import RowReader
from veneer.errors import VeneerError
from veneer.recipe.parts import DataPart
from veneer.recipe.readers import preference_reader, readers_of
from veneer.recipe.tasks import OF_ANSWERS, Task

_MOST_READ = 1000  # rows from the front of the file
_MOST_SHOWN = 160  # characters of a system message in a command


def ask_command(what: str, data: DataPart, task: Task) -> str:
    """Return the command that queries ``what``, a model or an adapter, with its options, quoted for a shell."""
    if is_plain(data, task):
        return f"veneer generate {what} --raw -p TEXT"
    return f"veneer chat {what}{_system_option(data, task)}"


def long_system(data: DataPart, task: Task) -> str | None:
    """Return a hint about the rows' system message if all rows share one that is too long for a command; else None."""
    found = _systems(data, task)
    if len(found) != 1 or _is_short(*found):
        return None
    place = "data.system" if data.system is not None else data.train
    return f"its rows were asked with the system message of {place}: give it with --system, or answers will differ"


def is_plain(data: DataPart, task: Task) -> bool:
    """Return True if a run trains on plain text: neither ``data.chat`` nor the first row makes a conversation."""
    return not data.chat and not isinstance(next(_asked(data, task), []), list)


def _system_option(data: DataPart, task: Task) -> str:
    found = _systems(data, task)
    if None in found or not found:
        return ""
    (first, *others) = found
    return " --system TEXT" if others or not _is_short(first) else f" --system {shlex.quote(str(first))}"


def _is_short(system: str | None) -> bool:
    return system is None or (len(system) <= _MOST_SHOWN and system.isprintable())


def _systems(data: DataPart, task: Task) -> set[str | None]:
    """Return the different system messages of the rows' conversations. None is among them if a row has no system
    message.
    """
    firsts = (turns[0] for turns in _asked(data, task) if isinstance(turns, list) and turns)
    return {turn["content"] if turn["role"] == "system" else None for turn in firsts}


def _asked(data: DataPart, task: Task) -> Iterator[Any]:
    """Yield the question of each row of a file: the turns of a chat, or a text.

    Stop at a row that cannot be read. Yield nothing if the rows come from the hub.
    """
    if not Path(data.train).is_file():
        return
    most = min(data.limit or _MOST_READ, _MOST_READ)
    reader: RowReader | PreferenceReader = readers_of(data)[0] if task in OF_ANSWERS else preference_reader(data, task)
    with suppress(VeneerError, OSError):
        for _, row in itertools.islice(numbered_rows(Path(data.train), []), most):
            read = reader.read(row, reader.form(row))
            yield read.get("messages", read.get("prompt", read.get("chosen")))
