"""A device that is not there: tensors in host memory that claim to be on a GPU, and a count of what crosses.

An operation or a kernel on tensors of the host and of the device fails, as it does on a GPU, but for scalars. Triton's
kernels of serving run in its interpreter, and those of other families that a test names.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import veneer.ops.triton
from veneer.ops import dispatch

DEVICE = torch.device("cuda", 0)
_SDPA = torch.nn.functional.scaled_dot_product_attention
_WAITS = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero"}  # for the host's sake
_MAKES = {
    getattr(torch, name)
    for name in ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like")
}
SERVING = {"pairs", "paged_attention", "sample"}
_READS = {torch.tensor, torch.as_tensor}  # values of the host


class OnDevice(Tensor):
    """Tensor of the device; ``host`` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.host = host.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        Crossings.now.read += 1
        return self.host.tolist()

    def item(self) -> Any:
        Crossings.now.read += 1
        return self.host.item()

    def __int__(self) -> int:
        return int(self.tolist())

    __index__ = __int__

    def __float__(self) -> float:
        return float(self.tolist())

    def __bool__(self) -> bool:
        return bool(self.tolist())

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.host})"


class Crossings:
    """Copies to the device and back, each of which the host waits for."""

    now: Crossings

    def __init__(self) -> None:
        self.sent = self.read = 0


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    device, name = kwargs.get("device"), func._schema.name.partition("::")[2]
    mixed = [tuple(x.shape) for x in tensors if _is_apart(x)]
    if mixed:
        raise AssertionError(f"{func} reads tensors of the host, {mixed}, beside those of the device")
    if name in _WAITS or name == "_local_scalar_dense" or _goes_by_masks(name, args):
        Crossings.now.read += 1
    leaves = name == "_to_copy" and device is not None and torch.device(device).type == "cpu"
    Crossings.now.read += leaves
    args, kwargs = tree_unflatten([_values(x) if isinstance(x, Tensor) else x for x in flat], spec)
    out = func(*args, **kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {}))
    if leaves:
        return out
    known = {id(x.host): x for x in tensors if isinstance(x, OnDevice)}
    return tree_map(lambda y: _wrapped(y, known) if isinstance(y, Tensor) else y, out)


def _wrapped(y: Tensor, known: dict[int, OnDevice]) -> OnDevice:
    """The tensor itself that was changed in place, or a new one."""
    return known[id(y)] if id(y) in known else OnDevice(y)


def _goes_by_masks(name: str, args: Any) -> bool:
    """Return True if an index is made of a mask, whose entries are counted on the host."""
    places = args[1] if name in ("index", "index_put_", "index_put") else ()
    return any(x is not None and x.dtype == torch.bool for x in places)


def _values(x: Tensor) -> Tensor:
    return x.host if isinstance(x, OnDevice) else x


def _count(sent: bool) -> None:
    Crossings.now.sent += sent
    Crossings.now.read += not sent


class _Machine(TorchFunctionMode):
    """Calls that name the device, which torch would look for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if func is Tensor.cpu:
            return _moved(args[0], torch.device("cpu"))
        if func is _SDPA and isinstance(args[0], OnDevice):  # no wrapped tensor gets through it
            return OnDevice(func(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()}))
        if func is Tensor.copy_:
            return _copied(*args[:2])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnDevice):
            return _indexed(func, *args)
        kwargs.pop("pin_memory", None)  # only where there is a GPU
        named = kwargs.get("device")
        if named is None or torch.device(named).type != "cuda":
            return func(*args, **kwargs)
        if func not in _MAKES | _READS:  # of a tensor that is there
            del kwargs["device"]
            return func(*args, **kwargs)
        Crossings.now.sent += func in _READS
        made = func(*(tree_map(_plain, args)), **kwargs | {"device": "cpu"})
        return OnDevice(made)


def _plain(x: Any) -> Any:
    return x.host if isinstance(x, OnDevice) else x


def _moved(x: Tensor, *how: Any, **named: Any) -> Tensor:
    """``x.to(…)``."""
    given = [*how, *named.values()]
    device = next((torch.device(each) for each in given if isinstance(each, (torch.device, str))), x.device)
    device = next((each.device for each in given if isinstance(each, Tensor)), device)
    dtype = next((each for each in given if isinstance(each, torch.dtype)), x.dtype)
    if device.type == x.device.type:
        return x if dtype == x.dtype else torch.ops.aten._to_copy(x, dtype=dtype)
    _count(device.type == "cuda")
    host = _values(x).to(dtype).clone()
    return OnDevice(host) if device.type == "cuda" else host


def _copied(x: Tensor, source: Tensor) -> Tensor:
    """``x.copy_(source)``."""
    if isinstance(x, OnDevice) != isinstance(source, OnDevice) and source.dim():
        _count(isinstance(x, OnDevice))
    _values(x).copy_(_values(source))
    return x


def _indexed(func: Any, x: OnDevice, index: Any, *value: Any) -> Any:
    """``x[index]``, and the assignment to it, which torch begins on the device itself."""
    places = index if isinstance(index, tuple) else (index,)
    if any(isinstance(each, list) or (isinstance(each, Tensor) and _is_apart(each)) for each in (*places, *value)):
        raise AssertionError(f"an index or a value of the host meets the device: {places}, {value}")
    Crossings.now.read += any(isinstance(each, Tensor) and each.dtype == torch.bool for each in places)
    found = func(x.host, tree_map(_plain, index), *map(_plain, value))
    return found if found is None else OnDevice(found)


def _is_apart(x: Tensor) -> bool:
    """Return True for a tensor of the host that is no scalar."""
    return not isinstance(x, OnDevice) and x.dim() > 0


@contextmanager
def stand_in(families: Collection[str] = SERVING) -> Iterator[Crossings]:
    """In this context there is a device, of which the interpreter of Triton computes these families of kernels."""
    with pytest.MonkeyPatch.context() as patch, _Machine():
        names = [found.name for found in pkgutil.iter_modules(veneer.ops.triton.__path__)]
        for module in [import_module(f"veneer.ops.triton.{name}") for name in names]:  # all, before one is patched
            if hasattr(module, "launch"):
                patch.setattr(module, "launch", _on_host(module.launch))
        find = dispatch._find
        patch.setattr(dispatch, "_find", lambda op, backend: find(op, _backend(op, backend, families)))
        Crossings.now = Crossings()
        yield Crossings.now


def _backend(op: str, backend: str, families: Collection[str]) -> str:
    """The back end that is taken: torch's own code for the other families, which are much faster so."""
    return "reference" if backend == "triton" and op.partition(".")[0] not in families else backend


def _on_host(launch: Any) -> Any:
    def launched(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if apart := [tuple(x.shape) for x in args if isinstance(x, Tensor) and not isinstance(x, OnDevice)]:
            raise AssertionError(f"{kernel} reads tensors of the host, {apart}")
        launch(kernel, grid, *map(_plain, args), **options)

    return launched


def put_on_device(model: nn.Module) -> None:
    """Move a model to the device."""
    made: dict[int, OnDevice] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None:
                    held[name] = made.setdefault(id(x), OnDevice(x.detach()))  # type: ignore[assignment]
