"""One of many processes on torch's fake group: its collectives are counted, and no tensor has values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from collectives import Sent
from veneer import shard_base
from veneer.model.sharded import fsdp
from veneer.model.sharded.fsdp import mesh
from veneer.ops.traced import silenced
from veneer.plan.memory_trace import prepare
from veneer.plan.model import meta_base, with_adapter
from veneer.recipe.recipe import Recipe
from veneer.train.gradients import average


@contextmanager
def fake_group(n: int) -> Iterator[None]:
    """The first of ``n`` processes, which hears nothing of the others."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def sent_in_a_step(recipe: Recipe, config: Any, n: int, shard: int, length: int = 17) -> list[tuple[str, int]]:
    """The collectives of an optimizer step of a cut base, in their order, and the bytes of all their tensors."""
    args: Any = recipe.training_config()
    adapter: Any = recipe.adapter_config()
    model = meta_base(config, recipe.model)
    with fake_group(n), silenced(), FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        model = with_adapter(model, adapter).train()
        prepare(model, args)
        with patch.object(fsdp, "mesh", _real_mesh):
            shard_base(model, shard)
        ids, mask = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, 1, length, length, dtype=torch.bool)
        with Sent() as mode, patch.object(FakeTensor, "tolist", lambda given: [1.0] * given.numel()):
            for _ in range(args.gradient_accumulation_steps):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                logits.float().mean().backward()
            average(model)
    return [(name, sum(n_bytes.values())) for name, n_bytes in mode.found]


def _real_mesh(*given: Any) -> Any:
    """A mesh, whose ranks are values."""
    with unset_fake_temporarily():
        return mesh(*given)


def _make_fake(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones of a CPU; shared tensors stay shared."""
    made: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        return made.setdefault(tensor, torch.empty(tensor.shape, dtype=tensor.dtype))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = fake(buffer)
