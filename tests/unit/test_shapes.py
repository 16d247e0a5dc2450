"""Checks of shapes: what was right before is not checked again, and all else is."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from shapes import checked, leave_unchecked

Pairs = tuple[Float[Tensor, " n"], ...] | None


def test_calls_of_other_forms_are_checked() -> None:
    calls = list[str]()

    @checked
    def scaled(x: Float[Tensor, "n d"], by: Float[Tensor, " d"], name: str = "one") -> Float[Tensor, "n d"]:
        calls.append(name)
        return torch.cat([x * by] * (len(calls) // 3 + 1))

    x, by = torch.ones(3, 5), torch.ones(5)
    assert scaled(x, by).shape == scaled(x, by=by).shape == (3, 5)
    for wrong in (torch.ones(7), torch.ones(5, dtype=torch.int64), torch.ones(5, 1), None):
        with pytest.raises(jaxtyping.TypeCheckError):
            scaled(x, wrong)
    assert calls == ["one"] * 2
    with pytest.raises(jaxtyping.TypeCheckError):  # its third result has other rows
        scaled(x, by)
    assert len(calls) == 3


def test_each_item_of_a_list_may_be_looked_at() -> None:
    @checked
    def first(xs: list[Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
        return xs[0]

    def many_times(xs: list[Tensor]) -> None:
        for _ in range(99):  # a check looks at one item, at random
            first(xs)

    many_times([torch.ones(3)] * 2)
    with pytest.raises(jaxtyping.TypeCheckError):
        many_times([torch.ones(3), torch.ones(5)])


def test_a_function_that_declares_no_array_is_left_to_mypy() -> None:
    @checked
    def told(x: Tensor, n: int) -> str:
        return f"{n} {x}"

    assert told(None, "a") == "a None"


def test_an_array_within_another_type_is_checked() -> None:
    @checked
    def last(pairs: Pairs, place: int = -1) -> Tensor:
        return pairs[place]

    last((torch.ones(3),), place=0)
    with pytest.raises(jaxtyping.TypeCheckError):
        last((torch.ones(3, 5),), place=0)


def plain(n: int) -> int:
    return n


def shaped(x: Float[Tensor, " n"]) -> Tensor:
    return x


@pytest.mark.parametrize("kind", [lambda f: f, staticmethod, classmethod, property])
def test_functions_that_declare_no_array_are_themselves_when_their_module_is_there(kind) -> None:
    class Owner:
        own, array = kind(checked(plain)), kind(checked(shaped))

    def inner(value: object) -> object:
        return getattr(value, "__func__", None) or getattr(value, "fget", value)

    array = vars(Owner)["array"]
    leave_unchecked(__name__, Owner)
    assert type(vars(Owner)["own"]) is type(kind(plain))
    assert inner(vars(Owner)["own"]) is plain
    assert vars(Owner)["array"] is array
