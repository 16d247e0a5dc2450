"""Choice of tokens from logits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation

if TYPE_CHECKING:
    Ints: TypeAlias = array[int]
    Floats: TypeAlias = array[float]
else:  # before Python 3.12 an array's class takes no parameter
    Ints = Floats = array

NOT_FINITE, NONE_ALLOWED = -1, -2  # in the place of a token
WORD = 32  # ids in a word of a bit mask


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """Rule for the token of one row of logits. Effects apply in the order of the fields.

    ``allowed`` are bit masks of ids (`bit_mask`), ``banned`` ids, ``biased`` ids with their biases. ``repetition``
    divides the positive and multiplies the other logits of ``seen`` ids, each listed once. ``frequency`` times the
    count, and ``presence``, are subtracted for ``counted`` ids. Ids and counts are arrays of C ints, biases of floats.
    If ``temperature`` is 0, the likeliest token is taken, the first of equal ones. Otherwise ``min_p``, ``top_k`` and
    ``top_p`` exclude ids, and a random number draws one of the rest. ``key`` and ``place`` determine that number. If
    ``target`` is given, it is the token, and nothing is drawn. ``n_likeliest`` requests the log-probabilities of the
    token and of this many likeliest ids.
    """

    allowed: tuple[Tensor, ...] = ()
    banned: Ints | None = None
    biased: tuple[Ints, Floats] | None = None
    repetition: float = 1.0
    seen: Ints | None = None
    frequency: float = 0.0
    presence: float = 0.0
    counted: tuple[Ints, Ints] | None = None
    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    key: tuple[int, int] = (0, 0)
    place: int = 0
    target: int | None = None
    n_likeliest: int | None = None


class Draws(NamedTuple):
    """Drawn tokens of rows, (n,), with the requested log-probabilities, which are those of the unchanged logits.

    ``tokens`` are `NOT_FINITE` if a logit is NaN or the largest is infinite, and `NONE_ALLOWED` if no id is left.
    ``logprobs`` (n,) are the tokens' own, in float64, and ``ranks`` (n,) count the logits that are at least as large.
    ``likeliest`` holds ids and log-probabilities of all rows, one row after the other, the likeliest first.
    """

    tokens: Tensor
    logprobs: Tensor
    ranks: Tensor
    likeliest: tuple[Tensor, Tensor]


def likeliest(logits: Float[Tensor, "n vocabulary"], *, backend: str | None = None) -> Int64[Tensor, " n"]:
    """Return the index of the largest logit in each row, the first of equal ones.

    The result is -1 if the largest logit is infinite, or any is NaN.
    """
    if not logits.numel():
        return logits.new_full((len(logits),), -1).long()
    found: Tensor = implementation("sample.likeliest", logits.device, backend)(logits)
    return found


def draw(logits: Float[Tensor, "n vocabulary"], rules: Sequence[RowRule], *, backend: str | None = None) -> Draws:
    """Return the token of each row by its rule. A result depends on its own row and rule alone.

    Raises IndexError for an id beyond the vocabulary, and ShapeError for masks that are shorter.
    """
    n, d = logits.shape
    if len(rules) != n:
        raise ShapeError(f"{len(rules)} rules are given for {n} rows of logits: give one for each row")
    short = next((mask for rule in rules for mask in rule.allowed if mask.numel() * WORD < d), None)
    if short is not None:
        raise ShapeError(
            f"a mask holds {short.numel() * WORD} ids but the vocabulary {d}: make it with bit_mask(ids, {d})"
        )
    found: Draws = implementation("sample.draw", logits.device, backend)(logits, rules)
    return found


def bit_mask(ids: Sequence[int], vocabulary: int) -> Tensor:
    """Return a mask of ids: bit i % 32 of the int32 word i // 32 is set."""
    bits = torch.zeros(-(-vocabulary // WORD) * WORD, dtype=torch.int64)
    bits[list(ids)] = 1
    words = (bits.view(-1, WORD) << torch.arange(WORD)).sum(dim=1)
    return (words - (words >> (WORD - 1) << WORD)).int()
