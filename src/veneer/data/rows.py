"""Rows of data from a file or the hub, converted into one of the forms for training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from veneer.data.encoding import TASK, task_of
from veneer.data.files import Row, numbered_rows, raise_all, require_one_form
from veneer.data.named_files import names_a_file
from veneer.data.preference import PreferenceReader
from veneer.data.templates import fields_of, fill_template
from veneer.data.unused import tell_unused
from veneer.errors import ConfigError, DataError

_OF_TEMPLATES = ("tools", "chat_template_kwargs")
FORMS = ("messages", "prompt-completion", "text", "alpaca", "template")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Reader of a source's rows as messages, prompt and completion, or text.

    ``prompt`` and ``completion`` are templates such as ``"Translate: {source}"`` over the columns. ``chat`` turns
    prompts and completions into user and assistant turns. ``system`` is a message added before each conversation.
    ``advice`` ends the error for columns that have none of the forms.
    """

    prompt: str | None = None
    completion: str | None = None
    chat: bool = False
    system: str | None = None
    advice: str = 'data.prompt and data.completion, such as "Question: {question}" and "{answer}"'

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
            f"rows have the columns {sorted(names)}, none of the forms that can be trained on: messages (or "
            "conversations), prompt and completion, instruction and output (with or without input), text. For others, "
            f"say how to read them: {self.advice}"
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
        """The row. Raises ConfigError where it is no chat and a setting was given that only chats have."""
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


def form_of(row: Mapping[str, Any]) -> str:
    """Return the final form of a row: messages, prompt-completion or text, and whether it names its task."""
    form = "messages" if "messages" in row else "text" if "text" in row else "prompt-completion"
    return f"{form} with {TASK}" if TASK in row else form


def load_rows(source: str | Path, reader: RowReader | PreferenceReader, limit: int | None = None) -> Dataset:
    """Load all rows of a source (or the first ``limit``).

    ``source``: a .jsonl, .json (a list of objects) or .parquet file, or a hub id, ``name`` or ``name:split``. Raises
    DataError that lists the unusable rows by number, counted from one.
    """
    rows: list[Row] = []
    problems: list[str] = []
    form = None
    forms: list[tuple[int, str]] = []
    columns: dict[str, None] = {}
    for number, row in _numbered(source, problems):
        if limit is not None and len(rows) >= limit:
            break
        form = form or _form_in(source, reader, row)
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
    tell_unused(str(source), reader.unread(columns, form or ""), _advice(form or ""))
    keys = dict.fromkeys(key for row in rows for key in row)  # Dataset reads those of the first row alone
    return Dataset.from_list([{key: row.get(key) for key in keys} for row in rows])


def _form_in(source: str | Path, reader: RowReader | PreferenceReader, row: Mapping[str, Any]) -> str:
    """The form of a source's rows. Raises DataError that names the source."""
    try:
        return reader.form(row)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _advice(form: str) -> str:
    """The end of the warning of unused columns."""
    if form != "text":
        return ""
    return ". The rows are plain text (the column text); data.prompt and data.completion name other columns"


def stream_rows(source: str | Path, reader: RowReader) -> IterableDataset:
    """Yield the rows of `load_rows` one by one, for sets larger than memory. The first unusable row raises.

    Rows come in the order of the source, which is read again for each epoch. Raises DataError if it has none.
    """
    streamed = IterableDataset.from_generator(_read_one_by_one, gen_kwargs={"source": str(source), "reader": reader})
    if next(iter(streamed), None) is None:
        raise DataError(f"{source} holds no rows: give at least one")
    _, first = next(_numbered(source, [], streaming=True))
    form = _form_in(source, reader, first)
    tell_unused(str(source), reader.unread(first, form), _advice(form))
    return streamed


def _read_one_by_one(source: str, reader: RowReader) -> Iterator[Row]:
    problems: list[str] = []
    rows = _numbered(source, problems, streaming=True)
    form = final = None
    for number, row in rows:
        raise_all(source, problems)
        form = form or _form_in(source, reader, row)
        try:
            read = reader.read(row, form)
        except DataError as error:
            raise DataError(f"{source}: row {number}: {error}") from error
        final = final or form_of(read)
        if form_of(read) != final:
            raise DataError(
                f"{source}: row {number} is of the form {form_of(read)}, and those before it {final}: bring all rows "
                "into one form"
            )
        yield read
    raise_all(source, problems)


def split_off(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return training rows and held-out rows, drawn by seed. Raises DataError if one of the two would be empty."""
    n_held_out = round(fraction * len(rows))
    if not 0 < n_held_out < len(rows):
        raise DataError(
            f"a fraction of {fraction} of {len(rows)} rows leaves no rows to train on, or none to evaluate on: choose "
            "another, or give more rows"
        )
    parts = rows.train_test_split(test_size=n_held_out, seed=seed)
    return parts["train"], parts["test"]


def _numbered(
    source: str | Path, problems: list[str], *, streaming: bool = False
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    path = Path(source)
    if names_a_file(source):
        yield from numbered_rows(path, problems)
    else:
        yield from enumerate(_from_hub(str(source), streaming), start=1)


def _from_hub(source: str, streaming: bool) -> Iterable[Row]:
    name, _, split = source.partition(":")
    try:
        return cast("Iterable[Row]", load_dataset(name, split=split or "train", streaming=streaming))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{source!r} is no file, and no data set of that name could be loaded from the hub ({error}). Give a "
            "file, or a data set's name"
        ) from error


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
    """The options of a row for its chat template, as JSON: a table would give every row the keys of all of them."""
    return {
        key: given if isinstance(given, str) else json.dumps(given) for key in _OF_TEMPLATES if (given := row.get(key))
    }


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be a string, not {'missing' if value is None else type(value).__name__}")
    return value
