"""Array shapes and dtypes that the core and the kernel boundary declare are checked while the tests run.

Configs are left out: what a user may pass is checked by the configs themselves, and tested as such.
Triton's kernels are left out too: Triton reads their source, and no other decorator may stand between.
They run in Triton's interpreter, on any machine.
So is the dispatch of traced tensors and of those on the meta device left out: it declares no shapes.

A red run can be repeated: each test draws from torch's generator by a seed of its own name. Hypothesis keeps what it
found in ``.hypothesis`` and prints it; with ``CI`` set it draws the same examples in each run.
"""

import gc
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings

import looping
from known_machine import know_the_machine
from sampling import mark_full, without_repeats
from shapes import check_shapes

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts jobs in the background so: tests interrupt runs
    signal.signal(signal.SIGINT, signal.default_int_handler)

OPS = Path(__file__).parents[1] / "src" / "veneer" / "ops"
CHECKED = [
    *(f"records.{name}" for name in ("deltas", "frozen", "linear", "sites", "token_rows")),
    *(f"records.terms.{term}" for term in ("pair", "rotation", "scale")),
    *(
        f"ops.{path.stem}"
        for path in sorted(OPS.iterdir())
        if path.stem not in ("__init__", "triton", "traced", "meta")
    ),
    "quant",
]

check_shapes([f"veneer.{name}" for name in CHECKED])

LONG = tuple(f"tests/{folder}/" for folder in ("e2e", "unit/train", "unit/plan", "unit/bench"))
"""Folders of tests that take seconds each: they come first, so that no process waits for one at the end."""
CPU = pytest.StashKey[float]()
SHARED = 100_000  # objects: imported modules and collected tests alone are several times as many


settings.register_profile(
    "veneer",
    deadline=None,  # neither of them is about the code: both depend on what else the machine does
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
    derandomize="CI" in os.environ,
)
settings.load_profile("veneer")


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item):
    item.stash[CPU] = sum(os.times()[:4])
    torch.default_generator.manual_seed(crc32(item.nodeid.encode()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Keep the seconds of CPU, of children that were waited for too, beside the time in a report for ``--junitxml``."""
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu", round(sum(os.times()[:4]) - item.stash[CPU], 2)))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Let a shared fixture draw by its own name: another test may ask for it first."""
    if fixturedef.scope == "function":
        return (yield)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(crc32(f"{fixturedef.baseid}::{fixturedef.argname}".encode()))
    try:
        return (yield)
    finally:
        torch.set_rng_state(state)


def pytest_generate_tests(metafunc):
    if not hasattr(metafunc.module, "OP"):  # tests of an op have back ends too: tests/unit/ops/conftest.py
        looping.parametrize(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    return looping.run(pyfuncitem) or None


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    items[:], left = without_repeats(items)
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    config.hook.pytest_deselected(items=left)
    mark_full(items)


@pytest.fixture(scope="module", autouse=True)
def shared_is_frozen():
    """Freeze what all tests share, at first and when a test gave it back: each full collection looked through it."""
    if gc.get_freeze_count() < SHARED:  # once for a file: the objects are counted one by one
        gc.collect()
        gc.freeze()


def pytest_unconfigure():
    for process in multiprocessing.active_children():
        process.kill()  # what a failed test left running: Python would wait for its end
    gc.unfreeze()  # what is frozen when Python ends counts as leaked


@pytest.fixture
def known_machine(monkeypatch):
    know_the_machine(monkeypatch.setattr)


@pytest.fixture
def toy(dropped_method):
    """The method of CONTRIBUTING.md dropped into the folder of methods, and nothing else."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)  # behind it stands a family of decoders
    return dropped_method("toy", source)


@pytest.fixture
def dropped_method(tmp_path, monkeypatch):
    """Drop a file into the folder of methods for the time of a test: name and source to the method's config."""
    from veneer import methods

    names = []

    def drop(name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
        methods.all_methods.cache_clear()
        names.append(f"veneer.methods.{name}")
        return methods.all_methods()[name.upper()]

    yield drop
    monkeypatch.undo()
    methods.all_methods.cache_clear()
    for name in names:
        sys.modules.pop(name, None)
