"""Encoding of a row into token ids and labels. Trained tokens are found by position, never by their id."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from veneer.data.chat import assistant_mask, common_prefix, render
from veneer.data.task_column import TASK, task_of
from veneer.errors import DataError

IGNORED = -100
Kind = Literal["tokens", "prompt-completion", "messages", "text"]
Encoded = dict[str, Any]


def kind_of(columns: Sequence[str], text_field: str) -> Kind:
    """Return the kind of rows with these columns. Raises DataError if they have no known form."""
    if "input_ids" in columns:
        return "tokens"
    if "prompt" in columns and "completion" in columns:
        return "prompt-completion"
    if "messages" in columns:
        return "messages"
    if text_field in columns:
        return "text"
    raise DataError(
        f"the data has the columns {sorted(columns)}, which have no known form. Give messages (a chat), prompt and "
        f"completion, {text_field} (plain text; dataset_text_field names the column), or input_ids"
    )


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encoder of rows of one kind, called with a row and its number, as `datasets.map` does.

    ``completion_only`` trains only the completion, ``assistant_only`` only the assistant's turns; otherwise every token
    is trained. A ``labels`` column with ``input_ids`` is used unchanged. The first label of a row is always ignored,
    since nothing precedes it. Longer rows are cut to ``max_length`` at their end, or at their start if ``keep_end``. A
    column ``task_ids`` is kept.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    text_field: str = "text"
    completion_only: bool = False
    assistant_only: bool = False
    max_length: int | None = None
    keep_end: bool = False

    def __call__(self, row: Mapping[str, Any], index: int) -> Encoded:
        """Return ``input_ids`` and ``labels`` of a row. Raises DataError, naming the row, if it is of another kind."""
        try:
            ids, trained = self._read(row)
            task = task_of(row)
        except DataError as error:
            raise DataError(f"row {index}: {error}") from error
        targets = _targets(row) if self.kind == "tokens" else ids
        labels = [target if on else IGNORED for target, on in zip(targets, trained, strict=True)]
        if self.max_length is not None:
            part = slice(-self.max_length, None) if self.keep_end else slice(self.max_length)
            ids, labels = ids[part], labels[part]
        encoded = {"input_ids": ids, "labels": [IGNORED, *labels[1:]] if labels else []}
        return encoded | task

    def unread(self, columns: Sequence[str]) -> list[str]:
        """Return the columns that nothing reads. Those that a tokenizer adds are not counted."""
        read = {
            "tokens": ("input_ids", "labels", "assistant_masks", "completion_mask", "attention_mask", "token_type_ids"),
            "prompt-completion": ("prompt", "completion", "tools", "chat_template_kwargs"),
            "messages": ("messages", "tools", "chat_template_kwargs"),
            "text": (self.text_field,),
        }[self.kind]
        return [column for column in columns if column not in (*read, TASK)]

    def _read(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        readers: dict[Kind, Callable[[Mapping[str, Any]], tuple[list[int], list[bool]]]] = {
            "tokens": self._tokens,
            "prompt-completion": self._prompt_completion,
            "messages": self._messages,
            "text": self._text,
        }
        return readers[self.kind](row)

    def _tokens(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        ids = list(row["input_ids"])
        trained = [label != IGNORED for label in _targets(row)]
        masks = [row.get("assistant_masks"), row.get("completion_mask") if self.completion_only else None]
        if any(other is not None and len(other) != len(ids) for other in [trained, *masks]):
            raise DataError(f"labels and masks must be as long as input_ids ({len(ids)})")
        for mask in masks:
            trained = trained if mask is None else [a and bool(b) for a, b in zip(trained, mask, strict=True)]
        return ids, trained

    def _text(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        ids = self._with_end(self._plain(_string(row, self.text_field)))
        return ids, [True] * len(ids)

    def _messages(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        messages, options = _conversation(row, "messages"), _options(row)
        if self.assistant_only:
            return assistant_mask(self.tokenizer, messages, options)
        ids = render(self.tokenizer, messages, options)
        return ids, [True] * len(ids)

    def _prompt_completion(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            prompt = self._plain(row["prompt"])
            ids = self._with_end(self._plain(row["prompt"] + row["completion"]))
            trained = [True] * len(ids)
        else:
            turns, answer, options = _conversation(row, "prompt"), _conversation(row, "completion"), _options(row)
            prompt = render(self.tokenizer, turns, {**options, "add_generation_prompt": True})
            ids, trained = self._messages({**row, "messages": [*turns, *answer]})
        start = common_prefix(prompt, ids) if self.completion_only else 0
        return ids, [on and at >= start for at, on in enumerate(trained)]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _targets(row: Mapping[str, Any]) -> list[int]:
    """Return the labels of a tokenized row before masking: its own labels if it has them, or else its tokens."""
    return list(row["input_ids"] if row.get("labels") is None else row["labels"])


def _string(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"column {column!r} must be a string, not {type(value).__name__}")
    return value


def _conversation(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"column {column!r} must be a list of messages that is not empty, not {turns!r:.60}")
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise DataError(f"column {column!r} must hold messages with a role and a content, not {turn!r:.60}")
    return [_own_keys(turn) for turn in turns]


def _own_keys(value: Any) -> Any:
    """Return a value without the keys whose value is None, at any depth.

    A table of rows adds such keys: it gives every message, and every tool call's arguments, all keys that occur in any
    row. Templates must not see them.
    """
    if isinstance(value, Mapping):
        return {key: _own_keys(held) for key, held in value.items() if held is not None}
    return [_own_keys(held) for held in value] if isinstance(value, list) else value


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    settings = _held(row, "chat_template_kwargs") or {}
    if not isinstance(settings, Mapping):
        raise DataError(f"column 'chat_template_kwargs' must hold names and values, not {settings!r:.60}")
    return {"tools": _held(row, "tools"), **settings}


def _held(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value. If its keys differ between rows, it is stored as JSON text, which is parsed here."""
    value = row.get(column)
    try:
        return _own_keys(json.loads(value) if isinstance(value, str) else value)
    except ValueError as error:
        raise DataError(
            f"column {column!r} is a string that is not JSON: {value!r:.60}. Give an object, or its JSON"
        ) from error
