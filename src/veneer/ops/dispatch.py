"""Choice of an op's back end: by the tensors' device and by the back ends built, never by an environment variable."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from veneer.errors import BackendError

BACKENDS = ("triton", "cpu", "reference")
MOST_ROWS_BY_CODES = 16  # on a GPU torch multiplies more rows faster, with the weight decoded whole
_DEVICES = {"triton": "cuda", "cpu": "cpu"}
_PRODUCTS = ("attention", "grouped_low_rank", "pairs", "paged_attention")  # families whose kernels multiply tiles
_TENSOR_CORES = (8, 0)  # the first compute capability of which Triton uses them
_CODES = ("ggml", "scaled", "packed_codes")  # families of weights in codes

log = logging.getLogger(__name__)


def implementation(op: str, device: torch.device, backend: str | None = None) -> Callable[..., Any]:
    """Return the function that computes ``"family.name"`` on a device: that of the named ``backend``, or of the fastest
    available one for None.

    Raises BackendError if the named back end is not available. If the reference replaces a kernel, the reason is logged
    once, on a GPU as a warning with its cost.
    """
    if backend is not None:
        return _load(op, backend, device)
    kernel = next((b for b, kind in _DEVICES.items() if kind == device.type), None)
    if kernel is not None:
        found, reason = _find(op, kernel)
        if found is not None:
            return found
        _log_fallback(op, kernel, reason)
    return _load(op, "reference", device)


def backends(op: str) -> tuple[str, ...]:
    """Return the back ends that can compute ``"family.name"`` in this installation, fastest first."""
    return tuple(b for b in BACKENDS if _find(op, b)[0] is not None)


def lacks(op: str, backend: str) -> str:
    """Return the reason why a back end cannot compute ``"family.name"`` here; empty if it can."""
    return _find(op, backend)[1]


@functools.cache
def slow_products() -> str:
    """Return the reason why Triton's products are refused on this machine's GPUs in favour of torch's; empty if they
    are not.
    """
    if not torch.cuda.is_available() or interprets_triton():
        return ""
    found = (torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count()))
    oldest = min(found, default=_TENSOR_CORES)
    if oldest >= _TENSOR_CORES:
        return ""
    return "Triton uses tensor cores from compute capability 8.0 on, and a GPU here has {}.{}".format(*oldest)


def availability() -> dict[str, str]:
    """Return "available", or the reason why not, for each back end."""
    return {b: _missing(b) or "available" for b in BACKENDS}


def kernel_build() -> str:
    """Return one line: the kernels' instruction set here, those that are built, and the threads of the kernels."""
    if importlib.util.find_spec("veneer._kernels") is None:
        return "none: the C++ module was not built"
    return str(importlib.import_module("veneer.ops.cpu.module").description())


def kernel_isa() -> str:
    """Return the instruction set that the C++ kernels use here; empty if they were not built."""
    if importlib.util.find_spec("veneer._kernels") is None:
        return ""
    return str(importlib.import_module("veneer._kernels").isa())


def interprets_triton() -> bool:
    """Return True if Triton is configured to run its kernels in its interpreter, on tensors of any device."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def _load(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown; there are {list(BACKENDS)}")
    found, reason = _find(op, backend)
    if found is None:
        raise BackendError(f"backend {backend!r} cannot compute {op}: {reason}; available: {list(backends(op))}")
    reads = _DEVICES.get(backend, device.type)
    if reads != device.type and not (backend == "triton" and interprets_triton()):
        raise BackendError(
            f"backend {backend!r} computes {op} on {reads} tensors; given tensors on {device.type}: move them there, "
            "or leave backend out"
        )
    return found


@functools.cache
def _find(op: str, backend: str) -> tuple[Callable[..., Any] | None, str]:
    family, _, name = op.partition(".")
    missing = _missing(backend) or (slow_products() if backend == "triton" and family in _PRODUCTS else "")
    if missing:
        return None, missing
    module = _module(backend, family)
    function = getattr(module, name, None) if module else None
    return function, "" if function else f"it has no kernel for {op}"


def _module(backend: str, family: str) -> ModuleType | None:
    full = f"veneer.ops.{backend}.{family}"
    return importlib.import_module(full) if importlib.util.find_spec(full) else None


@functools.cache
def _missing(backend: str) -> str:
    if backend == "cpu" and importlib.util.find_spec("veneer._kernels") is None:
        return "the C++ module was not built (no C++ compiler when veneer was installed)"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if backend == "triton" and not (torch.cuda.is_available() or interprets_triton()):
        return "there is no CUDA device (with TRITON_INTERPRET=1 Triton's interpreter runs the kernels, slowly)"
    return ""


@functools.cache
def _log_fallback(op: str, backend: str, reason: str) -> None:
    if _DEVICES[backend] == "cpu":
        log.info("%s runs on the torch reference: %s back end: %s", op, backend, reason)
        return
    cost = "about 50 times" if op.partition(".")[0] in _CODES else "several times"
    log.warning(
        "%s runs on the torch reference on the GPU, which takes %s as long as a kernel (estimated): %s back end: %s",
        op, cost, backend, reason,
    )  # fmt: skip
