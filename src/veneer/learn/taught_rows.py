"""Encodes rows for distillation twice: for the student, and for a teacher that reads one more prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from veneer.data.collating import Collator
from veneer.data.encoding import IGNORED, Encoded, Encoder
from veneer.errors import DataError

TEACHER = "teacher_"
COLUMNS = ("teacher_input_ids", "teacher_labels")


@dataclass(frozen=True, kw_only=True)
class TaughtEncoder(Encoder):
    """Encoder of rows for the student, with ``teacher_input_ids`` and ``teacher_labels`` for the teacher.

    ``teacher_prompt`` is put before the row's prompt; in a conversation, at the start of the system message.
    """

    teacher_prompt: str

    def __call__(self, row: Mapping[str, Any], index: int) -> Encoded:
        """Return the row encoded for student and teacher.

        Raises DataError if the row's prompt is trained too, or if its answer's tokens change after the teacher's
        prompt. Raises the errors of `Encoder`.
        """
        own, read = super().__call__(row, index), self._with_prompt(row)
        if not (self.completion_only or self.assistant_only):
            raise DataError(
                f"row {index}: its prompt would be trained too, but the teacher reads a different prompt: train "
                "answers alone (assistant_only_loss=True, completion_only_loss=True; data.train_on: answers in a "
                "recipe)"
            )
        given = {name: value for name, value in vars(self).items() if name not in ("teacher_prompt", "max_length")}
        taught = Encoder(**given)(read, index)
        labels, n = [], len(answer := [label for label in own["labels"] if label != IGNORED])
        if [label for label in taught["labels"] if label != IGNORED][:n] != answer:
            raise DataError(
                f"row {index}: its answer has different tokens after the teacher's prompt than without it: end the "
                "teacher's prompt with a line break"
            )
        for label in taught["labels"]:
            labels.append(label if n else IGNORED)  # what the student's row was cut after
            n -= label != IGNORED and n > 0
        return own | {"teacher_input_ids": taught["input_ids"], "teacher_labels": labels}

    def _with_prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row with the teacher's prompt in front. Raises DataError for a row without a prompt."""
        column = {"prompt-completion": "prompt", "messages": "messages"}.get(self.kind)
        if column is None:
            raise DataError("distillation needs rows with messages, or with prompt and completion")
        given = row[column]
        if not self.teacher_prompt:
            return dict(row)
        if isinstance(given, str):
            return {**row, column: self.teacher_prompt + given}
        first, text = given[0], self.teacher_prompt
        if first["role"] == "system":
            turn = {**first, "content": f"{text}\n\n{first['content']}"}
            return {**row, column: [turn, *given[1:]]}
        return {**row, column: [{"role": "system", "content": text}, *given]}


@dataclass(frozen=True)
class TaughtCollator:
    """Collator that pads the student's rows and the teacher's. Names of the teacher's tensors begin with
    ``teacher_``.
    """

    collator: Collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the student's batch and the teacher's in one mapping, each padded to its own length."""
        taught = [{name.removeprefix(TEACHER): each[name] for name in COLUMNS} for each in examples]
        return {
            **self.collator(examples),
            **{f"{TEACHER}{name}": value for name, value in self.collator(taught).items()},
        }


def prompts_in(ids: Tensor, labels: Tensor) -> list[list[int]]:
    """Return, for each row of ``ids`` (b, t), the tokens before its last answer. ``labels`` mark the answers."""
    found = []
    for row, trained in zip(ids, labels != IGNORED, strict=True):
        on = [*trained.tolist(), False]
        starts = [at for at in range(len(row)) if on[at] and not on[at - 1]]
        found.append(row[: starts[-1] if starts else 0].tolist())
    return found


def answered(prompt: Sequence[int], taught: Sequence[int], answer: Sequence[int]) -> dict[str, list[int]]:
    """Return the student's prompt and the teacher's prompt ``taught``, each followed by the answer, as one row."""
    return {
        "input_ids": [*prompt, *answer],
        "labels": [*([IGNORED] * len(prompt)), *answer],
        "teacher_input_ids": [*taught, *answer],
        "teacher_labels": [*([IGNORED] * len(taught)), *answer],
    }
