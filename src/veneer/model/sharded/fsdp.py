"""Hands the blocks of a decoder to torch's FSDP2, and keeps DDP from them."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from veneer.model.quantized.module import CodedModule


def mesh(device: str, n: int, shard: int) -> DeviceMesh:
    """Return a mesh of the ``shard`` processes, out of n, that share one copy of the base with this process.

    Their ranks follow one another. So they are on one machine if its number of processes is a multiple of ``shard``.
    """
    return init_device_mesh(device, (n // shard, shard), mesh_dim_names=("copy", "shard"))["shard"]


def cut_block(block: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """Shard the weights of a block over a mesh, except those that stay ``whole``."""
    for module in block.modules():
        if isinstance(module, CodedModule):
            module.freeze_parts()
    fully_shard(block, mesh=mesh, ignored_params=whole, reshard_after_forward=True)


def join(holder: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """Apply FSDP2 to the module that holds the sharded blocks, so that it runs them in order. None of its own weights
    are sharded.
    """
    fully_shard(holder, mesh=mesh, ignored_params=whole, reshard_after_forward=True)  # one order to prefetch in


def leave_to_fsdp(model: nn.Module) -> None:
    """Make DDP neither send nor reduce the sharded weights."""
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)  # type: ignore[no-untyped-call]
