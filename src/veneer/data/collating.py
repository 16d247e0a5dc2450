"""Batches of token ids: padded rows, or packed rows in a layout that the model computes exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.data.encoding import IGNORED
from veneer.data.task_column import TASK
from veneer.errors import ConfigError, DataError

Layout = Literal["positions", "flat", "padded"]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Collator of examples into batches with ``input_ids``, ``labels`` and, if packed, ``seq_lengths``.

    ``layout`` is the form of packed rows. ``"positions"`` keeps each row and restarts its positions at every sequence;
    transformers derives a block-diagonal mask from that. ``"flat"`` concatenates all rows, as the variable-length flash
    kernels require. ``"padded"`` unpacks them into padded rows. ``padding_free`` packs the unpacked examples of a
    batch. Packed batches have no attention mask, so that transformers reads the positions. If examples have
    ``task_ids``, the batch has them too, (b,), and the examples cannot be packed. Raises DataError if only some
    examples of a batch have them.
    """

    pad_token_id: int
    layout: Layout = "positions"
    padding_free: bool = False
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels`` (-100 for untrained tokens), ``attention_mask`` or ``position_ids``,
        (b, n).
        """
        packed = "seq_lengths" in examples[0] or self.padding_free
        tasks = [example[TASK] for example in examples if example.get(TASK) is not None]
        if tasks:
            return self._with_tasks(examples, tasks, packed)
        rows = [_Row.of(example) for example in examples]
        if packed and self.layout != "padded":
            together = self.layout == "flat" or self.padding_free
            return self._packed([_Row.joined(rows)] if together else rows)
        return self._padded([piece for row in rows for piece in row.pieces()] if packed else rows)

    def _with_tasks(
        self, examples: Sequence[Mapping[str, Any]], tasks: Sequence[int], packed: bool
    ) -> dict[str, Tensor]:
        if packed:
            raise ConfigError(
                f"rows of different tasks ({TASK}) cannot be packed: switch packing, eval_packing and padding_free off"
            )
        if len(tasks) != len(examples):
            raise DataError(f"{len(tasks)} of the {len(examples)} rows of a batch have {TASK}: give every row its own")
        return {**self._padded([_Row.of(example) for example in examples]), TASK: torch.tensor(tasks)}

    def _padded(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        batch = self._tokens(rows)
        lengths = torch.tensor([len(row.ids) for row in rows])
        mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        return {**batch, "attention_mask": mask.long()}

    def _packed(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        batch = self._tokens(rows)
        width = batch["input_ids"].shape[1]
        # Padding counts as one more sequence: it sees itself only, and no softmax runs over nothing.
        lengths = [[*row.lengths, width - len(row.ids)] for row in rows]
        positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
        return {**batch, "position_ids": torch.stack(positions)}

    def _tokens(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        ids = [row.ids + [self.pad_token_id] * (width - len(row.ids)) for row in rows]
        labels = [row.first_ignored() + [IGNORED] * (width - len(row.ids)) for row in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    labels: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, example: Mapping[str, Any]) -> _Row:
        ids = list(example["input_ids"])
        return cls(ids, list(example.get("labels", ids)), list(example.get("seq_lengths", [len(ids)])))

    @classmethod
    def joined(cls, rows: Sequence[_Row]) -> _Row:
        return cls(
            [token for row in rows for token in row.ids],
            [label for row in rows for label in row.labels],
            [length for row in rows for length in row.lengths],
        )

    def pieces(self) -> list[_Row]:
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        return [
            _Row(self.ids[s : s + n], self.labels[s : s + n], [n]) for s, n in zip(starts, self.lengths, strict=True)
        ]

    def first_ignored(self) -> list[int]:
        """Return the labels, with the first label of each sequence ignored, because no token of the sequence precedes
        it.
        """
        labels = list(self.labels)
        start = 0
        for length in self.lengths:
            if length:
                labels[start] = IGNORED
            start += length
        return labels
