"""Format of calls in a model's text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from veneer.serve.tool_calls.match import Part, Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Literals around arguments that are written one by one, not as a JSON object.

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
    """Format of an answer's calls: ``before`` ARGUMENTS (``between`` ARGUMENTS)* ``after``, with the names in the
    literals.

    ``between`` is None if an answer has at most one call. ``fields`` is None if arguments are a JSON object. Its
    ``separators`` are then those of `json.dumps`, or None if the template uses others. ``added`` are the ids of the
    tokenizer's added tokens that literals contain, by text. ``special`` are the special ones among them, which would
    otherwise be left out of an answer's text. ``hidden`` are all other special tokens, if there are any ``special``
    ones. For earlier calls in a conversation, ``content`` replaces missing content, and ``as_text`` is True if the
    template takes arguments as text, not as a mapping.
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
    """Return parts with adjacent literals joined."""
    made: list[Part] = []
    for part in parts:
        if isinstance(part, str) and made and isinstance(made[-1], str):
            made[-1] += part
        elif part != "":
            made.append(part)
    return tuple(made)
