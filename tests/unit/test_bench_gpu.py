"""bench/gpu.py says so and exits with its own status where there is no GPU to measure."""

from pathlib import Path

import pytest
import torch

from launch import program

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"

WITHOUT_PEERS = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("bitsandbytes", "peft")]:
    del sys.modules[name]
sys.modules["bitsandbytes"] = sys.modules["peft"] = None  # an import of one is an ImportError now
sys.path.insert(0, sys.argv[1])
import torch, gpu_step, gpu_cases
make = gpu_cases.Maker(torch.device("cpu"), torch.float32, None, gpu_cases.TINY)
print(*{case.peer_name for case in [*gpu_cases._four_bit(make), *gpu_cases._int8(make), gpu_cases._blockwise(make)]})
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_without_a_gpu_nothing_is_measured():
    pytest.importorskip("triton", reason="needs the package triton")
    done = program(SCRIPT)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "there is no CUDA GPU here; nothing was checked and nothing measured." in done.stdout


def test_the_cases_do_without_the_packages_of_the_peers():
    pytest.importorskip("triton", reason="needs the package triton")
    done = program(WITHOUT_PEERS, SCRIPT.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the reference" in done.stdout
