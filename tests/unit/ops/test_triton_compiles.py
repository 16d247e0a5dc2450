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

STEPS = """
import triton_forms, torch, triton
from veneer.ops.pairs import FactorPair, PackedPairs, Segment, Segments
from veneer.ops.paged_attention import PagedRows, PagedStore
from veneer.ops.triton import paged_attention, pairs

triton.runtime.driver.set_active(triton_forms.NoDevice(90))
store, found = PagedStore.zeros(40, 16, (2, 3, 64), dtype=torch.bfloat16), {}
packed = PackedPairs.pack([FactorPair(torch.zeros(16, 64), torch.zeros(192, 16), 1.0)], (192,), dtype=torch.bfloat16)
for n in (1, 2, 3, 16):
    x, y = (torch.empty(n, wide, dtype=torch.bfloat16) for wide in (64, 192))
    kv = torch.empty(n, 3, 64, dtype=torch.bfloat16)
    segments = Segments.of([Segment(packed, 0, n)])
    rows = PagedRows.of([(range(2 * i, 2 * i + 2), 5, 1) for i in range(n)], store)
    for step in (lambda: pairs.add(x, segments, [y]), lambda: paged_attention.append(store, 1, kv, kv, rows)):
        for kernel, made in triton_forms._compiled(step):
            found.setdefault(kernel.__name__, {})[id(made)] = made
print({name: len(variants) for name, variants in sorted(found.items())})
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


def test_batches_of_other_sizes_compile_nothing_anew():
    pytest.importorskip("triton", reason="needs the package triton")
    env = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", STEPS], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "{'_append_kernel': 1, '_expand_kernel': 1, '_shrink_kernel': 1}\n", done.stderr[-2000:]
