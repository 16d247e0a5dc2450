"""Chat template in Go's language, for Ollama, derived from the model's template by rendering marked messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from veneer.errors import FormatError

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages], str]
_SYSTEM, _USER, _ANSWER, _NEXT = "Xsystem0X", "Xuser1X", "Xanswer2X", "Xuser3X"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    """Texts that a chat template puts around messages.

    ``opening`` starts a conversation without a system message. ``system``, ``user`` and ``answer`` are the texts before
    and after a message of this role; ``system`` is None if the template takes no system message. ``prompt`` precedes
    the answer to come. If ``system_in_user``, a system message goes into the first user's turn, before its text.
    """

    opening: str
    system: tuple[str, str] | None
    system_in_user: bool
    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str

    def rendered(self, messages: Messages) -> str:
        """Return a conversation that ends with a question, followed by the prompt for its answer."""
        system = next((each["content"] for each in messages if each["role"] == "system"), None)
        text = self.opening if system is None or self.system_in_user else ""
        for number, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "system":
                text += "" if self.system is None or self.system_in_user else content.join(self.system)
            elif message["role"] == "assistant":
                text += content.join(self.answer)
            else:
                first = self.system_in_user and self.system and system is not None and number == 1
                inner = system.join(self.system) + content if first and self.system and system else content
                text += inner.join(self.user)
        return text + self.prompt

    def go(self) -> str:
        """Return the template in Go's language for Ollama."""
        opening = self.opening
        if opening and not self.system_in_user:
            opening = "{{ if not .System }}" + _literal(opening) + "{{ end }}"
        else:
            opening = _literal(opening)
        branches = []
        inner = ""
        if self.system is not None and self.system_in_user:
            before, behind = map(_literal, self.system)
            inner = "{{ if and $.System (eq $i 1) }}" + before + "{{ $.System }}" + behind + "{{ end }}"
        elif self.system is not None:
            branches.append(("system", *map(_literal, self.system)))
        branches.append(("user", _literal(self.user[0]) + inner, _literal(self.user[1])))
        branches.append(("assistant", *map(_literal, self.answer)))
        parts = [f'if eq .Role "{role}" }}}}{front}{{{{ .Content }}}}{back}' for role, front, back in branches]
        chain = "{{ " + "{{ else ".join(parts) + "{{ end }}"
        return opening + "{{ range $i, $m := .Messages }}" + chain + "{{ end }}" + _literal(self.prompt)


def chat_shape(render: Render) -> ChatShape | None:
    """Return the shape of the template rendered by ``render``, which ends with a prompt for an answer.

    Return None if the template does more than put texts around messages. This is checked with three more conversations,
    and with two that have a system message if the template accepts one.
    """
    turns = [_message("user", _USER), _message("assistant", _ANSWER), _message("user", _NEXT)]
    between = _split(render, turns, (_USER, _ANSWER, _NEXT))
    if between is None:
        return None
    start, middle, again, end = between
    user = _common(start[::-1], again[::-1])[::-1]
    behind_user = _common(middle, end)
    system, in_user = _system(render, turns, start, user)
    shape = ChatShape(
        opening=start.removesuffix(user),
        system=system,
        system_in_user=in_user,
        user=(user, behind_user),
        answer=(middle.removeprefix(behind_user), again.removesuffix(user)),
        prompt=end.removeprefix(behind_user),
    )
    checks = _checks(with_system=system is not None)
    return shape if all(_rendered(render, each) == shape.rendered(each) for each in checks) else None


def _system(render: Render, turns: Messages, start: str, user: str) -> tuple[tuple[str, str] | None, bool]:
    """Return the texts before and after a system message, and True if it is part of the first question."""
    found = _split(render, [_message("system", _SYSTEM), *turns], (_SYSTEM, _USER, _ANSWER, _NEXT))
    if found is None:
        return None, False
    before, behind, *_ = found
    if behind.endswith(user):
        return (before, behind.removesuffix(user)), False
    return ((before.removeprefix(start), behind), True) if before.startswith(start) else (None, False)


def _checks(with_system: bool) -> list[list[Mapping[str, str]]]:
    one = [_message("user", "How are you?")]
    three = [*one, _message("assistant", "Well, thanks:\n1. yes"), _message("user", "And 2 + 2?")]
    five = [*three, _message("assistant", "4"), _message("user", "Why")]
    system = [_message("system", "Be brief.\nBe kind.")]
    return [one, three, five, *([[*system, *one], [*system, *five]] if with_system else [])]


def _split(render: Render, messages: Messages, marks: Sequence[str]) -> list[str] | None:
    """Split a rendered conversation at the marked messages; None unless each occurs once, in order."""
    text = _rendered(render, messages)
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _rendered(render: Render, messages: Messages) -> str | None:
    try:
        return render(messages)
    except FormatError:  # Gemma's refuses system messages
        return None


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}


def _common(one: str, other: str) -> str:
    """Return the longest common prefix."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
