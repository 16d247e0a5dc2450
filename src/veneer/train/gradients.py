"""Averages the gradients of processes that train together, always in the same order of sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from veneer.train.processes import n_processes, summed_in_place

_PART_BYTES = 64 * 2**20  # of gradients that are sent at once


def leave_apart(model: nn.Module, *, share_buffers: bool) -> None:
    """Switch off the reduction of torch's DDP in the next backward pass; `average` reduces the gradients instead.

    DDP reduces in buckets, which it rebuilds after its first step. With three or more processes, other buckets mean
    another order of sums. A resumed run's first step would then differ in its last bits. If ``share_buffers``, the next
    forward pass sends the main process's buffers to all.
    """
    model = getattr(model, "_orig_mod", model)  # compiled after it was wrapped
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = False
        model.require_forward_param_sync = share_buffers


def average(model: nn.Module) -> None:
    """Replace the gradients by their mean over all processes, in the order of the parameters.

    If only some processes have a gradient of a parameter, the gradient counts as zero in the others. A parameter
    without a gradient in every process keeps none.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for part in _parts(trained) if n_processes() > 1 else ():
        has = torch.tensor([p.grad is not None for p in part], dtype=part[0].dtype, device=part[0].device)
        flat = torch.cat([has, *map(_flat_gradient, part)]).div_(n_processes())
        summed_in_place(flat)
        counts, *means = torch.split(flat, [len(part), *(p.numel() for p in part)])
        for parameter, count, mean in zip(part, counts.tolist(), means, strict=True):
            if count:
                gradient = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient.copy_(mean.view_as(parameter))


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter).flatten() if gradient is None else gradient.reshape(-1)


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in order, in groups of limited size with one dtype and one device."""
    part: list[nn.Parameter] = []
    n_bytes = 0
    for parameter in parameters:
        if part and (n_bytes >= _PART_BYTES or (parameter.dtype, parameter.device) != (part[0].dtype, part[0].device)):
            yield part
            part, n_bytes = [], 0
        part.append(parameter)
        n_bytes += parameter.nbytes
    if part:
        yield part
