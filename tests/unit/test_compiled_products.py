"""torch and oneDNN keep little of products of 16 bits, of which they compile one for each shape."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
MANY_LENGTHS = """
import ctypes
import torch
import veneer
from veneer.model.memory.heap import _MallocInfo

def in_use():
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _MallocInfo
    return ask().uordblks

w, before = torch.ones(1536, 577, dtype=torch.bfloat16), None
for m in range(40, 640):
    torch.ones(m, 577, dtype=torch.bfloat16) @ w.T
    before = in_use() if m == 80 else before
assert in_use() - before < 20_000_000, in_use() - before
"""


def run(code: str, **given: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_few_are_kept_unless_the_user_says_otherwise() -> None:
    tell = f"import os, veneer; print(*(os.environ[name] for name in {NAMES}))"
    assert run(tell).stdout == "32 32\n"
    assert run(tell, LRU_CACHE_CAPACITY="7").stdout == "7 32\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's mallinfo2")
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN compiles no product of 16 bits here"
)
def test_products_of_many_lengths_hold_little() -> None:
    found = run(MANY_LENGTHS)
    assert found.returncode == 0, found.stderr
