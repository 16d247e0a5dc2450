"""Every test with a ``backend`` runs on each back end of its module's OP, on the CPU once per instruction set."""

import math

import jaxtyping
import pytest

from interpreter import mended_interpreter
from veneer.ops.cpu.module import kernels
from veneer.ops.dispatch import backends


def pytest_generate_tests(metafunc):
    op = getattr(metafunc.module, "OP", None)
    if op is not None and "backend" in metafunc.fixturenames:
        others = [b for b in backends(op) if b != "cpu"]
        sets = [f"cpu-{isa}" for isa in kernels().isas()] if "cpu" in backends(op) else []
        metafunc.parametrize("backend", others + sets, indirect=True)


@pytest.fixture
def backend(request):
    """The name of a back end; for the CPU, the instruction set is chosen too and put back.

    A kernel that leaves MMX registers in use makes fmod raise in this thread from then on.
    """
    name, _, isa = request.param.partition("-")
    before = kernels().isa() if isa else None
    if isa:
        kernels().use_isa(isa)
    yield name
    assert math.fmod(5.5, 2.0) == 1.5
    if before is not None:
        kernels().use_isa(before)


@pytest.fixture(scope="module", autouse=True)
def mended():
    with mended_interpreter():
        yield


@pytest.fixture
def own_checks(monkeypatch):
    """Turns off the shape annotations that tests check, so that an op's own error is what a user would see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
