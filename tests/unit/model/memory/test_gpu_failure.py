"""A GPU without room, lost, or that cannot be used: one sentence says what is wrong and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from veneer.errors import DeviceError, OutOfMemoryError
from veneer.model.memory import gpu_failure as module
from veneer.model.memory.default_device import default_device, told_device
from veneer.model.memory.gpu_failure import gpu_failure, unusable_gpu

OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version. (Triggered internally at c10/cuda/CUDAFunctions.cpp:108.)"
)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory: 2 GiB.\nSee X"),
            OutOfMemoryError,
            "memory: 2 GiB.*fewer rows",
        ),
        (
            torch.AcceleratorError("CUDA error: illegal access\nFor debugging"),
            DeviceError,
            "access: .*nvidia-smi",
        ),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nFor"),
            DeviceError,
            "no code for the GPU. Install a torch that has, or set CUDA_VISIBLE_DEVICES= to compute on the CPU$",
        ),
        (RuntimeError(OLD_DRIVER), DeviceError, "update the driver"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check"), DeviceError, "install NVIDIA's driver"),
    ],
)
def test_an_error_of_a_gpu_is_told_with_its_remedy(error: Exception, kind: type[Exception], told: str) -> None:
    failure = gpu_failure(error)
    assert failure is not None
    assert "debugging" not in str(failure)
    with pytest.raises(kind, match=told):
        raise failure


def test_other_errors_stay() -> None:
    for error in (RuntimeError("shapes differ"), ValueError("CUDA error"), KeyboardInterrupt(), MemoryError()):
        assert gpu_failure(error) is None


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], None]:
    """torch finds no GPU, and warns; it is built for a version of CUDA."""

    def given(warned: str, cuda: str | None) -> None:
        def is_available() -> bool:
            if warned:
                warnings.warn(warned, stacklevel=1)
            return False

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return given


def test_a_driver_that_is_too_old_is_told_where_the_cpu_computes(
    without_gpu: Callable[[str, str | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    without_gpu(OLD_DRIVER, "13.0")
    assert default_device() == torch.device("cpu")
    (record,) = caplog.records
    assert record.getMessage() == (
        "the CPU computes, not the GPU: The NVIDIA driver on your system is too old (found version 11040): update the "
        "driver, or install a torch for an older CUDA, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
    )


def test_another_failure_to_start_is_told(without_gpu: Callable[[str, str | None], None]) -> None:
    without_gpu("CUDA initialization: CUDA unknown error - the environment may be incorrect. Setting", "13.0")
    assert unusable_gpu() == ("CUDA unknown error - the environment may be incorrect: nvidia-smi tells more")


def test_a_machine_without_a_driver_has_no_gpu_and_needs_no_word(
    without_gpu: Callable[[str, str | None], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "version")
    for cuda in ("13.0", None):
        without_gpu("", cuda)
        assert unusable_gpu() == ""


def test_a_torch_for_cpus_is_told_where_there_is_a_driver(
    without_gpu: Callable[[str, str | None], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "version")
    without_gpu("", None)
    assert unusable_gpu() == "this build of torch has no CUDA: install one that has"


def test_one_of_two_cards_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    for count, told in ((1, "cuda:0, H100"), (2, "cuda:0, H100, one of 2")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert told_device(torch.device("cuda", 0)) == told
