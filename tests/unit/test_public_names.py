"""The public names: sorted, importable, and cheap to reach."""

import subprocess
import sys

import pytest

import veneer


def test_all_is_sorted_and_complete() -> None:
    assert veneer.__all__ == sorted(veneer.__all__)
    assert set(veneer.__all__) == set(veneer._HOMES)


@pytest.mark.parametrize("name", veneer.__all__)
def test_each_name_is_there(name: str) -> None:
    assert getattr(veneer, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoraKonfig'"):
        _ = veneer.LoraKonfig


def test_import_veneer_does_not_import_torch() -> None:
    code = "import sys, veneer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
