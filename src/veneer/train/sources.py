"""Sources of training rows in a recipe, each with its settings of reading."""

from __future__ import annotations

from veneer.data.rows import RowReader
from veneer.data.sources import Source
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
