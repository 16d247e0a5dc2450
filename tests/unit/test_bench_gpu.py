"""bench/gpu.py says so and exits with its own status where there is no GPU to measure."""

from pathlib import Path

import pytest
import torch

from launch import program

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_without_a_gpu_nothing_is_measured():
    pytest.importorskip("triton", reason="needs the package triton")
    done = program(SCRIPT)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "there is no CUDA GPU here; nothing was checked and nothing measured." in done.stdout
