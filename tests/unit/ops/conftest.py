"""Every test with a ``backend`` runs on each back end of its module's OP, on the CPU once per instruction set."""

import importlib.util
import math

import jaxtyping
import numpy as np
import pytest

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


@pytest.fixture(scope="session", autouse=True)
def bfloat16_as_a_gpu_computes_it():
    """Mends Triton's interpreter: it makes a bfloat16 by cutting a float32, and multiplies bfloat16 tiles as integers.

    A GPU rounds to nearest, ties to even, and sums products of bfloat16 in float32.
    """
    if importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(values, given, wanted, mode):
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(values, given, wanted, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def dot_of_floats(builder, a, b, *rest):
        wide = (builder.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(builder, *wide, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_floats)
        yield


@pytest.fixture
def own_checks(monkeypatch):
    """Turns off the shape annotations that tests check, so that an op's own error is what a user would see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
