"""The public names: sorted, importable, and cheap to reach."""

import logging
import subprocess
import sys
import types

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


def test_an_import_hides_what_another_library_tells_of_its_own_kernels_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    caplog.set_level(logging.WARNING, logger=log.name)
    monkeypatch.setattr(log, "disabled", False)  # a configuration of logging turns off all that there is
    monkeypatch.setattr(log, "propagate", True)

    def imported(home: str) -> types.SimpleNamespace:
        log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please …", "no kernels")
        log.warning("another trouble")
        return types.SimpleNamespace(fetch=home)

    monkeypatch.setattr(veneer.importlib, "import_module", imported)
    assert veneer.fetch == "veneer.store.fetch"
    log.warning("Failed to load CPU gemm_4bit_forward, asked for by the user")
    told = ["another trouble", "Failed to load CPU gemm_4bit_forward, asked for by the user"]
    assert [record.getMessage() for record in caplog.records] == told
