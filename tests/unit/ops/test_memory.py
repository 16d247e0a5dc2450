"""Kernels read addresses: whatever has no plain values there is refused. In a process of its own, which may crash."""

import json
from pathlib import Path

import pytest
import torch

import veneer.ops.cpu
from launch import program
from veneer.errors import TensorError
from veneer.ops.memory import address

SCRIPT = Path(__file__).with_name("odd_tensors.py")
FAMILIES = sorted({p.stem for p in Path(veneer.ops.cpu.__path__[0]).glob("*.py")} - {"__init__", "module", "dtypes"})
KINDS = {
    "fake": "a FakeTensor",
    "distributed": "a DTensor",
    "wrapped": "a TwoTensor",
    "functional": "a tensor without memory",
    "freed": "a tensor without memory",
    "batched": "a tensor without memory",
    "negated": "a tensor whose values are read with the other sign",
    "meta": "a tensor on meta",
}


@pytest.fixture(scope="module")
def outcomes():
    """The answers of every kernel to every kind of tensor in each place: (back end, op, place, kind, said)."""
    done = program(SCRIPT)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-4000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_family_is_asked(outcomes):
    assert sorted({op.partition(".")[0] for backend, op, *_ in outcomes if backend == "cpu"}) == FAMILIES
    assert {kind for _, _, _, kind, _ in outcomes} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_no_plain_memory_is_refused(outcomes, family, kind):
    asked = [line for line in outcomes if line[3] == kind and line[1].startswith(f"{family}.")]
    assert asked
    for line in asked:
        assert f"kernels read plain tensors in memory; given {KINDS[kind]}" in line[4], line


def test_plain_tensors_and_subclasses_that_own_their_values():
    class Named(torch.Tensor):
        pass

    x = torch.randn(3, 5)
    for same in (x, torch.nn.Parameter(x), x.as_subclass(Named), x.T, x[0]):
        assert address(same) == x.data_ptr()
    assert address(x[1:]) == x.data_ptr() + 5 * x.element_size()
    assert address(torch.empty(0, 5)) == 0


def test_a_layout_without_rows_in_memory_is_refused():
    with pytest.raises(TensorError, match=r"laid out as torch.sparse_coo.*to_dense\(\)"):
        address(torch.eye(3).to_sparse())
    with pytest.raises(TensorError, match="on cpu; the kernels here read memory of cuda"):
        address(torch.eye(3), "cuda")
