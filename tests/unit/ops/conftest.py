"""Every test with a ``backend`` runs on each back end of its module's OP, on the CPU once per instruction set."""

import math
from contextlib import contextmanager

import jaxtyping
import pytest

import looping
from interpreter import mended_interpreter
from veneer.ops.cpu.module import kernels
from veneer.ops.dispatch import backends


def pytest_generate_tests(metafunc):
    op = getattr(metafunc.module, "OP", None)
    if op is not None:
        run_on = backends_of(op, metafunc.definition) if "backend" in metafunc.fixturenames else []
        looping.parametrize(metafunc, run_on)


def backends_of(op, test):
    left_out = ("cpu", "triton") if test.get_closest_marker("not_interpreted") else ("cpu",)
    others = [b for b in backends(op) if b not in left_out]
    return others + ([f"cpu-{isa}" for isa in kernels().isas()] if "cpu" in backends(op) else [])


@contextmanager
def chosen(backend):
    """The name of a back end; for the CPU, the instruction set is chosen too and put back.

    A kernel that leaves MMX registers in use makes fmod raise in this thread from then on.
    """
    name, _, isa = backend.partition("-")
    before = kernels().isa() if isa else None
    if isa:
        kernels().use_isa(isa)
    try:
        yield name
    finally:
        assert math.fmod(5.5, 2.0) == 1.5
        if before is not None:
            kernels().use_isa(before)


@pytest.fixture
def backend(request):
    with chosen(request.param) as name:
        yield name


@pytest.fixture
def every_backend(request):
    """The back ends one after the other, for a test that draws what it compares them with."""

    def names():
        for each in backends_of(request.module.OP, request.node):
            with chosen(each) as name:
                yield name

    return names


@pytest.fixture(scope="module", autouse=True)
def mended():
    with mended_interpreter():
        yield


@pytest.fixture
def own_checks(monkeypatch):
    """Turns off the shape annotations that tests check, so that an op's own error is what a user would see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
