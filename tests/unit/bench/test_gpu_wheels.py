"""scripts/gpu_wheels.py gathers what a machine lacks, and one library of bitsandbytes' many."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_wheels", ROOT / "scripts" / "gpu_wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_packages_need_is_followed_to_its_end(script: ModuleType) -> None:
    needed = script.needed(("datasets>=3", "no-such-package"), "3.12")
    assert {"datasets", "pyarrow", "no-such-package", "tqdm"} <= needed
    assert "torch" not in needed  # of an extra
    assert script.needed(("datasets; python_version < '3.12'",), "3.12") == set()


def test_a_frozen_list_names_packages_in_every_form(script: ModuleType) -> None:
    text = "Torch==2.11.0+cu130\n# a comment\ntyping_extensions @ file:///x.whl\n-e git+https://x\n"
    assert script.frozen(text) == {"torch", "typing-extensions"}


def test_a_wheel_is_trimmed_to_the_library_of_one_cuda_version(script: ModuleType, tmp_path: Path) -> None:
    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cuda126", "cuda130", "rocm72", "xpu")]
    record = "".join(f"{name},sha256=x,1\n" for name in [*names, "bitsandbytes/__init__.py"])
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in [*names, "bitsandbytes/__init__.py"]:
            made.writestr(name, "x")
        made.writestr("bitsandbytes-1.dist-info/RECORD", record)
    script.trim(wheel, "130")
    with zipfile.ZipFile(wheel) as kept:
        files = ["bitsandbytes/libbitsandbytes_cuda130.so", "bitsandbytes/__init__.py"]
        assert kept.namelist() == [*files, "bitsandbytes-1.dist-info/RECORD"]
        lines = kept.read("bitsandbytes-1.dist-info/RECORD").decode().splitlines()
    assert [line.partition(",")[0] for line in lines] == files
