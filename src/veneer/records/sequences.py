"""Sequences of a pass: which tokens of its input belong together, for records that depend on a whole sequence."""

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
    """Sequences in an input of ``shape`` (rows, n): ``members`` is 1 where a token belongs to a sequence, and else 0.

    Padding belongs to none. A row holds several sequences if it is packed.
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

        A row is one sequence. With ``positions`` a new one begins where they do not ascend.
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
        """Return the members of an input of shape (rows, n), or flattened; None if it holds other tokens in rows.

        Raises ShapeError if it holds other tokens without rows, as the input of an expert does.
        """
        if tuple(shape) in (self.shape, (len(self.members),)):
            return self.members
        if len(shape) < 2:
            raise ShapeError(
                f"a layer sees {tuple(shape)} of the {self.shape} tokens (rows, n), without their rows, and its "
                "adapter depends on whole sequences: list it in exclude_modules"
            )
        return None

    def of_rows(self, rows: Int[Tensor, " k"]) -> Sequences:
        """Return the sequences of some rows."""
        n = self.shape[1]
        return Sequences((len(rows), n), self.members.view(*self.shape, -1)[rows].flatten(0, 1))


def members_of_rows(shape: Sequence[int], device: torch.device) -> Float[Tensor, "tokens sequences"]:
    """Return the members if each row of an input of shape (…, n) is a sequence."""
    *leading, n = shape
    rows = torch.Size(leading).numel()
    return torch.eye(rows, device=device).repeat_interleave(n, dim=0)


def means(values: Float[Tensor, "tokens k"], members: Float[Tensor, "tokens sequences"]) -> Float[Tensor, "tokens k"]:
    """Return for each token the mean over its sequence; 0 for a token of none."""
    members = members.to(values.dtype)
    return members @ ((members.T @ values) / members.sum(dim=0).clamp_min(1)[:, None])
