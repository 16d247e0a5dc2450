"""Gradients of several processes: their mean, whose bits do not depend on where a run was resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from steps_together import N_STEPS, Crossed, trained
from veneer.train import gradients
from veneer.train.gradients import average, leave_apart


@pytest.mark.parametrize("n", [2, 3, 4])
def test_steps_after_a_resume_have_the_bits_of_a_run_that_went_through(tmp_path: Path, n: int) -> None:
    whole = trained(tmp_path / "whole", n)
    resumed = trained(tmp_path / "resumed", n, resumed_at=3)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_the_bits_of_torch_itself_depend_on_where_a_run_was_resumed(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    whole = trained(tmp_path / "whole", 3, by_ddp=True)
    resumed = trained(tmp_path / "resumed", 3, resumed_at=3, by_ddp=True)
    assert any(not torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("compiled", [False, True])
def test_reduction_is_switched_off_in_a_compiled_model_too(compiled: bool) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        joined = DistributedDataParallel(Crossed())
        leave_apart(torch.compile(joined) if compiled else joined, share_buffers=False)
        assert not joined.require_backward_grad_sync
        assert not joined.require_forward_param_sync
    finally:
        distributed.destroy_process_group()


def test_the_mean_is_that_of_one_process_with_all_batches(tmp_path: Path) -> None:
    n = 3
    found = trained(tmp_path / "three", n)
    torch.manual_seed(3)
    model = Crossed().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(N_STEPS):
        for rank in range(n):
            x = torch.randn(7, 37, generator=torch.Generator().manual_seed(step * n + rank)).double()
            (model(x, (step + rank) % 2 == 0) / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-5)


def test_parameters_are_sent_in_parts_of_one_dtype_and_those_without_gradients_keep_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ParameterDict({
        "a": torch.ones(3), "b": torch.ones(5), "c": torch.ones(2, 7, dtype=torch.bfloat16), "d": torch.ones(11),
        "e": nn.Parameter(torch.ones(2), requires_grad=False),
    })  # fmt: skip
    given = {
        "a": torch.full((3,), 2.0),
        "c": torch.full((2, 7), 4.0, dtype=torch.bfloat16),
        "d": torch.full((11,), 6.0),
    }
    for name, gradient in given.items():
        model[name].grad = gradient.clone()
    sent: list[int] = []
    monkeypatch.setattr(gradients, "n_processes", lambda: 2)
    monkeypatch.setattr(gradients, "_PART_BYTES", 30)
    monkeypatch.setattr(gradients, "summed_in_place", lambda flat: sent.append(flat.numel()))
    average(model)
    assert sent == [3 + 5 + 2, 14 + 1, 11 + 1]
    assert model["b"].grad is None
    for name, gradient in given.items():
        assert torch.equal(model[name].grad, gradient / 2)
    assert not distributed.is_initialized()
