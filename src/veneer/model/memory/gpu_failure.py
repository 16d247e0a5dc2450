"""Recognizes errors of a GPU that a user can solve: no memory, a lost card, a driver or a card that is too old."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from veneer.errors import DeviceError, OutOfMemoryError, VeneerError

_DRIVER = Path("/proc/driver/nvidia/version")  # of a machine with NVIDIA's driver
_ON_CPU = "or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
_REMEDIES = {  # by a part of the error's text
    "no kernel image": f"this build of torch has no code for the GPU. Install a torch that has, {_ON_CPU}",
    "driver on your system is too old": f"update the driver, or install a torch for an older CUDA, {_ON_CPU}",
    "Found no NVIDIA driver": f"install NVIDIA's driver, {_ON_CPU}",
}
_LOST = (
    "the GPU is lost to this process. Look at it with nvidia-smi (dmesg tells its Xid errors), reset it or choose "
    "another by CUDA_VISIBLE_DEVICES, and start again"
)


def gpu_failure(error: BaseException) -> VeneerError | None:
    """Convert an error of a GPU to OutOfMemoryError or DeviceError with a remedy. Return None for any other error."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError(f"the GPU has no memory left: {said}. {_smaller()}")
    if not isinstance(error, RuntimeError):
        return None
    remedy = next((remedy for part, remedy in _REMEDIES.items() if part in str(error)), "")
    if remedy:
        return DeviceError(f"{said.rstrip('.')}: {remedy}")
    return DeviceError(f"{said}: {_LOST}") if isinstance(error, torch.AcceleratorError) else None


def _smaller() -> str:
    return (
        "Train fewer rows at once (training.per_device_train_batch_size, with gradient_accumulation_steps), shorter "
        "ones (max_length), or a base in 4 bits (model.quantization: nf4); `veneer plan` tells what fits. Serve with a "
        "smaller --kv-gib"
    )


def unusable_gpu() -> str:
    """Return why a GPU of this machine cannot be used, with a remedy; empty if it can be used, or there is none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch has no CUDA: install one that has" if _DRIVER.exists() else ""
    for each in map(str, (warning.message for warning in said)):
        if "CUDA initialization" in each:
            reason = each.partition("CUDA initialization:")[2].partition("(Triggered")[0].strip().partition(". ")[0]
            remedy = next((remedy for part, remedy in _REMEDIES.items() if part in each), "nvidia-smi tells more")
            return f"{reason.rstrip('.')}: {remedy}"
    return ""
