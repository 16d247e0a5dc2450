"""Paged state: it survives where unpaged state does not fit, and says so where there is no room for pages."""

import subprocess
import sys
import textwrap

import pytest
import torch

from veneer.errors import TrainingError
from veneer.optim.paged import PagedAdamW8bit, map_tensor

SCRIPT = """
import resource, sys, torch
from veneer.optim import AdamW8bit, PagedAdamW8bit
torch.set_num_threads(1)
param = torch.nn.Parameter(torch.zeros(20_000_003))
param.grad = torch.ones_like(param)
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
limit = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
optimizer = {"paged": PagedAdamW8bit, "unpaged": AdamW8bit}[sys.argv[1]]([param], lr=0.5)
STEP
print("stepped", float(param[0]), float(param[-1]))
"""


def train_under_limit(kind: str, extra_mib: int) -> subprocess.CompletedProcess:
    # The state alone, without the step's temporaries: that is what pages.
    script = textwrap.dedent(SCRIPT).replace("STEP", "state = optimizer._new_state(param)")
    script = script.replace(
        'print("stepped", float(param[0]), float(param[-1]))', 'print("held", state["state1"].numel())'
    )
    return subprocess.run(
        [sys.executable, "-c", script, kind, str(extra_mib)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_DATA and /proc")
def test_paged_state_lives_outside_the_memory_that_a_limit_counts():
    """40 MB of state under a limit with 12 MB to spare."""
    assert "held 20000003" in train_under_limit("paged", 12).stdout
    unpaged = train_under_limit("unpaged", 12)
    assert unpaged.returncode != 0
    assert "alloc" in unpaged.stderr.lower()


def test_a_mapped_tensor_reads_back_what_was_written(tmp_path):
    tensor, pages = map_tensor((13, 17), torch.float32, tmp_path)
    assert float(tensor.abs().sum()) == 0
    tensor.copy_(torch.arange(13 * 17).view(13, 17))
    pages.flush()
    assert torch.equal(tensor, torch.arange(13 * 17, dtype=torch.float32).view(13, 17))
    assert list(tmp_path.iterdir()) == []  # unnamed: nothing is left behind, even after a crash


def test_no_room_for_pages_is_a_clear_error():
    param = torch.nn.Parameter(torch.zeros(5000))
    param.grad = torch.ones_like(param)
    optimizer = PagedAdamW8bit([param], paged_from=10)
    optimizer.folder = None
    with pytest.raises(TrainingError, match="give PagedAdamW8bit a folder on a larger disk"):
        map_tensor((2**50,), torch.uint8, None)
