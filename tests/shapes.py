"""Shapes and dtypes that functions declare are checked while the tests run.

jaxtyping's own import hook checks the same, but it wraps a function within another anew in every call, binds arguments
to names and checks them twice, which took half of the time of the tests. What has the form (`_form`) of arguments and
results that were right before is not checked again: a call with two arrays waits 7 µs in place of 20. Functions that
declare no array are not checked, and are themselves again when their module is there: their types are mypy's.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import operator
import sys
import threading
import typing
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))  # an int is a float


def check_shapes(modules: Collection[str]) -> None:
    """Check the functions and dataclasses of these modules, and of those within them, as they are imported."""
    sys.meta_path.insert(0, _Finder(modules))


def checked(given: Any) -> Any:
    """Return the function, or the dataclass, with its arguments and its result checked in every call."""
    if isinstance(given, FunctionType):
        return _checked_function(given)
    if dataclasses.is_dataclass(given) and isinstance(vars(given).get("__init__"), FunctionType):
        given.__init__ = _checked_function(given.__init__)
    return given


def _checked_function(function: FunctionType) -> Callable[..., Any]:
    forms = dict[Any, Any]()  # of results that were right, by those of their arguments
    arrays: _Arrays | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal arrays
        if arrays is None:  # in the first call, when all names of the module are there
            arrays = _Arrays.of(function)
        if not arrays.declared or jaxtyping.config.jaxtyping_disable or _is_tracing():
            return function(*args, **kwargs)
        given = arrays.form(args, kwargs)
        expected = forms.get(given)  # an argument's form is made of many values: it is hashed once
        if expected is not None:
            result = function(*args, **kwargs)
            if arrays.returned and _form(result) != expected:
                _RETURNED.results = [result]
                with jaxtyping.jaxtyped("context"):
                    returned()(*args, **kwargs)
            return result
        with jaxtyping.jaxtyped("context"):
            result = typed()(*args, **kwargs)
        if given is not None and (found := _form(result) if arrays.returned else True) is not None:
            forms[given] = found
        return result

    @functools.cache
    def typed() -> Callable[..., Any]:
        return CHECK(_with_hints(function, function))

    @functools.cache
    def returned() -> Callable[..., Any]:
        return CHECK(_with_hints(_returning(function), function))

    _BARE[call] = function
    return call


_BARE = weakref.WeakKeyDictionary[Callable[..., Any], FunctionType]()
"""Functions by what checks them."""


def leave_unchecked(module: str, owner: Any) -> None:
    """Give a module, or a class of it, back its own functions that declare no array: most calls are theirs."""
    for name, value in [*vars(owner).items()]:
        if isinstance(value, type) and value.__module__ == module and value.__qualname__.endswith(name):
            leave_unchecked(module, value)
        elif (bare := _unchecked(value)) is not value:
            setattr(owner, name, bare)


def _unchecked(value: Any) -> Any:
    if isinstance(value, staticmethod | classmethod):
        bare = _unchecked(value.__func__)
        return value if bare is value.__func__ else type(value)(bare)
    if isinstance(value, property):
        parts = value.fget, value.fset, value.fdel
        bares = [_unchecked(part) for part in parts]
        return value if all(map(operator.is_, parts, bares)) else property(*bares, value.__doc__)
    function = _BARE.get(value) if isinstance(value, FunctionType) else None
    return value if function is None or _Arrays.of(function).declared else function


@dataclasses.dataclass(frozen=True, slots=True)
class _Arrays:
    """Arguments of a function that are declared as arrays, by place and name, and its result if it is one.

    From place ``rest`` on all are, if any.
    """

    places: tuple[int, ...]
    rest: int | None
    names: frozenset[str]
    returned: bool
    declared: bool

    @classmethod
    def of(cls, function: FunctionType) -> _Arrays:
        hints = _hints(function)
        shaped = {name for name, hint in hints.items() if _holds_arrays(hint)}
        returned = "return" in shaped
        names = frozenset(shaped - {"return"})
        parameters = inspect.signature(function).parameters.values()
        declared = [(place, each.kind) for place, each in enumerate(parameters) if each.name in names]
        assert all(kind != inspect.Parameter.VAR_KEYWORD for _, kind in declared), "a name has one form"
        rest = next((place for place, kind in declared if kind == inspect.Parameter.VAR_POSITIONAL), None)
        return cls(tuple(place for place, _ in declared if place != rest), rest, names, returned, bool(shaped))

    def form(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        n = len(args)
        given = [args[place] for place in self.places if place < n]
        given += () if self.rest is None else args[self.rest :]
        if kwargs:
            named = {name: value for name, value in kwargs.items() if name in self.names}
            return _form_of_several(tuple, [*given, _Named, named], ())
        return _form_of_several(tuple, given, ())


def _holds_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = [*hint] if isinstance(hint, list) else typing.get_args(hint)
    return any(map(_holds_arrays, parts))


_RETURNED = threading.local()


def _returning(function: FunctionType) -> FunctionType:
    """Return a function with the same parameters that returns a result which is there already."""
    signature = inspect.signature(function)
    parameters = [
        each.replace(annotation=each.empty, default=each.empty if each.default is each.empty else None)
        for each in signature.parameters.values()
    ]
    bare = signature.replace(parameters=parameters, return_annotation=signature.empty)
    names: dict[str, Any] = {"held": _RETURNED}
    exec(f"def returning{bare}: return held.results.pop()", names)
    made: FunctionType = names["returning"]
    return made


class _Named:
    """Mark: the arguments behind it were given by name."""


_LONGEST = 32
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_SEVERAL = (tuple, list, dict)
_KINDS: dict[type, Any] = {}  # whose values are alike to a check; those of True are themselves looked at


def _form(value: Any) -> Any:
    """Return all of a value that a check looks at; None if it looks at one random item, or at sizes not yet known."""
    kind = type(value)
    if kind in _TENSORS:
        return kind, value.dtype, value.shape
    if kind in _SEVERAL:
        return _form_of_several(kind, value.values() if kind is dict else value, value)
    known = _KINDS.get(kind, False) or _seen(kind)
    return value if known is True else None if known is _NONE else known


def _form_of_several(kind: type, values: Collection[Any], given: Any) -> Any:
    if len(values) > _LONGEST:
        return None
    found = []
    for value in values:
        own = type(value)
        if own in _TENSORS:  # most of them: without another call
            form: Any = own, value.dtype, value.shape
        else:
            form = _form(value)
            if form is None:
                return None
        found.append(form)
    if kind is list and len(set(found)) > 1:
        return None
    return (kind, *given, *found) if kind is dict else (kind, *found)


class _NONE:
    """Stands for a kind whose values have no form."""


def _seen(kind: type) -> Any:
    """Note how values of a kind are looked at."""
    if issubclass(kind, type) or kind is str:
        return _KINDS.setdefault(kind, True)
    return _KINDS.setdefault(kind, _NONE if issubclass(kind, Collection | torch.Tensor) else kind)


_MODULES, _is_compiling = sys.modules, torch.compiler.is_compiling


def _is_tracing() -> bool:
    """Return True in a traced or compiled step, which goes the ways of a real one: there they are checked."""
    if _is_compiling():
        return True
    traced = _MODULES.get("veneer.ops.traced")
    return traced is not None and traced.is_tracing()


def _with_hints(body: FunctionType, function: FunctionType) -> FunctionType:
    """Return a copy of ``body`` whose annotations are the function's, as values."""
    parts = body.__code__, body.__globals__, body.__name__, body.__defaults__, body.__closure__
    copy = functools.update_wrapper(FunctionType(*parts), function)
    del copy.__wrapped__
    copy.__kwdefaults__ = body.__kwdefaults__
    copy.__annotations__ = _hints(function)
    return copy


def _hints(function: FunctionType) -> dict[str, Any]:
    """The annotations as values, less those whose names are there for type checkers alone."""
    found: dict[str, Any] = {}
    for name, hint in function.__annotations__.items():
        try:
            alone = SimpleNamespace(__annotations__={name: hint})
            found |= typing.get_type_hints(alone, function.__globals__, include_extras=True)
        except NameError:
            continue
    return found


class _Finder(MetaPathFinder):
    def __init__(self, modules: Collection[str]) -> None:
        self._modules = tuple(f"{module}." for module in modules)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if not f"{name}.".startswith(self._modules):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, name: str) -> CodeType:
        """Compile the source: byte code that is kept has no checks."""
        path = self.get_filename(name)
        tree = ast.parse(self.get_data(path), path)
        _decorate(tree.body)
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__checked__"] = checked
        super().exec_module(module)
        leave_unchecked(module.__name__, module)


def _decorate(body: Sequence[ast.AST]) -> None:
    """Decorate what a module and its classes define, also under a condition, and nothing within functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list.append(_decorator(node))  # first, since others may drop the annotations
            continue
        if isinstance(node, ast.ClassDef):
            node.decorator_list.insert(0, _decorator(node))  # last, when a dataclass has its __init__
        for name in ("body", "orelse", "finalbody", "handlers"):
            _decorate(getattr(node, name, ()) if isinstance(node, ast.stmt | ast.excepthandler) else ())


def _decorator(node: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Name("__checked__", ast.Load()), node)
