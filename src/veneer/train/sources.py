"""Sources of training rows in a recipe, each with its settings of reading."""

from __future__ import annotations

from pathlib import Path

from veneer.data.files import numbered_rows
from veneer.data.named_files import names_a_file
from veneer.data.rows import RowReader, load_rows
from veneer.data.sources import Source
from veneer.errors import ConfigError, DataError
from veneer.recipe.parts import DataPart


def sources_of(part: DataPart) -> list[Source]:
    """Return ``data.train`` and the sources of ``data.more``. Raises ConfigError if weight and count are both given."""
    own = RowReader(prompt=part.prompt, completion=part.completion, chat=part.chat, system=part.system)
    found = [Source(name=part.train, reader=own)]
    for each in part.more:
        templates = (part.prompt, part.completion) if each.prompt is None else (each.prompt, each.completion)
        reader = RowReader(
            prompt=templates[0],
            completion=templates[1],
            chat=part.chat if each.chat is None else each.chat,
            system=part.system if each.system is None else each.system,
        )
        found.append(Source(name=each.source, reader=reader, weight=each.weight, count=each.count))
    return found


def require_readable(part: DataPart) -> None:
    """Raise DataError with the unusable rows of a file that holds none or begins with one. The hub is not asked."""
    sources = sources_of(part)
    files = [(source, part.limit) for source in sources]
    files += [] if part.eval is None else [(Source(name=part.eval, reader=sources[0].reader), part.eval_limit)]
    for source, limit in files:
        if names_a_file(source.name) and not _begins_well(source):
            load_rows(source.name, source.reader, limit)


def _begins_well(source: Source) -> bool:
    """True if the first row of a file can be read."""
    problems: list[str] = []
    try:
        for _, row in numbered_rows(Path(source.name), problems):
            source.reader.read(row, source.reader.form(row))
            return not problems
    except (ConfigError, DataError):
        pass
    return False
