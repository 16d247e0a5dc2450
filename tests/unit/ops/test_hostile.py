"""The hostile interpreter finds what it is there for: `make gpu-proof` runs the kernels' tests in it."""

import pytest
import torch

import launch
from hostile import hostile

pytest.importorskip("triton", reason="needs the package triton")

KERNEL = """
import sys, torch, triton
import triton.language as tl
from hostile import hostile

@triton.jit
def _kernel(x, out, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK) - (0 if {way!r} == "behind" else BLOCK - n)
    inside = (at >= 0) & (at < n) if MASKED else at < BLOCK
    tl.store(out + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)

x, out = torch.arange(37.0), torch.zeros(37)
with hostile({way!r}):
    _kernel[(1,)](x, out, 37, MASKED={masked}, BLOCK=64)
assert torch.equal(out[:27], x[:27])
"""


@pytest.mark.parametrize("way", ["behind", "before"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_load_out_of_bounds_ends_the_process(way, masked, tmp_path):
    file = tmp_path / "kernel.py"  # Triton reads a kernel's source
    file.write_text(KERNEL.replace("{way!r}", repr(way)).replace("{masked}", str(masked)), encoding="utf-8")
    done = launch.program(file)
    assert (done.returncode == 0) == masked, done.stderr
    assert masked or done.returncode < 0  # by a signal


def test_programs_run_last_to_first_in_memory_that_is_no_number():
    from triton.runtime.interpreter import InterpreterBuilder

    with hostile("order"):
        builder = InterpreterBuilder()
        builder.grid_dim = (3, 1, 5)
        builder.set_grid_idx(0, 0, 1)
        assert builder.grid_idx == (2, 0, 3)
        assert torch.empty(7).isnan().all()
    builder.set_grid_idx(0, 0, 1)
    assert builder.grid_idx == (0, 0, 1)
    assert not torch.are_deterministic_algorithms_enabled()
