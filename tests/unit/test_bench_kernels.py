"""bench/kernels.py does not hide the package of its name from libraries that another bench script imports."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def imported(*places: Path, code: str) -> str:
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in places]!r}", code]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True).stdout


def test_an_installed_package_called_kernels_is_the_one_that_is_imported(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("answer = 41\n")
    assert imported(BENCH, tmp_path, code="import kernels; print(kernels.answer + 1)") == "42\n"


def test_transformers_sees_no_package_in_the_script():
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert imported(BENCH, code=code) == imported(code=code)
