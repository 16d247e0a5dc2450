"""Tensors without values: a step on them allocates what a real one would, and computes nothing.

A `Traced` tensor is on the meta device but reports another one. Autocast, dispatch and the kernels' own Python code
thus take the same paths as on real tensors. Calls of the kernels themselves do nothing (`silent_kernels`). Integer and
boolean tensors that a step creates (bounds of sequences, labels) stay real, since control flow depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

Called = Callable[[str, tuple[Any, ...]], None]
"""Told of a kernel that was not run, or of what else was not done: its name, and its arguments."""

DEVICE = torch.ops.prim.device.default
"""Half of what a traced step asks of the dispatcher. Modes answer by ``args[0].place``, and pass nothing on."""

_META = torch.device("meta")
_aten = torch.ops.aten
_FACTORIES = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.zeros.default,
    _aten.ones.default,
    _aten.full.default,
    _aten.rand.default,
    _aten.randn.default,
}
_SIZES = ("attention_scratch_bytes", "grouped_low_rank_u_bytes", "four_bit_has_product", "isa", "max_threads")
"""Functions of the kernels' module that tell sizes, and read no memory."""

_TELL: ContextVar[Called | None] = ContextVar("_TELL", default=None)
_ISA: ContextVar[str | None] = ContextVar("_ISA", default=None)


class Traced(Tensor):
    """Tensor without values that counts as being on a device; ``bare`` is the one on the meta device."""

    bare: Tensor
    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, bare: Tensor, place: torch.device) -> Traced:
        """Sharing the storage of ``bare``, which counts its bytes."""
        own: Any = Tensor._make_subclass(cls, bare, False, dispatch_device=True, device_for_backend_keys=place)
        own.bare, own.place = bare, place
        return own  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The op on the meta device. What is written into a real tensor leaves it as it was."""
        if func is DEVICE:
            return args[0].place
        if func is _aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # checks, such as that all values are finite, pass
        op = _Op()
        named = {name: op.bare(value) for name, value in kwargs.items()} if kwargs else {}
        run = _grouped_mm if func is _aten._grouped_mm.default else func
        return op.dressed(run(*map(op.bare, args), **named))


class _Op:
    """Tensors of one call, with and without their values' place."""

    def __init__(self) -> None:
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        self.place = torch.device("cpu")

    def bare(self, x: Any) -> Any:
        if isinstance(x, Traced):
            self.place, plain = x.place, x.bare
        elif isinstance(x, Tensor):
            plain = x.to(_META)
        elif isinstance(x, torch.device):
            return _META
        else:
            return [self.bare(each) for each in x] if isinstance(x, list | tuple) else x
        self.given[id(plain)] = plain, x
        return plain

    def dressed(self, y: Any) -> Any:
        if isinstance(y, Tensor):
            return self.given[id(y)][1] if id(y) in self.given else Traced(y, self.place)
        return type(y)(map(self.dressed, y)) if isinstance(y, list | tuple) else y


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """A mixture's product as the CPU gives it, in any dtype, rows padded to 16 bytes; torch's own takes bfloat16 alone
    on the meta device (2.13)."""
    groups = (len(offs),) if offs is not None and a.ndim == b.ndim == 2 else b.shape[:1] if a.ndim == b.ndim else ()
    n_rows, n_columns = a.shape[-2], b.shape[-1]
    unit = 16 // a.element_size()
    width = -(-n_columns // unit) * unit
    return a.new_empty((*groups, n_rows, width))[..., :n_columns]


class SilentMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that changes nothing that a step computes: `is_watched` does not count it.

    Nothing compiles it, so that it goes without torch's guard against that, a quarter of its time.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Factories(SilentMode):  # type: ignore[no-untyped-call]
    """Makes the tensors traced that a step makes from nothing, but for whole numbers, booleans and single numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].place
        kwargs = kwargs or {}
        if func in _FACTORIES and args[0]:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            given = kwargs.get("device")
            wanted = given is None or torch.device(given).type != "meta"
            if wanted and (dtype.is_floating_point or dtype in (torch.uint8, torch.int8)):
                return Traced(func(*args, **{**kwargs, "device": _META}), torch.device("cpu"))
        return func(*args, **kwargs)


@contextmanager
def tracing(tell: Called = lambda name, arguments: None, isa: str | None = None) -> Iterator[None]:
    """Trace the steps in this context: kernels are reported to ``tell`` instead of run, and new tensors are traced.

    ``isa`` is the instruction set of the machine that the step is traced for; None: of this one.
    """
    tokens = _TELL.set(tell), _ISA.set(isa)
    try:
        with _Factories():  # type: ignore[no-untyped-call]
            yield
    finally:
        _TELL.reset(tokens[0])
        _ISA.reset(tokens[1])


def traced_isa() -> str | None:
    """Return the instruction set that a step is traced for, if it is not this machine's."""
    return _ISA.get()


def is_tracing() -> bool:
    """Return True while a step is traced, so that kernels are not run."""
    return _TELL.get() is not None


def not_done(name: str, *arguments: Any) -> None:
    """Report a call that was not run to the tracer of this step."""
    tell = _TELL.get()
    if tell is not None:
        tell(name, arguments)


def silent_kernels(module: Any) -> Any | None:
    """Return a stand-in for the kernels' module while a step is traced; None otherwise."""
    tell = _TELL.get()
    return None if tell is None else _Silent(module, tell)


class _Silent:
    """Functions that compute nothing, but for those that tell sizes."""

    def __init__(self, module: Any, tell: Called) -> None:
        self._module, self._tell = module, tell

    def __getattr__(self, name: str) -> Any:
        if name in _SIZES:
            return getattr(self._module, name)

        def call(*args: Any) -> bool:
            self._tell(name, args)
            return True  # "all values are finite", where a kernel says so

        return call


def is_watched() -> bool:
    """Return True if a mode on torch's dispatcher keeps outputs of ops, as selective checkpointing does."""
    return any(not isinstance(mode, SilentMode) for mode in _get_current_dispatch_mode_stack())
