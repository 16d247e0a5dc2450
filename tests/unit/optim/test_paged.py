"""Paged state: it survives where unpaged state does not fit, and says so where there is no room for pages."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launch import program
from stand_in import OnDevice, stand_in
from veneer.errors import TrainingError
from veneer.optim import AdamW8bit
from veneer.optim.paged import PagedAdamW8bit, map_tensor

LIMIT_MIB = 125
SCRIPT = """
import ctypes, resource, sys, torch
from veneer.optim import AdamW8bit, PagedAdamW8bit
torch.set_num_threads(1)
# Every tensor gets a mapping of its own, so that what is freed is given back and the limit counts what is alive.
assert ctypes.CDLL(None).mallopt(-3, 65536) == 1  # M_MMAP_THRESHOLD

def train(make, n_params, n):
    params = [torch.nn.Parameter(torch.zeros(n)) for _ in range(n_params)]
    optimizer = make(params, lr=0.5)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
            optimizer.step()
            p.grad = None
    return params

make = {"paged": PagedAdamW8bit, "unpaged": AdamW8bit}[sys.argv[1]]
train(make, 1, 100_003)  # everything is imported and warm before the limit falls
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
limit = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
params = train(make, 60, 400_009)
print("trained", round(float(params[0][0]), 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_DATA and /proc")
def test_trains_under_a_memory_limit_in_which_unpaged_state_dies():
    """60 × 400,009 parameters take 92 MiB of weights and 47 MiB of state. The limit has room for the weights and one
    step's temporaries, not for the state on top."""
    paged, unpaged = (program(SCRIPT, kind, LIMIT_MIB) for kind in ("paged", "unpaged"))
    assert "trained" in paged.stdout, paged.stderr[-500:]
    assert unpaged.returncode != 0
    assert "alloc" in unpaged.stderr.lower()


def test_a_mapped_tensor_reads_back_what_was_written(tmp_path):
    tensor, pages = map_tensor((13, 17), torch.float32, tmp_path)
    assert float(tensor.abs().sum()) == 0
    tensor.copy_(torch.arange(13 * 17).view(13, 17))
    pages.flush()
    assert torch.equal(tensor, torch.arange(13 * 17, dtype=torch.float32).view(13, 17))
    assert list(tmp_path.iterdir()) == []  # unnamed: nothing is left behind, even after a crash


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_loading_a_state_gives_back_the_pages_of_the_one_before(tmp_path):
    param = torch.nn.Parameter(torch.zeros(4099))
    optimizer = PagedAdamW8bit([param], min_8bit_size=2, paged_from=2, folder=tmp_path)
    param.grad = torch.ones_like(param)
    optimizer.step()
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    mappings = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mappings) == 4  # codes and maxima of two moments


def test_no_room_for_pages_is_a_clear_error():
    with pytest.raises(TrainingError, match="give PagedAdamW8bit a folder on a larger disk"):
        map_tensor((2**50,), torch.uint8, None)


def test_a_state_that_is_still_on_its_way_to_the_host_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with FakeTensorMode():
        optimizer = PagedAdamW8bit([torch.nn.Parameter(torch.empty(7, device=f"cuda:{i}")) for i in (0, 1)], lr=0.1)
        for param in optimizer.param_groups[0]["params"]:
            optimizer.state[param] = {"step": 3}
        optimizer.state_dict()
    assert sorted(map(str, waited)) == ["cuda:0", "cuda:1"]


def test_moments_wait_on_the_host_and_meet_the_parameter_on_its_device():
    """Three steps give what they give without paging, from the first on."""
    pytest.importorskip("triton", reason="needs the package triton")
    values, gradients = torch.randn(521), torch.randn(3, 521)
    expected = values.clone()
    plain = AdamW8bit([expected], lr=0.03, min_8bit_size=2)
    with stand_in({"adamw"}) as crossings:
        param = OnDevice(values.clone())
        optimizer = PagedAdamW8bit([param], lr=0.03, min_8bit_size=2, paged_from=2)
        sent = []
        for gradient in gradients:
            expected.grad, param.grad = gradient, OnDevice(gradient)
            plain.step()
            before = crossings.sent
            optimizer.step()
            sent.append(crossings.sent - before)
        moments = [x for x in optimizer.state[param].values() if isinstance(x, torch.Tensor)]
    torch.testing.assert_close(param.host, expected)
    assert [x.device.type for x in moments] == ["cpu"] * 4
    assert sent[1:] == [4, 4]
