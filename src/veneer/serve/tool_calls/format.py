"""Format of calls in a model's text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from veneer.serve.tool_calls.match import Part, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Arguments that are written one by one, and not as a JSON object.

    ``first`` or ``next`` precede a name, ``middle`` precedes its value, and ``last`` follows the last value. A call
    without arguments has ``none`` instead.
    """

    first: str
    middle: str
    next: str
    last: str
    none: str

    @property
    def end(self) -> str:
        """Return the text that ends every value."""
        return self.last.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """Calls of one answer: ``before`` ARGUMENTS (``between`` ARGUMENTS)* ``after``; names precede their arguments.

    ``between`` is None if an answer has one call at most. ``fields`` is None if arguments are a JSON object, whose
    ``separators`` of items and keys are those of `json.dumps`, or None if they are others.
    ``added``: the ids of tokens that the tokenizer keeps whole, by their text, as far as literals contain them.
    ``special`` are those of them that are special tokens, and so no part of an answer's text otherwise; ``hidden`` are
    the other special tokens then. ``content`` and ``as_text`` tell how the template reads calls that were made: the
    content beside them if there is none, and arguments as text instead of a mapping.
    """

    before: Parts
    between: Parts | None
    after: Parts
    fields: Fields | None = None
    separators: tuple[str, str] | None = (", ", ": ")
    added: Mapping[str, int] = field(default_factory=dict)
    special: Collection[str] = ()
    hidden: Collection[str] = ()
    content: str | None = ""
    as_text: bool = False

    @property
    def skips(self) -> bool:
        """Return True if special tokens are part of calls."""
        return bool(self.special)

    @property
    def literals(self) -> list[str]:
        """Return all literals."""
        fields = [] if self.fields is None else [self.fields.first, self.fields.middle, self.fields.next]
        last = [] if self.fields is None else [self.fields.last, self.fields.none]
        return [p for p in (*self.before, *(self.between or ()), *self.after, *fields, *last) if isinstance(p, str)]


def joined(*parts: Part) -> Parts:
    """Return parts with neighbouring literals in one."""
    made: list[Part] = []
    for part in parts:
        if isinstance(part, str) and made and isinstance(made[-1], str):
            made[-1] += part
        elif part != "":
            made.append(part)
    return tuple(made)
