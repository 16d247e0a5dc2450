"""Trace of one forward pass: the modules whose outputs are added to the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
# What keeps a tensor "the output of module M" although it is a new tensor; dropout does nothing in evaluation.
SCALING = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "to", "type_as", "contiguous", "clone", "dropout"}
SHAPING = {"view", "reshape", "flatten", "permute", "transpose", "roll", "pad", "squeeze", "unsqueeze", "__getitem__"}
PASSING = frozenset(SCALING | SHAPING)


@dataclass(frozen=True, slots=True)
class Addition:
    """A sub-layer, whose output is added to the residual stream.

    It reads the input of the module ``input_path``, and its output is that of ``output_path``.
    """

    input_path: str
    output_path: str
    attention: bool
    features: int


@dataclass(slots=True, eq=False)
class _Call:
    path: str
    module: nn.Module
    order: int


@dataclass(frozen=True, slots=True)
class _Origin:
    """Modules and tensors from which a tensor was computed. ``makers`` are the modules that returned it, innermost
    first.

    ``sources`` are the modules that read the residual stream to compute it.
    """

    stream: bool = False
    makers: tuple[_Call, ...] = ()
    sources: frozenset[_Call] = frozenset()
    parts: tuple[_Origin, ...] = ()


@dataclass(frozen=True, slots=True)
class _Event:
    operand: _Origin
    stack: tuple[_Call, ...]
    features: int


NOWHERE = _Origin()
STREAM = _Origin(stream=True)


@torch.no_grad()
def trace_additions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Addition]:
    """Run one forward pass, and return the sub-layers whose outputs it adds to the residual stream, in order. A
    sub-layer that is added several times is listed once.
    """
    watch = _Watch(model)
    handles = [handle for name, module in model.named_modules() for handle in watch.hooks(name, module)]
    try:
        with watch:
            model.base_model(**inputs, **({} if model.main_input_name == "pixel_values" else {"use_cache": False}))
    finally:
        for handle in handles:
            handle.remove()
    return watch.additions()


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Tracer that follows tensors by identity through modules and torch functions."""

    model: nn.Module
    origins: dict[int, _Origin] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # alive, so that no identity is used twice
    stack: list[_Call] = field(default_factory=list)
    events: list[_Event] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    n_calls: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.elements = {
            child
            for module in self.model.modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for child in module.children()
        }

    def hooks(self, path: str, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(
                lambda m, args, kwargs: self._enter(path, m, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=False),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        operands = _tensors((args, kwargs or {}))
        origins = [self._origin(t) for t in operands]  # before the call, which may write in place
        out = func(*args, **(kwargs or {}))
        results = _tensors(out)
        if name in ADDITIONS and len(operands) == 2 and len(results) == 1:
            self._add(operands, origins, results[0])
            return out
        sources = frozenset().union(*(o.sources for o in origins if not o.stream)) if origins else frozenset()
        for result in results:
            if any(result is t for t in operands) and not name.endswith("_"):
                continue
            if name in PASSING and origins:
                self._set(result, next((o for o in origins if o.makers or o.stream), _Origin(sources=sources)))
            elif sources:
                self._set(result, _Origin(sources=sources))
        return out

    def _add(self, operands: list[Tensor], origins: list[_Origin], result: Tensor) -> None:
        a, b = origins
        if operands[0].shape != operands[1].shape or operands[0].ndim < 2:
            self._set(result, _Origin(sources=a.sources | b.sources))
        elif a.stream != b.stream:
            other = b if a.stream else a
            self.events += [_Event(part, tuple(self.stack), result.shape[-1]) for part in other.parts or (other,)]
            self._set(result, STREAM)
        elif a.stream:
            self._set(result, STREAM)
        else:
            parts = tuple(part for origin in (a, b) for part in origin.parts or (origin,))
            self._set(result, _Origin(sources=a.sources | b.sources, parts=parts))

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        outermost = module in self.elements and not any(call.module in self.elements for call in self.stack)
        given = _tensors((args, kwargs))
        if outermost and given and given[0].is_floating_point():
            self._set(given[0], STREAM)
        self.calls[path] = self.calls.get(path, 0) + 1
        self.n_calls += 1
        self.stack.append(_Call(path, module, self.n_calls))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = self.stack.pop()
        given = [self._origin(t) for t in _tensors((args, kwargs))]
        reads_stream = any(origin.stream for origin in given)
        results = _tensors(out)
        if "norm" in type(module).__name__.lower() and reads_stream and len(results) == 1:
            self._set(results[0], STREAM)
            return
        through = frozenset().union(*(o.sources for o in given if not o.stream)) if given else frozenset()
        for index, result in enumerate(results):
            origin = self._origin(result)
            if not origin.stream:
                sources = origin.sources | through | ({call} if reads_stream else set())
                makers = (*origin.makers, call) if index == 0 else origin.makers
                self._set(result, _Origin(makers=makers, sources=sources))

    def additions(self) -> list[Addition]:
        """Return each sub-layer whose output is added to the residual stream, with the paths of its modules. A module
        that several sub-layers share (mostly a dropout) does not count as a sub-layer's output.
        """
        served: dict[str, set[str]] = {}
        uses = Counter(call.path for event in self.events for call in event.operand.makers)
        for event in self.events:
            for call in event.operand.makers:
                served.setdefault(call.path, set()).add(event.operand.makers[0].path)
        own = {path for path, inner in served.items() if len(inner) == 1 and uses[path] == self.calls[path]}
        found = (self._addition(event, own) for event in self.events)
        return list(dict.fromkeys(addition for addition in found if addition is not None))

    def _addition(self, event: _Event, own: set[str]) -> Addition | None:
        """Return the sub-layer whose output one addition adds to the residual stream, or None if no module computes it.

        Its output is that of the outermost module that returned the summand. Its input is that of the first module in
        the block that read the residual stream for this summand.
        """
        inside = set(event.stack)
        block_order = next((call.order for call in event.stack if call.module in self.elements), 0)
        within = [call for call in event.stack if call.order > block_order]
        makers = [call for call in event.operand.makers if call not in inside and call.path in own]
        sources = [call for call in event.operand.sources if call not in inside and call.order > block_order]
        if not makers or not sources:
            return None
        return Addition(
            input_path=min(sources, key=lambda call: call.order).path,
            output_path=makers[-1].path,
            attention=any(_is_attention(call) for call in [*sources, *within]),
            features=event.features,
        )

    def _origin(self, tensor: Tensor) -> _Origin:
        return self.origins.get(id(tensor), NOWHERE)

    def _set(self, tensor: Tensor, origin: _Origin) -> None:
        self.origins[id(tensor)] = origin
        self.kept.append(tensor)


def _is_attention(call: _Call) -> bool:
    names = (type(call.module).__name__.lower(), call.path.rpartition(".")[2].lower())
    return any("attention" in name or "attn" in name for name in names)


def _tensors(value: object) -> list[Tensor]:
    """Return the tensors in nested arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return _tensors(list(value.values()))
    if isinstance(value, Iterable) and isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    return []
