"""A few steps of a small model in several processes, wrapped anew where a run would have been resumed."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from launch import together
from veneer.train.gradients import average, leave_apart

N_STEPS = 5


class Crossed(nn.Module):
    """Layers whose gradients are not ready in the order of the parameters; one layer is left out in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(53, 31), nn.Linear(37, 53)
        self.last, self.rare = nn.Linear(31, 1), nn.Linear(37, 1)

    def forward(self, x: Tensor, rare: bool) -> Tensor:
        found: Tensor = self.last(self.second(self.first(x).tanh()).tanh()).sum()
        return found + self.rare(x).sum() if rare else found


def trained(folder: Path, n: int, *, resumed_at: int = 0, by_ddp: bool = False) -> dict[str, Tensor]:
    """The parameters after `N_STEPS` steps of ``n`` processes; ``by_ddp``: torch's DDP averages the gradients."""
    folder.mkdir()
    together(_steps, folder, n, resumed_at, by_ddp)
    found: list[dict[str, Tensor]] = [torch.load(folder / f"{rank}.pt") for rank in range(n)]
    assert all(torch.equal(found[0][name], each[name]) for each in found for name in each)
    return found[0]


def _steps(folder: Path, rank: int, n: int, resumed_at: int, by_ddp: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=n)
    torch.manual_seed(3)
    model = Crossed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    joined = DistributedDataParallel(model)
    for step in range(N_STEPS):
        if step == resumed_at and step:
            del joined
            gc.collect()  # its hooks go too: they would send as well, until each process collects at a time of its own
            joined = DistributedDataParallel(model)
        x = torch.randn(7, 37, generator=torch.Generator().manual_seed(step * n + rank))
        if not by_ddp:
            leave_apart(joined, share_buffers=False)
        joined(x, by_ddp or (step + rank) % 2 == 0).backward()
        if not by_ddp:
            average(model)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    distributed.barrier()  # nobody leaves while another still reads
    distributed.destroy_process_group()
