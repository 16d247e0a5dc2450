"""Rows of data as questions with their right answers, for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from veneer.data.asked_rows import answers_in, no_answer
from veneer.data.chat import common_prefix, render
from veneer.data.column_templates import fill_template
from veneer.errors import ConfigError, DataError

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """Question with its right answers. ``prompt`` holds the token ids; ``text`` is the prompt as plain text, or None
    for a chat.

    Any of ``answers`` is right. The first is the one in training data, white space included.
    """

    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class QuestionReader:
    r"""Reader of rows in the forms of training data: messages (the last turn is the answer), or prompt and completion.

    ``prompt`` makes a plain-text prompt from the fields of any row (``"Review: {text}\nSentiment:"``). With ``chat`` it
    becomes a user's turn, after the message ``system`` if there is one. ``answer_field`` names the field with the right
    answer, or a list of them; by default the row's own answer.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: str | None = None
    answer_field: str | None = None
    chat: bool = False
    system: str | None = None

    def read(self, rows: Iterable[Row]) -> list[Question]:
        """Return the questions. Raises DataError that names the row."""
        questions = []
        for number, row in enumerate(rows, 1):
            try:
                questions.append(self._question(row))
            except (DataError, ConfigError) as error:
                raise DataError(f"row {number}: {error}") from error
        if not questions:
            raise DataError("the data has no rows: give at least one")
        return questions

    def all_answers(self, rows: Iterable[Row]) -> list[str]:
        """Return the right answers of these rows, unique and sorted, without white space around them. No
        prompt is read.
        """
        found: set[str] = set()
        for number, row in enumerate(rows, 1):
            try:
                found |= {answer.strip() for answer in self._answers(row, self._own_answer(row))}
            except (DataError, ConfigError) as error:
                raise DataError(f"row {number}: {error}") from error
        return sorted(found)

    def _own_answer(self, row: Row) -> str | None:
        if self.prompt is not None or self.answer_field is not None:
            return None
        if "prompt" in row and "completion" in row:
            completion = row["completion"]
            return completion if isinstance(completion, str) else _content(completion)
        return _content(row.get("messages"))

    def _question(self, row: Row) -> Question:
        prompt, own, text = self._prompt(row)
        return Question(tuple(prompt), self._answers(row, own), text)

    def _prompt(self, row: Row) -> tuple[list[int], str | None, str | None]:
        """Return the token ids, the row's answer (or None), and the text of a plain prompt (or None)."""
        if self.prompt is not None:
            text = fill_template(self.prompt, row)
            return (self._chat(self._turns(text)), None, None) if self.chat else (self._plain(text), None, text)
        if "prompt" in row and "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                return self._plain(prompt), completion, prompt
            return self._chat(prompt), _content(completion), None
        if "messages" in row:
            answer = _content(row["messages"])
            return self._chat(row["messages"][:-1]), answer, None
        raise no_answer(row)

    def _turns(self, text: str) -> list[Row]:
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": text}]

    def _answers(self, row: Row, own: str | None) -> tuple[str, ...]:
        if self.answer_field is None:
            if own is None:
                raise ConfigError("a prompt template needs the field of the right answer (--answer-field)")
            return (own,)
        return answers_in(row, self.answer_field)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _chat(self, turns: Sequence[Mapping[str, Any]]) -> list[int]:
        if not turns:
            raise DataError("no turn precedes the answer, so there is no question. Begin with a user's turn")
        return render(self.tokenizer, turns, {"add_generation_prompt": True})


def continuation(tokenizer: PreTrainedTokenizerBase, question: Question, answer: str) -> tuple[list[int], int]:
    """Return the token ids of a question with an answer, and the index at which the answer begins.

    A plain text is tokenized together with its answer, as in training: the token at the boundary may differ.
    """
    if question.text is None:
        ids = [*question.prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"]]
        return ids, len(question.prompt)
    ids = list(tokenizer(question.text + answer)["input_ids"])
    return ids, common_prefix(list(question.prompt), ids)


def _content(turns: object) -> str:
    """Return the text of the last turn, which must be the assistant's."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise DataError("its last turn is not a text of the assistant: end it with the right answer")
    return str(last["content"])
