"""Reader of rows in one of the forms for training; neither torch nor data sets are imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from veneer.data.column_templates import fields_of, fill_template
from veneer.data.files import Row, numbered_rows, raise_all, require_one_form
from veneer.data.preference import PreferenceReader
from veneer.data.task_column import TASK, task_of
from veneer.errors import ConfigError, DataError

_OF_TEMPLATES = ("tools", "chat_template_kwargs")
_ANSWERS = ("answer", "label", "response", "output", "completion", "target", "solution", "category", "summary")
_QUESTIONS = ("question", "prompt", "instruction", "text", "sentence", "input", "query", "document")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Reader of a source's rows as messages, prompt and completion, or text.

    ``prompt`` and ``completion`` are templates such as ``"Translate: {source}"`` over the columns. ``chat`` turns
    prompts and completions into user and assistant turns. ``system`` is a message added before each conversation.
    ``advice`` ends the error for columns that match no form; by default it suggests templates.
    """

    prompt: str | None = None
    completion: str | None = None
    chat: bool = False
    system: str | None = None
    advice: str | None = None

    def form(self, columns: Iterable[str]) -> str:
        """Return the form of these columns. Raises DataError if none fits."""
        names = set(columns)
        if self.prompt is not None and self.completion is not None:
            return "template"
        for form, needed in (
            ("messages", {"messages"}),
            ("messages", {"conversations"}),
            ("prompt-completion", {"prompt", "completion"}),
            ("alpaca", {"instruction", "output"}),
            ("alpaca", {"instruction", "response"}),
            ("text", {"text"}),
        ):
            if needed <= names:
                return form
        raise DataError(
            f"rows have the columns {sorted(names)}, which match none of the forms to train on: messages (or "
            "conversations), prompt and completion, instruction and output (with or without input), text. For others, "
            f"say how to read them: {self.advice or _templates_over(sorted(names))}"
        )

    def unread(self, columns: Iterable[str], form: str) -> list[str]:
        """Return the columns that nothing reads in rows of a form."""
        read = {
            "messages": {"messages", "conversations", *_OF_TEMPLATES},
            "prompt-completion": {"prompt", "completion", *_OF_TEMPLATES},
            "alpaca": {"instruction", "input", "output", "response"},
            "text": {"text"},
            "template": fields_of(self.prompt or "") | fields_of(self.completion or ""),
        }
        return [column for column in columns if column not in (*read[form], TASK)]

    def read(self, row: Mapping[str, Any], form: str) -> Row:
        """Return one row in its final form, with its task if it has one. Raises DataError if a value is missing or of
        the wrong kind.

        Raises ConfigError if ``chat`` or ``system`` is given and the row is not a conversation.
        """
        readers: dict[str, Callable[[Mapping[str, Any]], Row]] = {
            "messages": self._messages,
            "prompt-completion": self._prompt_completion,
            "alpaca": self._alpaca,
            "text": lambda row: {"text": _text(row, "text")},
            "template": self._template,
        }
        return self._checked(readers[form](row)) | task_of(row)

    def _checked(self, row: Row) -> Row:
        """Return the row. Raises ConfigError if ``chat`` or ``system`` is set but the row is not a conversation."""
        given = [name for name, value in (("chat", self.chat), ("system", self.system)) if value]
        if given and "messages" not in row:
            found = "plain text, which has no turns" if "text" in row else "prompt and completion"
            advice = "leave it out" if "text" in row else "set chat to make turns of them, or leave system out"
            raise ConfigError(f"{' and '.join(given)} is for conversations, and these rows are {found}: {advice}")
        return row

    def _messages(self, row: Mapping[str, Any]) -> Row:
        turns = row.get("messages", row.get("conversations"))
        if turns is None:
            raise DataError(f"messages are missing; the row has the fields {sorted(row)}")
        if not isinstance(turns, list) or not turns:
            raise DataError("messages must be a list that is not empty")
        return {"messages": self._with_system([_turn(turn) for turn in turns])} | _template_options(row)

    def _prompt_completion(self, row: Mapping[str, Any]) -> Row:
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._messages({**row, "messages": [*prompt, *completion]})
        return self._pair(_text(row, "prompt"), _text(row, "completion"))

    def _alpaca(self, row: Mapping[str, Any]) -> Row:
        more = row.get("input")
        prompt = _text(row, "instruction") + (f"\n\n{_text(row, 'input')}" if more else "")
        return self._pair(prompt, _text(row, "output" if "output" in row else "response"))

    def _template(self, row: Mapping[str, Any]) -> Row:
        return self._pair(fill_template(self.prompt or "", row), fill_template(self.completion or "", row))

    def _pair(self, prompt: str, completion: str) -> Row:
        if not self.chat:
            return {"prompt": prompt, "completion": completion}
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return {"messages": self._with_system(turns)}

    def _with_system(self, turns: list[Row]) -> list[Row]:
        if self.system is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": self.system}, *turns]


def _templates_over(columns: list[str]) -> str:
    """Return the advice to set ``data.prompt`` and ``data.completion``, with an example over two of the columns."""
    answer = next((name for name in _ANSWERS if name in columns), columns[-1])
    asked = [name for name in columns if name != answer]
    question = next((name for name in _QUESTIONS if name in asked), asked[0] if asked else None)
    if question is None:
        return f'data.prompt and data.completion over several columns; of {answer!r} alone make a column "text"'
    return f'data.prompt and data.completion, such as "{{{question}}}" and "{{{answer}}}"'


def form_of(row: Mapping[str, Any]) -> str:
    """Return the final form of a row: messages, prompt-completion or text, and whether it names its task."""
    form = "messages" if "messages" in row else "text" if "text" in row else "prompt-completion"
    return f"{form} with {TASK}" if TASK in row else form


class ReadRows(NamedTuple):
    """Rows of a source in the form in which they are trained, with the ``form`` and ``columns`` of the source."""

    rows: list[Row]
    form: str
    columns: list[str]


def read_rows(
    source: str | Path,
    numbered: Iterable[tuple[int, Mapping[str, Any]]],
    problems: list[str],
    reader: RowReader | PreferenceReader,
    limit: int | None = None,
) -> ReadRows:
    """Return all rows of a source, or the first ``limit``.

    ``numbered`` yields rows with their numbers, counted from one, and adds rows that it cannot read to ``problems``.
    Raises DataError that lists the unusable rows by number.
    """
    rows: list[Row] = []
    form = None
    forms: list[tuple[int, str]] = []
    columns: dict[str, None] = {}
    for number, row in numbered:
        if limit is not None and len(rows) >= limit:
            break
        form = form or form_in(source, reader, row)
        columns |= dict.fromkeys(row)
        try:
            rows.append(reader.read(row, form))
            forms.append((number, form_of(rows[-1])))
        except DataError as error:
            problems.append(f"row {number}: {error}")
    raise_all(source, problems)
    require_one_form(forms)
    if not rows:
        raise DataError(f"{source} holds no rows: give at least one")
    return ReadRows(rows, form or "", list(columns))


def require_readable(file: Path, reader: RowReader | PreferenceReader, limit: int | None = None) -> str:
    """Return the form of a file's rows.

    Raises DataError for an empty file, and for one whose first row is unusable. Raises ConfigError for a template that
    does not fit the columns. If the first row is usable, no further row is read.
    """
    problems: list[str] = []
    for _, row in numbered_rows(file, problems):
        try:
            form = reader.form(row)
            reader.read(row, form)
        except (ConfigError, DataError):
            break
        if not problems:
            return form
        break
    problems = []
    return read_rows(file, numbered_rows(file, problems), problems, reader, limit).form


def form_in(source: str | Path, reader: RowReader | PreferenceReader, row: Mapping[str, Any]) -> str:
    """Return the form of a source's rows. Raises DataError that names the source."""
    try:
        return reader.form(row)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _turn(turn: Any) -> Row:
    if not isinstance(turn, Mapping):
        raise DataError(f"a message must be an object with role and content, not {turn!r:.60}")
    if "from" in turn and "value" in turn:
        role = _SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise DataError(f"a message is from {turn['from']!r}; known: {sorted(_SHAREGPT_ROLES)}")
        return {"role": role, "content": _text(turn, "value")}
    if not isinstance(turn.get("role"), str):
        raise DataError(f"a message has no role: {dict(turn)!r:.60}. Give it a role, such as user or assistant")
    if turn.get("content") is None and "tool_calls" in turn:
        return dict(turn)
    return {**turn, "content": _text(turn, "content")}


def _template_options(row: Mapping[str, Any]) -> Row:
    """Return a row's chat-template options as JSON text. As objects in a table, each row's options would get the keys
    of all rows.
    """
    return {
        key: given if isinstance(given, str) else json.dumps(given) for key in _OF_TEMPLATES if (given := row.get(key))
    }


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be a string, not {'missing' if value is None else type(value).__name__}")
    return value
