"""Counts the bytes that autograd saves for the backward pass, while a block runs or, by a trace, before it runs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from veneer.model.fused.block import FusedBlock, halves_of, run_half
from veneer.model.program.acting import computed_in, is_plain
from veneer.model.program.stretch import ActingStretch, PackedPositions
from veneer.ops.traced import Traced, tracing

Halves = tuple[ActingStretch, ActingStretch]


class SavedBytes(saved_tensors_hooks):
    """Context that counts the bytes of tensors that autograd saves within it, also of tensors of a trace. A storage
    that several tensors share counts once.
    """

    def __init__(self) -> None:
        super().__init__(self._count, lambda tensor: tensor)
        self._found: dict[int, int] = {}

    def without(self, weights: Iterable[Tensor]) -> int:
        """Return the bytes of all saved tensors except these weights."""
        known = {_storage(weight)._cdata for weight in weights}
        return sum(n_bytes for storage, n_bytes in self._found.items() if storage not in known)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        self._found[storage._cdata] = storage.nbytes()
        return tensor


def weights_of(block: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a block."""
    return [*block.parameters(), *block.buffers()]


def traced_bytes(model: nn.Module, hidden: Tensor) -> float | None:
    """Return the mean bytes for each token that a fused block saves in a pass over hidden states (…, width).

    One block of each kind runs on tensors without values, so that nothing is computed. Weights are not counted. Nor are
    tensors that all blocks share: tables of the rotation, bounds of sequences, ids of dropout's masks. Return None if a
    half runs the model's own code, if a bottleneck acts, or if rows have different adapters.
    """
    dtype = computed_in(hidden)
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    if dtype is None or not blocks:
        return None
    kinds = [_kind(block) for block in blocks]
    samples = dict(zip(kinds, blocks, strict=True))
    with torch.enable_grad():  # lowered before the trace: what is kept of the weights has their values
        halves = {kind: halves_of(block, hidden.dtype, dtype) for kind, block in samples.items()}
    if not all(_is_traceable(half) for pair in halves.values() for half in pair):
        return None
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), tracing():
        n_bytes = {kind: _saved_by(samples[kind], cast(Halves, pair), hidden) for kind, pair in halves.items()}
    return sum(n_bytes[kind] for kind in kinds) / len(kinds) * hidden.shape[-1] / hidden.numel()


def _is_traceable(half: ActingStretch | None) -> bool:
    return half is not None and half.adds and all(layer.runs is None for own in half.layers for layer in own)


def _kind(block: FusedBlock) -> Hashable:
    """Return a key that is equal for blocks that save equally many bytes: those with equal shapes, parameters and
    hooks.
    """
    parameters = ((name, weight.shape, weight.requires_grad) for name, weight in block.named_parameters())
    plain = (is_plain(module) for module in block.modules() if module is not block)
    return block.fused_program, tuple(parameters), tuple(plain)


def _saved_by(block: FusedBlock, halves: Halves, hidden: Tensor) -> int:
    """Return the bytes that a block saves in a pass over hidden states (…, width). It must be called while tracing."""
    # Weights may be on a GPU: what is saved is the same, and the kernels that a trace silences are the CPU's.
    bare = torch.empty(hidden.shape, dtype=hidden.dtype, device="meta")
    x = cast(Tensor, Traced(bare, torch.device("cpu"))).requires_grad_(True)
    bounds = torch.tensor([0, hidden.numel() // hidden.shape[-1]])
    saved = SavedBytes()
    with saved:
        positions = PackedPositions(None, None, bounds)
        h = run_half(block, "attention", halves[0], x, x, positions)
        y = run_half(block, "mlp", halves[1], x if block.fused_program.block.parallel else h, h, positions)
    n_bytes = saved.without(weights_of(block))
    del y  # until here its graph holds what was counted
    return n_bytes


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return cast(Tensor, getattr(tensor, "bare", tensor)).untyped_storage()
