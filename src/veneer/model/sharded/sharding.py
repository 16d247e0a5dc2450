"""Frozen weights of a decoder's blocks, sharded over processes by torch's FSDP2. Trained weights stay whole.

A block's weights are gathered when it runs, forward and backward, and sharded again after it. They have no gradients,
so nothing is reduced. Trained weights are plain tensors, averaged as they are without sharding (pytorch#157917):
optimizers, clipping and checkpoints never see a shard. Quantized weights are gathered as codes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from veneer.errors import ConfigError, DescriptionError
from veneer.model.blueprint.describe import blocks_of
from veneer.model.quantized.module import CodedModule
from veneer.model.quantized.packed_linear import is_packed

Model = TypeVar("Model", bound=PreTrainedModel)
FIRST_TORCH_WITH_CODES = (2, 12)  # whose FSDP2 takes frozen integers (pytorch#177844)


def shard_base(model: Model, shard: int | None = None, *, device: str | None = None) -> Model:
    """Shard the frozen weights of a model's blocks, in place, so that ``shard`` processes share one copy.

    If it is None, all processes share one; 1 leaves the model unchanged. Attach the adapter before, and wrap the model
    in ``DistributedDataParallel(model, broadcast_buffers=False)`` after: DDP averages only trained weights. ``device``:
    the kind of device to which the shards move, such as ``cuda``; by default they stay where the weights are.
    Raises ConfigError if ``shard`` does not divide the processes, or if the model cannot be sharded.
    """
    n = _n_processes()
    shard = n if shard is None else shard
    if shard < 1 or n % shard:
        raise ConfigError(f"shard {shard} must divide the {n} processes: each copy of the base is sharded over as many")
    if shard == 1:
        return model
    _, blocks = _parts(model)
    cutter = BaseCutter(shard, device or next(blocks.parameters()).device.type)
    cutter.cut(model)
    leave_apart(model)
    return model


class BaseCutter:
    """Shards a base over processes, of which ``shard`` share one copy: at once, or block by block while it is loaded.

    A base that is sharded while it is loaded gets its adapter afterwards, and then needs `leave_apart`.
    """

    def __init__(self, shard: int, device: str) -> None:
        self._shard, self.device = shard, device
        self._mesh: Any = None  # made once: each has groups of its own

    def cut(self, model: PreTrainedModel) -> None:
        """Shard the blocks that are not sharded yet. Raises ConfigError if the model cannot be sharded."""
        holder, blocks = _parts(model)
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        if self._mesh is None:
            _require_cuttable(model, blocks, trained)
        for block in blocks:
            if not is_cut(block):
                self._cut_block(block, trained)
        inside = {parameter for block in blocks for parameter in block.parameters()}
        whole = trained.union(parameter for parameter in model.parameters() if parameter not in inside)
        from veneer.model.sharded.fsdp import join  # one process never needs FSDP2

        join(holder, self._mesh, whole)

    def take(self, model: PreTrainedModel, block: nn.Module) -> None:
        """Shard a block of a model that is being loaded. The block's weights must be loaded, and must
        not be trained.
        """
        if self._mesh is None:
            _require_cuttable(model, _parts(model)[1], set())
        self._cut_block(block.requires_grad_(False), set())

    def _cut_block(self, block: nn.Module, whole: set[nn.Parameter]) -> None:
        from veneer.model.sharded.fsdp import cut_block, mesh  # one process never needs FSDP2

        if self._mesh is None:
            self._mesh = mesh(self.device, _n_processes(), self._shard)
        cut_block(block, self._mesh, whole)


def leave_apart(model: nn.Module) -> None:
    """Make DDP neither send nor reduce the sharded weights."""
    from veneer.model.sharded.fsdp import leave_to_fsdp  # one process never needs FSDP2

    leave_to_fsdp(model)


@contextmanager
def gathered(block: nn.Module) -> Iterator[None]:
    """Enter a context in which all weights of a block are gathered. All processes that share a copy
    enter it together.
    """
    if not is_cut(block):
        yield
        return
    block.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        block.reshard()  # type: ignore[operator]


def _n_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_cut(model: nn.Module) -> bool:
    """Return True if FSDP2 has sharded weights of the model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is cut where nobody has imported it
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def require_whole(model: nn.Module, work: str) -> None:
    """Raise ConfigError if the base is sharded; ``work`` names the work that needs all of it."""
    if is_cut(model):
        raise ConfigError(
            f"{work} needs a whole base, but the blocks of this one are sharded over processes: save the adapter, and "
            "run `veneer merge` in one process (or load base and adapter there)"
        )


def _parts(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    try:
        return blocks_of(model)
    except DescriptionError as error:
        raise ConfigError(f"the base cannot be sharded over processes: {error}. Train with strategy ddp") from error


def _require_cuttable(model: nn.Module, blocks: nn.ModuleList, trained: set[nn.Parameter]) -> None:
    """Raise ConfigError if the base cannot be sharded.

    It cannot if it is sharded already, if all of a block is trained, if weights are shared, or if torch is too old.
    """
    if is_cut(model):
        raise ConfigError("the base is already sharded over processes: load it again to shard it differently")
    if any(map(is_packed, blocks.modules())):
        raise ConfigError(
            "weights of the blocks are packed for serving, and packed weights cannot be sharded: load the base for "
            "training, or unpack it"
        )
    frozen = [_frozen(block, trained) for block in blocks]
    if not any(frozen):
        raise ConfigError(
            "no weight of the blocks is frozen, and only frozen ones can be sharded: train with strategy ddp"
        )
    of_blocks, everywhere = sum(frozen, Counter[object]()), _frozen(model, trained)
    in_several = any(count > 1 for count in Counter(weight for each in frozen for weight in each).values())
    if in_several or any(everywhere[weight] > count for weight, count in of_blocks.items()):
        raise ConfigError(
            "blocks of this base share weights with one another or with other modules, and such weights cannot be "
            "sharded: train with strategy ddp"
        )
    coded = any(isinstance(weight, CodedModule) for weight in of_blocks)
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if coded and release < FIRST_TORCH_WITH_CODES:
        raise ConfigError(
            f"sharding a quantized base needs torch 2.12 or later, and this is {torch.__version__}: update torch"
        )


def _frozen(module: nn.Module, trained: set[nn.Parameter]) -> Counter[object]:
    """Count how many names each frozen weight below a module has. A quantized module counts as one weight."""
    named = [each for _, each in module.named_modules(remove_duplicate=False)]
    plain = [weight for each in named for weight in each._parameters.values()]
    coded = [each for each in named if isinstance(each, CodedModule)]
    return Counter([*coded, *(weight for weight in plain if weight is not None and weight not in trained)])
