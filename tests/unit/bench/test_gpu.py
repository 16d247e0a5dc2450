"""bench/kernels/gpu.py says so and exits with its own status where there is no GPU to measure."""

import pytest
import torch

from launch import module, program

WITHOUT_PEERS = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("bitsandbytes", "peft")]:
    del sys.modules[name]
sys.modules["bitsandbytes"] = sys.modules["peft"] = None  # an import of one is an ImportError now
import torch
from bench.kernels import gpu_cases, gpu_step
make = gpu_cases.Maker(torch.device("cpu"), torch.float32, None, gpu_cases.TINY)
print(*{case.peer_name for case in [*gpu_cases._four_bit(make), *gpu_cases._int8(make), gpu_cases._blockwise(make)]})
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_without_a_gpu_nothing_is_measured():
    pytest.importorskip("triton", reason="needs the package triton")
    done = module("bench.kernels.gpu")
    assert done.returncode == 3, done.stderr[-2000:]
    assert "there is no CUDA GPU here; nothing was checked and nothing measured." in done.stdout


def test_the_cases_do_without_the_packages_of_the_peers():
    pytest.importorskip("triton", reason="needs the package triton")
    done = program(WITHOUT_PEERS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the reference" in done.stdout
