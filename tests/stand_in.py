"""A device that is not there: tensors in host memory that claim to be on a GPU, and a count of what it is asked.

C++ sees tensors of the CPU, so that autograd, views and indices work. Python sees tensors of the device. An operation
or a kernel on tensors of the host and of the device fails, as it does on a GPU, but for scalars. Triton's kernels of
serving run in its interpreter, and those of other families that a test names.
"""

from __future__ import annotations

import pkgutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import veneer
import veneer.ops.triton
from veneer.ops import dispatch

DEVICE = torch.device("cuda", 0)
PROCESSORS = 132  # of an H100
_HOST = torch.device("cpu")
_OURS = str(Path(veneer.__file__).parent)
_WAITS = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero", "_local_scalar_dense"}
"""Operations whose result the host waits for: a value, or a size that depends on values."""
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
"""Operations that launch nothing."""
_MAKES = {
    getattr(torch, name)
    for name in ("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like")
}
SERVING = {"pairs", "paged_attention", "sample"}
EVERY = {found.name for found in pkgutil.iter_modules(veneer.ops.triton.__path__)}
_READS = {torch.tensor, torch.as_tensor}  # values of the host


class Crossings:
    """Launches on the device, and copies to it and from it: each with the line that asks, and how often.

    The host waits for each read, and for each send from memory that is not pinned.
    """

    now: Crossings

    def __init__(self) -> None:
        self.launched, self.reads, self.sends = Counter[str](), Counter[str](), Counter[str]()

    @property
    def launches(self) -> int:
        return self.launched.total()

    @property
    def read(self) -> int:
        return self.reads.total()

    @property
    def sent(self) -> int:
        return self.sends.total()

    def clear(self) -> None:
        for counted in (self.launched, self.reads, self.sends):
            counted.clear()


def _count(counted: Counter[str], name: str, times: int = 1) -> None:
    counted[f"{name} at {_asking()}"] += times


def _asking() -> str:
    """The innermost line of the package on the stack; of the test, if there is none."""
    frame: Any = sys._getframe(2)
    own = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS):
            return f"{file.removeprefix(_OURS + '/')}:{frame.f_lineno}"
        if own is None and "/torch/" not in file and file != __file__:
            own = f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return own or "?"


class OnDevice(Tensor):
    """Tensor of the device; ``host`` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=_HOST,
        )  # fmt: skip
        made.host = host.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        _count(Crossings.now.reads, "tolist")
        return self.host.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.host})"


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    name = func._schema.name.partition("::")[2]
    mixed = [tuple(x.shape) for x in tensors if _is_apart(x)]
    if mixed:
        raise AssertionError(f"{func} reads tensors of the host, {mixed}, beside those of the device")
    if name in _WAITS or _goes_by_masks(name, args):
        _count(Crossings.now.reads, name)
    elif not func.is_view and name not in _ALLOCATE:
        _count(Crossings.now.launched, name, _launches_of(name, tensors))
    args, kwargs = tree_unflatten([_values(x) if isinstance(x, Tensor) else x for x in flat], spec)
    out = func(*args, **kwargs | ({"device": _HOST} if "device" in kwargs else {}))
    known = {id(x.host): x for x in tensors if isinstance(x, OnDevice)}
    return tree_map(lambda y: _wrapped(y, known) if isinstance(y, Tensor) else y, out)


def _launches_of(name: str, tensors: Sequence[Tensor]) -> int:
    """One; of an operation on lists one a tensor, unless both lists lie alike and have one type each.

    That is what torch asks for, in ``ForeachUtils.h``; 64 pairs of tensors fit a launch.
    """
    if not name.startswith("_foreach_"):
        return 1
    n = len(tensors) // 2 if name == "_foreach_copy_" else len(tensors)
    halves = (tensors[:n], tensors[n:])
    alike = all(len({x.dtype for x in half}) <= 1 for half in halves)
    alike &= all(a.shape == b.shape and a.stride() == b.stride() for a, b in zip(*halves, strict=False))
    return -(-n // 64) if alike else n


def _wrapped(y: Tensor, known: dict[int, OnDevice]) -> OnDevice:
    """The tensor itself that was changed in place, or a new one."""
    return known[id(y)] if id(y) in known else OnDevice(y)


def _goes_by_masks(name: str, args: Any) -> bool:
    """Return True if an index is made of a mask, whose entries are counted on the host."""
    places = args[1] if name in ("index", "index_put_", "index_put") else ()
    return any(x is not None and x.dtype == torch.bool for x in places)


def _values(x: Any) -> Any:
    return x.host if isinstance(x, OnDevice) else x


class _Machine(TorchFunctionMode):
    """Calls that name the device, which torch would look for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if func is Tensor.cpu:
            return _moved(args[0], _HOST)
        if func is Tensor.copy_:
            return _copied(*args[:2])
        kwargs.pop("pin_memory", None)  # only where there is a GPU
        named = kwargs.get("device")
        if named is None or torch.device(named).type != "cuda":
            return func(*args, **kwargs)
        if func not in _MAKES | _READS:  # of a tensor that is there
            del kwargs["device"]
            return func(*args, **kwargs)
        if func in _READS:
            _count(Crossings.now.sends, func.__name__)
        elif func not in (torch.empty, torch.empty_like):
            _count(Crossings.now.launched, func.__name__)
        made = func(*(tree_map(_values, args)), **kwargs | {"device": "cpu"})
        return made if isinstance(made, OnDevice) else OnDevice(made)


def _moved(x: Tensor, *how: Any, **named: Any) -> Tensor:
    """``x.to(…)``."""
    given = [*how, *named.values()]
    device = next((torch.device(each) for each in given if isinstance(each, (torch.device, str))), x.device)
    device = next((each.device for each in given if isinstance(each, Tensor)), device)
    dtype = next((each for each in given if isinstance(each, torch.dtype)), x.dtype)
    if device.type == x.device.type:
        return x if dtype == x.dtype else torch.ops.aten._to_copy(x, dtype=dtype)
    sends = device.type == "cuda"
    _count(Crossings.now.sends if sends else Crossings.now.reads, "to")
    host = _values(x).to(dtype).clone()
    return OnDevice(host) if sends else host


def _copied(x: Tensor, source: Tensor) -> Tensor:
    """``x.copy_(source)``."""
    if isinstance(x, OnDevice) == isinstance(source, OnDevice):
        return torch.ops.aten.copy_(x, source)
    if source.dim():
        sends = isinstance(x, OnDevice)
        _count(Crossings.now.sends if sends else Crossings.now.reads, "copy_")
    _values(x).copy_(_values(source))
    return x


def _is_apart(x: Tensor) -> bool:
    """Return True for a tensor of the host that is no scalar."""
    return not isinstance(x, OnDevice) and x.dim() > 0


@contextmanager
def stand_in(families: Collection[str] = SERVING, *, computes: bool = True) -> Iterator[Crossings]:
    """In this context there is a device, of which the interpreter of Triton computes these families of kernels.

    If it does not compute, these kernels are counted and leave what was in memory.
    """
    with pytest.MonkeyPatch.context() as patch, _Machine() as machine:
        patch.setattr(torch.autograd, "_engine_run_backward", _seen(torch.autograd._engine_run_backward, machine))
        for module in [import_module(f"veneer.ops.triton.{name}") for name in EVERY]:  # all, before one is patched
            if hasattr(module, "launch"):
                patch.setattr(module, "launch", _on_host(module.launch, computes))
        find = dispatch._find
        patch.setattr(dispatch, "_find", lambda op, backend: find(op, _backend(op, backend, families)))
        known = SimpleNamespace(multi_processor_count=PROCESSORS)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: known)
        Crossings.now = Crossings()
        yield Crossings.now


def _seen(run: Any, machine: _Machine) -> Any:
    """The backward pass, which the mode sees: it does not see what a function runs that it was asked for."""

    def seen(*args: Any, **kwargs: Any) -> Any:
        with machine:
            return run(*args, **kwargs)

    return seen


def _backend(op: str, backend: str, families: Collection[str]) -> str:
    """The back end that is taken: torch's own code for the other families, which are much faster so."""
    return "reference" if backend == "triton" and op.partition(".")[0] not in families else backend


def _on_host(launch: Any, computes: bool) -> Any:
    def launched(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if apart := [tuple(x.shape) for x in args if isinstance(x, Tensor) and not isinstance(x, OnDevice)]:
            raise AssertionError(f"{kernel} reads tensors of the host, {apart}")
        if 0 not in grid:
            _count(Crossings.now.launched, kernel.fn.__name__)
        if computes:
            launch(kernel, grid, *map(_values, args), **options)

    return launched


def put_on_device(model: nn.Module) -> None:
    """Move a model to the device."""
    made: dict[int, nn.Parameter | OnDevice] = {}
    for module in model.modules():
        if hasattr(module, "forget"):  # it keeps tensors that it computed on the host
            module.forget()
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None:
                    held[name] = made.setdefault(id(x), _of_device(x))  # type: ignore[assignment]


def _of_device(x: Tensor) -> nn.Parameter | OnDevice:
    moved = OnDevice(x.detach())
    return nn.Parameter(moved, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else moved
