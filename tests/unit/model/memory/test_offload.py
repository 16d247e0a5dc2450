"""Activation offload: the same gradients to the bit, tensors really elsewhere, space given back, a full disk told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from launch import program
from veneer.errors import DiskError
from veneer.model.memory.offload import ActivationOffload, PageFile


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 37), nn.GELU(), nn.Linear(37, 29), nn.Dropout(0.3), nn.Linear(29, 7))


def gradients(model: nn.Module, offload: ActivationOffload | None) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    x = torch.randn(11, 13)
    if offload is None:
        loss = model(x).square().mean()
    else:
        with offload:
            loss = model(x).square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_are_equal_and_the_file_starts_over(tmp_path: Path) -> None:
    model = net()
    expected = gradients(model, None)
    offload = ActivationOffload(model, "disk", tmp_path / "new", at_least=1)
    for _ in range(2):
        found = gradients(model, offload)
        assert all(map(torch.equal, found, expected))
        assert offload._file._end == 0
    with offload:
        loss = model(torch.randn(11, 13)).sum()
        assert offload._file._end > 0
        del loss
    assert offload._file._end == 0
    assert not list((tmp_path / "new").iterdir())  # it has no name
    offload.close()
    assert all(map(torch.equal, gradients(model, offload), expected))
    offload.close()


def test_weights_and_small_tensors_stay(tmp_path: Path) -> None:
    model = nn.Linear(211, 223)
    offload = ActivationOffload(model, "disk", tmp_path, at_least=4 * 17 * 211)
    x, small = torch.randn(17, 211, requires_grad=True), torch.randn(16, 211, requires_grad=True)
    with offload:
        y, z = model(x), model(small)
    assert offload._file._n_live == 1
    (y.sum() + z.sum()).backward()
    assert torch.equal(x.grad, torch.ones(17, 223) @ model.weight)  # type: ignore[arg-type]
    offload.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_layout_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    file = PageFile(tmp_path)
    whole = (torch.randn(5, 7, 11, 3) * 10).to(dtype)
    for tensor in (
        whole,
        whole.transpose(1, 2),
        whole.permute(3, 1, 0, 2),
        whole[:, 2:5, ::2],
        whole[:1].expand(3, -1, -1, -1),
    ):
        back = file.read(file.write(tensor))
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
        back.fill_(1)  # a private copy
    assert file.read(file.write(whole.transpose(1, 2))).stride() == whole.transpose(1, 2).stride()
    file.close()


def test_a_tensor_is_written_once_until_it_changes(tmp_path: Path) -> None:
    file, tensor = PageFile(tmp_path), torch.randn(17, 19)
    first = file.write(tensor)
    assert file.write(tensor) is first
    assert file.write(tensor.T) is not first
    tensor.mul_(2)
    second = file.write(tensor)
    assert second is not first
    assert torch.equal(file.read(first) * 2, file.read(second))
    file.close()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model, expected = net(), gradients(net(), None)
    offload = ActivationOffload(model, "disk", tmp_path, at_least=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskError, match=r"no room for 572 bytes.*No space left.*larger disk"):
            gradients(model, offload)
    assert all(map(torch.equal, gradients(model, offload), expected))
    offload.close()


def test_a_file_that_may_not_grow_is_told(tmp_path: Path) -> None:
    """The system's own limit, in a process of its own."""
    script = """
import resource, sys, torch
from pathlib import Path
from veneer.errors import DiskError
from veneer.model.memory.offload import PageFile
resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
file = PageFile(Path(sys.argv[1]))
first = file.write(torch.ones(16_000))
try:
    file.write(torch.zeros(16_000))
except DiskError as error:
    print("told:", error)
assert torch.equal(file.read(first), torch.ones(16_000))
"""
    done = program(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "told: no room for 64,000 bytes of activations after the 65,536 bytes written to " in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_host_memory_of_a_gpu_run() -> None:
    model = net().cuda().eval()
    x = torch.randn(11, 13, device="cuda", requires_grad=True)
    grads = []
    for context in (torch.enable_grad(), ActivationOffload(model, "host", at_least=1)):
        with context:
            loss = model(x).square().mean()
        grads.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*grads)
