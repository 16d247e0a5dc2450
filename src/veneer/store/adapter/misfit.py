"""Message for an adapter that does not fit a model: missing or misshapen tensors, and the two sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from veneer.errors import FormatError

_SHOWN = 5  # of the tensors of one kind that do not fit


class Shaped(Protocol):
    """Tensor, or its entry in a file's header."""

    @property
    def shape(self) -> Sequence[int]: ...


def misfit(
    source: str, model: str, problems: Sequence[str], given: Mapping[str, Shaped], expected: Mapping[str, Shaped]
) -> FormatError:
    """Return the error for tensors of ``source`` that do not fit a ``model``: the first problems of each kind.

    Each problem begins with the name of its kind. ``given`` and ``expected``, by key, supply the two sizes.
    """
    told = "\n  ".join(_shortened(problems))
    return FormatError(f"{source} does not fit {model}{_other_size(given, expected)}:\n  {told}")


def _shortened(problems: Sequence[str]) -> list[str]:
    """The first few of each kind, and how many more."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.split(maxsplit=1)[0], []).append(problem)
    told = []
    for of in kinds.values():
        told += of[:_SHOWN] + ([f"and {len(of) - _SHOWN} more of these"] if len(of) > _SHOWN else [])
    return told


def _other_size(given: Mapping[str, Shaped], expected: Mapping[str, Shaped]) -> str:
    """The two sizes, in words, where an adapter was trained for a model of another size; empty otherwise."""
    (layers, width), (own_layers, own_width) = _size(given), _size(expected)
    if not (layers and own_layers and width and own_width) or (layers, width) == (own_layers, own_width):
        return ""
    return (
        f": it was trained for {layers} layers of width {width}, this model has {own_layers} of {own_width}; "
        "give the base that it was trained on"
    )


def _size(tensors: Mapping[str, Shaped]) -> tuple[int, int]:
    """The number of blocks that these tensors reach, and the commonest width of matrices; 0 where unknown."""
    numbers = [int(found[1]) for key in tensors if (found := re.search(r"\.(\d+)\.", key))]
    widths = [max(value.shape) for value in tensors.values() if len(value.shape) == 2]
    return max(numbers, default=-1) + 1, max(sorted(set(widths)), key=widths.count, default=0)
