"""Tensors without values: a step on them allocates as much as a real step, and computes nothing.

A `Traced` tensor is on the meta device but reports another one. Autocast, dispatch and the kernels' own Python code
thus take the same paths as on real tensors. Calls of the kernels themselves do nothing (`silent_kernels`). Integer and
boolean tensors that a step creates (bounds of sequences, labels) stay real, since control flow depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from veneer.ops.meta import META, WRITTEN, call_of, grouped_mm, outputs_of, remember, remember_written, repeats

Called = Callable[[str, tuple[Any, ...]], None]
"""Told of a kernel that was not run, or of what else was not done: its name, and its arguments."""

Seen = Callable[[Any, tuple[Any, ...], Any], None]
"""Told of an op that was run: the op, its arguments and its outputs."""

_CPU = torch.device("cpu")
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
_SIZES = (
    "attention_scratch_bytes",
    "scan_scratch_bytes",
    "grouped_low_rank_u_bytes",
    "four_bit_has_product",
    "isa",
    "max_threads",
)
"""Functions of the kernels' module that tell sizes, and read no memory."""

REPEATED = "repeated"
"""Told before a part of a step, with 0, and after it, with the times that it counts."""

_TELL: ContextVar[Called | None] = ContextVar("_TELL", default=None)
_ISA: ContextVar[str | None] = ContextVar("_ISA", default=None)


class EqualParts(list[int]):
    """Numbers of a vector without values, such as the tokens of each expert: a split by them has equal parts."""


class Traced(Tensor):
    """Tensor without values that reports a real device. ``bare`` is the same tensor on the meta device.

    The bytes of its storage are those of the storage of ``bare``.
    """

    bare: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, bare: Tensor, place: torch.device) -> Traced:
        """Return a tensor that wraps ``bare`` and reports the device ``place``. It stores the device; other subclasses
        ask the dispatcher at each read.
        """
        own: Any = Tensor._make_wrapper_subclass(
            cls, bare.shape, strides=bare.stride(), storage_offset=bare.storage_offset(), dtype=bare.dtype, device=place
        )
        own.bare = bare
        return own  # type: ignore[no-any-return]

    def tolist(self) -> EqualParts:
        """Return ones for a vector of counts, of which only the number is known. Raises TypeError for other tensors."""
        if self.ndim != 1:
            raise TypeError(f"a traced tensor of shape {tuple(self.shape)} has no values to list")
        return EqualParts([1] * len(self))

    def split(self, split_size: Any, dim: int = 0) -> Any:
        """Return the parts of these sizes, or equal ones if the sizes have no values."""
        if isinstance(split_size, EqualParts):
            whole, n = self.shape[dim], len(split_size)
            split_size = [(whole + k) // n for k in range(n)]
        return super().split(split_size, dim)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _on_meta(func, args, kwargs)


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Run the op on the meta device. If the op would write to a tensor that has values, that tensor stays unchanged."""
    if func is _aten._local_scalar_dense.default and args[0].dtype == torch.bool:
        return True  # checks, such as that all values are finite, pass
    if func is _aten.nonzero.default:
        return _found(args[0])
    if func is _aten.index.Tensor:
        args = (args[0], [each for index in args[1] for each in _positions(index)])
    place = next((x.device for x in tensors_in(args) if isinstance(x, Traced)), _CPU)
    written: Any = kwargs["out"] if kwargs and "out" in kwargs else next(iter(args), None)
    call = call_of(func, args, kwargs) if repeats(func) else None
    known = None if call is None else outputs_of(call)
    if known is not None:
        return written if known is WRITTEN else _dressed(known, {}, place)
    given: dict[int, tuple[Tensor, Tensor]] = {}  # tensors without values by identity, with those that were given
    named = {name: _bare(value, given) for name, value in kwargs.items()} if kwargs else {}
    run = grouped_mm if func is _aten._grouped_mm.default else func
    out = run(*(_bare(x, given) for x in args), **named)
    dressed = _dressed(out, given, place)
    if call is not None and dressed is not written:
        remember(call, out, [plain for plain, _ in given.values()])
    elif call is not None and out.shape == written.shape:
        remember_written(call)
    return dressed


def _found(mask: Tensor) -> Tensor:
    """Return indices in place of those of a mask's nonzero elements, for a mask without values by which a mixture finds
    an expert's tokens.

    Each of n experts is taken to be chosen by 1/n of the tokens. If the mask says which experts are chosen at all,
    every index is 0, because every mixture has an expert 0.
    """
    whole = mask.untyped_storage().nbytes() // mask.element_size()
    if mask.ndim == 1 and len(mask) == whole:
        return torch.zeros(whole, 1, dtype=torch.int64)
    found = -(-(mask.numel() ** 2) // max(whole, 1))
    return Traced(torch.empty(found, mask.ndim, dtype=torch.int64, device=META), mask.device)


def _positions(index: Tensor | None) -> Sequence[Tensor | None]:
    """Return an index as torch's meta device takes it: a mask is replaced by the indices of its nonzero elements."""
    if index is None or index.dtype != torch.bool:
        return (index,)
    return (_found(index) if isinstance(index, Traced) else index.nonzero()).unbind(1)


def _bare(x: Any, given: dict[int, tuple[Tensor, Tensor]]) -> Any:
    if isinstance(x, Tensor):
        plain = x.bare if isinstance(x, Traced) else x.to(META)
        given[id(plain)] = plain, x
        return plain
    if isinstance(x, list | tuple):
        return [_bare(each, given) for each in x]
    return META if isinstance(x, torch.device) else x


def _dressed(y: Any, given: dict[int, tuple[Tensor, Tensor]], place: torch.device) -> Any:
    if isinstance(y, Tensor):
        return given[id(y)][1] if id(y) in given else Traced(y, place)
    return type(y)(_dressed(each, given, place) for each in y) if isinstance(y, list | tuple) else y


def tensors_in(given: Any) -> Iterator[Tensor]:
    """Yield the tensors among an op's arguments or outputs."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for each in given:
            yield from tensors_in(each)


class SilentMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that passes each op to `see` and changes no result. `is_watched` ignores it.

    torch's guard against compiling a mode takes a quarter of its time. It is off, because this mode is never compiled.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        self.see(func, args, out)
        return out

    def see(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Handle an op after it has run. Subclasses define it; here it does nothing."""


class Tracing(SilentMode):  # type: ignore[no-untyped-call]
    """Mode that runs the ops of a traced step without values, and calls each function in ``seen`` with every op.

    One mode calls all functions, because each further mode would cost as much as the op. Tensors that a step creates
    are traced, except scalars, vectors of ones, booleans and integers of more than 8 bits.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: tuple[Seen, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Traced in types:
            out = _on_meta(func, args, kwargs)
        elif func in _FACTORIES and not _is_factor(func, args[0]) and _is_traced(kwargs or {}):
            out = Traced(func(*args, **{**(kwargs or {}), "device": META}), _CPU)
        else:
            out = func(*args, **(kwargs or {}))
        for see in self.seen:
            see(func, args, out)
        return out


def _is_factor(func: Any, shape: Sequence[int]) -> bool:
    """Return True for a new scalar or a new vector of ones, which keep their values in a traced step.

    Model code multiplies such a tensor by a number and then branches on the product (in XMOD, the language of each
    row).
    """
    return not shape or (func is _aten.ones.default and len(shape) == 1)


def _is_traced(settings: Mapping[str, Any]) -> bool:
    """Return True if a tensor created with these settings has no values."""
    dtype, device = settings.get("dtype") or torch.get_default_dtype(), settings.get("device")
    on_meta = device is not None and torch.device(device).type == "meta"
    return not on_meta and (dtype.is_floating_point or dtype in (torch.uint8, torch.int8))


@contextmanager
def tracing(tell: Called = lambda name, arguments: None, isa: str | None = None) -> Iterator[Tracing]:
    """Trace the steps in this context: kernels are reported to ``tell`` instead of run, and new tensors are traced.

    ``isa`` is the instruction set of the machine that the step is traced for; this machine's if it is None.
    """
    with silenced(tell, isa), Tracing() as mode:
        yield mode


@contextmanager
def silenced(tell: Called = lambda name, arguments: None, isa: str | None = None) -> Iterator[None]:
    """Report kernels to ``tell`` instead of running them in this context. All tensors in it must be without values.

    They may be of another kind than `Traced`, such as torch's FakeTensor.
    """
    tokens = _TELL.set(tell), _ISA.set(isa)
    try:
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
    """Report a skipped call to the tracer of this step."""
    tell = _TELL.get()
    if tell is not None:
        tell(name, arguments)


def row_slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of ``n`` rows, ``size`` at a time.

    While a step is traced, the slices between the second and the last are left out, and the tracer counts the second
    once more for each of them. So the time of a trace does not grow with the rows.
    """
    starts = range(0, n, size)
    left_out = starts[2:-1] if is_tracing() else starts[:0]
    for start in starts[: len(starts) - len(left_out) - 1] if left_out else starts:
        if left_out and start:
            not_done(REPEATED, 0)
        yield slice(start, min(n, start + size))
    if left_out:
        not_done(REPEATED, 1 + len(left_out))
        yield slice(starts[-1], n)


def silent_kernels(module: Any) -> Any | None:
    """Return a stand-in for the kernels' module while a step is traced; None otherwise."""
    tell = _TELL.get()
    return None if tell is None else _Silent(module, tell)


class _Silent:
    """Stand-in for the kernels' module: a function reports its call and returns True, without computing. Functions that
    return sizes are the module's own.
    """

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
