"""Layout of a batch: the bounds of its sequences, in place of a dense mask, say which tokens attend to one another.

The decoder makes a `LayoutMask` from its arguments and passes it to its blocks in place of the mask. transformers
passes a 4-d mask on unchanged, also through gradient checkpointing. Reentrant checkpointing detaches a block's
positional arguments. A block that needs the real mask asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from veneer.errors import CompositionError
from veneer.model.blueprint.masks import MAKERS
from veneer.ops.forks import Fork


class LayoutMask(Tensor):
    """Substitute for an attention mask. ``cu_seqlens`` bounds the sequences in the flattened batch (b * t tokens).

    ``forks`` describe sequences that continue other sequences. The layout is in host memory on every device, because
    kernels read the bounds there.
    """

    forks: tuple[Fork, ...] = ()
    wanted: torch.dtype | None = None
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"]
    size_of_batch: tuple[int, int]
    given: Mapping[str, Any]
    dense: dict[int | str | None, Tensor | None]

    def detach(self) -> LayoutMask:
        """Return the layout itself, which has no gradient: a copy would lack its bounds."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> LayoutMask:
        """Return the layout itself, which stays in host memory. Only the mask made from it gets the dtype (MPT)."""
        self.wanted = next((each for each in args if isinstance(each, torch.dtype)), self.wanted)
        return self

    def dense_for(self, module: Any, hidden: Tensor, window: int | None) -> Tensor | None:
        """Return the mask that transformers makes from the arguments of this batch, for a module that runs its own
        attention.

        Raises CompositionError if sequences continue others, because transformers has no mask for them.
        """
        self._require_rows()
        if window not in self.dense:
            given = self._arguments(getattr(module, "config", self.given["config"]), hidden)
            if getattr(module, "is_causal", True):
                make = create_causal_mask if window is None else create_sliding_window_causal_mask
            else:
                make = create_bidirectional_mask if window is None else create_bidirectional_sliding_window_mask
                del given["cache"], given["position_ids"]
            mask = make(**given)
            self.dense[window] = mask if mask is None or self.wanted is None else mask.to(self.wanted)
        return self.dense[window]

    def of_type(self, layer_type: str, hidden: Tensor) -> Tensor | None:
        """Return the mask that transformers makes for layers of a type, or None if transformers makes none for this
        batch.

        Raises CompositionError if sequences continue others.
        """
        self._require_rows()
        if layer_type not in self.dense:
            self.dense[layer_type] = MAKERS[layer_type](**self._arguments(self.given["config"], hidden))
        return self.dense[layer_type]

    def _arguments(self, config: Any, hidden: Tensor) -> dict[str, Any]:
        """Return the keyword arguments with which transformers' functions create masks for this batch."""
        positions = self.given["position_ids"]
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = self.given["attention_mask"]
        return {
            "config": config, "inputs_embeds": hidden, "attention_mask": mask, "cache": None, "position_ids": positions
        }  # fmt: skip

    def _require_rows(self) -> None:
        if self.forks:
            raise CompositionError("rows share their prompts, but the attention of a block is not fused: fuse it")


def layout_mask(
    size: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None, config: Any = None
) -> LayoutMask | None:
    """Return the layout of a batch (b, t), or None if its sequences are not runs of consecutive tokens.

    As in transformers, positions that restart mark packed sequences if there is no mask, and a mask marks padding.
    Padding is a sequence of its own: no token attends to it, and its results have no meaning. The mask or positions of
    a batch on a GPU are copied to the host once, for all blocks. Masks for attention modules that have no config are
    made from ``config``.
    """
    starts = _starts(size, attention_mask, position_ids)
    if starts is None:
        return None
    flat = starts.flatten().nonzero()[:, 0]
    end = flat.new_full((1,), size[0] * size[1])
    given = {"attention_mask": attention_mask, "position_ids": position_ids, "config": config}
    return _layout(torch.cat([flat, end]), size, given)


def forked_layout(position_ids: Int[Tensor, "1 n"], bounds: Sequence[int], forks: Sequence[Fork]) -> LayoutMask:
    """Return the layout of one row with these bounds of sequences. ``forks`` say which sequences continue others."""
    given = {"attention_mask": None, "position_ids": position_ids}
    mask = _layout(torch.tensor(bounds), (1, position_ids.shape[1]), given)
    mask.forks = tuple(forks)
    return mask


def _layout(cu_seqlens: Tensor, size: tuple[int, int], given: Mapping[str, Any]) -> LayoutMask:
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool).as_subclass(LayoutMask)
    mask.cu_seqlens, mask.size_of_batch, mask.given, mask.dense = cu_seqlens, size, given, {}
    return mask


def _starts(size: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Return a mask (b, t) that is True at the first token of each sequence and of padding, in host memory. Return None
    if the arguments do not determine these tokens.
    """
    if attention_mask is not None:
        if attention_mask.ndim != 2 or tuple(attention_mask.shape) != size:
            return None
        real = attention_mask.cpu().bool()
        changed, first_real = real.diff(dim=1), real[:, :1]
        if bool((changed.sum(dim=1) > 2 - first_real[:, 0].long()).any()):  # real tokens on both sides of padding
            return None
        return torch.cat([torch.ones_like(first_real), changed], dim=1)
    if position_ids is None:
        position_ids = torch.arange(size[1])[None]
    if position_ids.ndim != 2 or position_ids.shape[1] != size[1] or position_ids.shape[0] not in (1, size[0]):
        return None
    starts = torch.ones(position_ids.shape, dtype=torch.bool)
    starts[:, 1:] = position_ids.cpu().diff(dim=1) != 1
    return starts.expand(size)
