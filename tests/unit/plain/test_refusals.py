"""Words for pydantic's errors: those of the common kinds are the house's, all others pydantic's own."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from veneer.plain.refusals import allowed, unfit


class Kind(Enum):
    A = "a"
    B = "b"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int


@pytest.mark.parametrize(
    ("hint", "value", "words"),
    [
        (int, "twelve", "must be a whole number"),
        (int, 1.5, "must be a whole number"),
        (int | None, [], "must be a whole number"),
        (float, "much", "must be a number"),
        (Annotated[float, Field(allow_inf_nan=False)], float("inf"), "must be a finite number"),
        (bool, "maybe", "must be true or false"),
        (str, 3, "must be text"),
        (Part, {1: 3, "size": 3}, "must be text"),
        (list[int], 3, "must be a list"),
        (dict[str, int], 3, "must be an object (keys with values)"),
        (Part, [1], "must be an object (keys with values)"),
        (Part, {}, "is missing"),
        (Part, {"size": 3, "sise": 3}, "is unknown"),
        (Literal["a", "b"], "c", "must be 'a' or 'b'"),
        (Kind, "c", "must be 'a' or 'b'"),
        (Annotated[int, Field(ge=2)], 1, "must be at least 2"),
        (Annotated[int, Field(gt=2)], 2, "must be more than 2"),
        (Annotated[float, Field(le=2)], 3, "must be at most 2.0"),
        (Annotated[float, Field(lt=2)], 3, "must be less than 2.0"),
        (Annotated[str, Field(min_length=1)], "", "must be text of at least 1 character"),
        (Annotated[str, Field(max_length=1100)], "x" * 1101, "must be text of at most 1,100 characters"),
        (Annotated[list[int], Field(min_length=1)], [], "must be a list of at least 1 entry"),
        (Annotated[list[int], Field(max_length=2)], [1, 2, 3], "must be a list of at most 2 entries"),
        (bool | Literal["selective"], "maybe", "must be true or false or 'selective'"),
        (Annotated[str, Field(pattern="^a$")], "b", "String should match pattern '^a$'"),
    ],
)
def test_of_every_kind(hint: Any, value: object, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(hint).validate_python(value)
    assert allowed(refused.value.errors()) == words


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "'b' does not fit: it must be a whole number"),
        (Annotated[str, Field(pattern="^a$")], "'b' does not fit (String should match pattern '^a$')"),
    ],
)
def test_of_a_value(hint: Any, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(hint).validate_python("b")
    assert unfit("b", refused.value.errors()) == words
