"""Triton's compiler accepts every kernel, although no GPU is there: values are tested in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
REFUSED = """
import sys, triton_forms
def refuse(): raise RuntimeError("PassManager::run failed")
triton_forms.cases = lambda dtype, quick: [("a form", refuse)]
sys.argv[1:] = ["90", "--quick"]
triton_forms.main()
"""


def test_every_kernel_compiles_for_ampere():
    pytest.importorskip("triton", reason="needs the package triton")
    done = subprocess.run(
        [sys.executable, SCRIPTS / "compile_triton.py", "--quick", "--capability", "8.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "registers" in done.stdout


def test_a_refused_form_and_a_kernel_without_one_are_named():
    pytest.importorskip("triton", reason="needs the package triton")
    env = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bfloat16 a form is refused: RuntimeError: PassManager::run failed" in done.stderr
    assert "no form of veneer.ops.triton.four_bit._quantize_kernel compiles" in done.stderr
