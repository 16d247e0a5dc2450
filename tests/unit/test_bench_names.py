"""A script in bench/ does not hide a package of its name from libraries that another script there imports."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
ASKED_FOR = {"kernels"}  # what libraries look for without needing it


def imported(*places: Path, code: str) -> str:
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in places]!r}", code]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True).stdout


def test_no_script_has_the_name_of_a_package():
    names = {path.stem for path in BENCH.glob("*.py")}
    assert names
    assert not names & (ASKED_FOR | packages_distributions().keys() | sys.stdlib_module_names)


def test_transformers_sees_no_package_in_the_scripts():
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert imported(BENCH, code=code) == imported(code=code)
