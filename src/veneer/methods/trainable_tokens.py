"""Trainable tokens: rows of the embeddings are trained, and nothing else (PEFT's method of that name)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from veneer.contract.extras import not_rows
from veneer.contract.keys import tokens_key
from veneer.contract.peft_fields import PeftFields
from veneer.contract.whole import WholeMethod


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(WholeMethod):
    """Settings of trainable tokens, with the names that PEFT gives them.

    ``token_indices`` are the rows of the tables that ``target_modules`` names; by default that is the input embeddings.
    A tied head shares the rows. ``init_weights=False`` starts from random rows, so that the start changes the model.
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    headline: ClassVar[tuple[str, ...]] = ("token_indices", "target_modules")
    default_targets: ClassVar[tuple[str, ...]] = ()
    inert: ClassVar[frozenset[str]] = frozenset({"init_weights"})
    peft_fields: ClassVar[PeftFields] = PeftFields(
        quiet=("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save")
    )

    token_indices: Collection[int] = ()
    init_weights: bool = True

    def problems(self) -> list[str]:
        return super().problems() + not_rows("token_indices", self.rows)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self.token_indices)

    @property
    def draws_rows(self) -> bool:
        return not self.init_weights

    def written_key(self, key: str) -> str:
        return tokens_key(key)
