"""Shapes and dtypes that functions declare are checked while the tests run.

jaxtyping's own import hook checks the same, but it wraps a function within another anew in every call, binds arguments
to names and checks them twice, which took half of the time of the tests.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import jaxtyping
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
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable or _is_tracing():
            return function(*args, **kwargs)
        with jaxtyping.jaxtyped("context"):
            return typed()(*args, **kwargs)

    @functools.cache  # made in the first call, when all names of the module are there
    def typed() -> Callable[..., Any]:
        return CHECK(_with_hints(function))

    return call


def _is_tracing() -> bool:
    """Return True in a traced step, which goes the ways of a real one: there they are checked."""
    traced = sys.modules.get("veneer.ops.traced")
    return traced is not None and traced.is_tracing()


def _with_hints(function: FunctionType) -> FunctionType:
    """Return a copy whose annotations are values, less those whose names are there for type checkers alone."""
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    copy = functools.update_wrapper(FunctionType(*parts), function)
    del copy.__wrapped__
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = {}
    for name, hint in function.__annotations__.items():
        try:
            alone = SimpleNamespace(__annotations__={name: hint})
            copy.__annotations__ |= typing.get_type_hints(alone, function.__globals__, include_extras=True)
        except NameError:
            continue
    return copy


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
        tree = _Decorating().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__checked__"] = checked
        super().exec_module(module)


class _Decorating(ast.NodeTransformer):
    """Decorates what a module and its classes define, and nothing within functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(_decorator(node))  # first, since others may drop the annotations
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, _decorator(node))  # last, when a dataclass has its __init__
        return self.generic_visit(node)


def _decorator(node: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Name("__checked__", ast.Load()), node)
