"""Sequences of a pass: which tokens belong to which sequence, for records that depend on a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.errors import ShapeError

MEMBERS = "members"
"""Name under which ``lower`` finds the `Sequences.members` of a pass."""


@dataclass(frozen=True)
class Sequences:
    """Sequences in an input of ``shape`` (rows, n). A packed row holds several; padding belongs to none.

    ``members`` has a row for each token and a column for each sequence: 1 if the token belongs to it, otherwise 0.
    """

    shape: tuple[int, int]
    members: Float[Tensor, "tokens sequences"]

    @classmethod
    def of(
        cls,
        mask: Int[Tensor, "rows n"],
        positions: Int[Tensor, "_ n"] | None = None,
        device: torch.device | None = None,
    ) -> Sequences:
        """Return the sequences of rows, whose ``mask`` is 0 on padding.

        Each row is one sequence. With ``positions``, a new sequence begins at each token whose position does not
        increase.
        """
        rows, n = mask.shape
        number = torch.zeros(rows, n, dtype=torch.long, device=mask.device)
        if positions is not None:
            begins = positions[:, 1:] <= positions[:, :-1]
            number[:, 1:] = begins.cumsum(dim=1)
        each = int(number.max()) + 1
        index = torch.arange(rows, device=mask.device)[:, None] * each + number
        members = torch.nn.functional.one_hot(index.flatten(), rows * each) * mask.reshape(-1, 1)
        return cls((rows, n), members.to(device or mask.device, torch.float32))

    def at(self, shape: Sequence[int]) -> Float[Tensor, "tokens sequences"] | None:
        """Return ``members`` for an input of shape (rows, n) or (rows · n). Return None for another input of two or
        more axes, whose first axis is taken as rows.

        Raises ShapeError for another input of one axis, such as the tokens of an expert, because their rows are not
        known.
        """
        if tuple(shape) in (self.shape, (len(self.members),)):
            return self.members
        if len(shape) < 2:
            raise ShapeError(
                f"a layer's input of shape {tuple(shape)} does not tell its tokens' rows (the batch has (rows, n) = "
                f"{self.shape}), but its adapter depends on whole sequences: list the layer in exclude_modules"
            )
        return None

    def of_rows(self, rows: Int[Tensor, " k"]) -> Sequences:
        """Return the sequences of some rows."""
        n = self.shape[1]
        return Sequences((len(rows), n), self.members.view(*self.shape, -1)[rows].flatten(0, 1))


def members_of_rows(shape: Sequence[int], device: torch.device) -> Float[Tensor, "tokens sequences"]:
    """Return the `Sequences.members` of an input of shape (…, n) in which each row is one sequence."""
    *leading, n = shape
    rows = torch.Size(leading).numel()
    return torch.eye(rows, device=device).repeat_interleave(n, dim=0)


def means(values: Float[Tensor, "tokens k"], members: Float[Tensor, "tokens sequences"]) -> Float[Tensor, "tokens k"]:
    """Return for each token the mean over its sequence; 0 for padding."""
    members = members.to(values.dtype)
    return members @ ((members.T @ values) / members.sum(dim=0).clamp_min(1)[:, None])
