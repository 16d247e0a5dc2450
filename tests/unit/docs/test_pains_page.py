"""docs/pains.md names tests that exist, and each of the fifteen has one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def defined_tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}


def named_tests() -> list[str]:
    return re.findall(r"`(test_\w+)`", (ROOT / "docs" / "pains.md").read_text())


def test_the_page_names_tests_that_exist() -> None:
    assert set(named_tests()) - defined_tests() == set()


def test_each_pain_has_a_test_of_its_name_and_each_such_test_is_on_the_page() -> None:
    pains = {name for name in defined_tests() if re.match(r"test_pain_\d\d_", name)}
    assert {int(name[10:12]) for name in pains} == set(range(1, 16))
    assert pains <= set(named_tests())
