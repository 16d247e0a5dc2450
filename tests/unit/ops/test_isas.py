"""Instruction sets: which a family is built for, and which build of it runs."""

import re
from pathlib import Path

import pytest

from veneer.ops.cpu.module import description, kernels

CSRC = Path(__file__).parents[3] / "csrc"
ORDER = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
OWN = {"avx512_bf16": ("__AVX512BF16__", "__AVX512VBMI__"), "amx": ("__AMX_BF16__",)}
"""The sets for which some families have no code of their own, and what such code asks for."""


def listed(name):
    """A list of CMakeLists.txt."""
    found = re.search(rf"set\({name} ([^)]*)\)", (CSRC / "CMakeLists.txt").read_text())
    return found[1].split()


def code_of(path, seen):
    """A file of C++ and all that it includes of this folder."""
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text()
    within = re.findall(r'#include "([^"]+)"', text)
    return text + "".join(code_of(CSRC / name, seen) for name in within if (CSRC / name).exists())


FAMILIES = listed("VENEER_FAMILIES")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_for_a_set_that_its_code_asks_for(family):
    code = code_of(CSRC / family / "kernels.cpp", set())
    for isa, macros in OWN.items():
        assert (family in listed(f"VENEER_OWN_{isa}")) == any(macro in code for macro in macros), isa


@pytest.fixture(params=kernels().isas())
def isa(request):
    before = kernels().isa()
    kernels().use_isa(request.param)
    yield request.param
    kernels().use_isa(before)


def test_the_best_build_of_each_family_runs(isa):
    first, *others = kernels().built_isas()  # on ARM64 the first is called neon
    allowed = [name for name in others if ORDER.index(name) <= ORDER.index(isa)] if isa != first else []
    expected = {
        family: [first, *(name for name in allowed if name not in OWN or family in listed(f"VENEER_OWN_{name}"))][-1]
        for family in FAMILIES
    }
    assert kernels().builds() == expected


def test_what_is_built_and_what_runs_here():
    built, usable = kernels().built_isas(), kernels().isas()
    assert usable[0] == built[0]
    assert [isa for isa in built if isa in usable] == usable
    assert f"(built: {', '.join(built)})" in description()


def test_unknown_sets_are_refused():
    before = kernels().isa()
    with pytest.raises(ValueError, match="no such instruction set"):
        kernels().use_isa("avx3")
    assert kernels().isa() == before
