"""Fields of dataclasses as their source declares them, for packages that take seconds to import."""

from __future__ import annotations

import ast
import builtins
import collections.abc
import functools
import importlib.util
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

from veneer.recipe.key_checks import AllowedKeys

_KNOWN = {**vars(builtins), **{name: getattr(typing, name) for name in typing.__all__}}
_KNOWN |= {name: getattr(collections.abc, name) for name in collections.abc.__all__}


UNCLEAR = object()
"""Default of a field that its source alone does not tell."""
_CONTRACT = "veneer.contract.config"  # its functions are those that others replace


class UnreadableError(LookupError):
    """Error for a module without source, or for a name that the module's source does not define."""


@functools.cache
def declared_keys(module: str, name: str) -> AllowedKeys:
    """Return the init fields of a dataclass with their types, those of base classes included.

    A type that the source alone does not determine is `Any`. Raises UnreadableError if the source cannot be read or
    lacks the class.
    """
    home, node = _class_of(module, name)
    types, required = dict[str, Any](), set[str]()
    for base in reversed(_bases(home, node)):
        types, required = {**types, **base.types}, (required - base.types.keys()) | base.required
    for spec in _fields(node):
        types[spec.name] = _type(home, spec.annotation)
        required = required | {spec.name} if spec.required else required - {spec.name}
    return AllowedKeys(types, frozenset(required))


@functools.cache
def declared_defaults(module: str, name: str) -> dict[str, Any]:
    """Return the init fields of a dataclass with their defaults, in the order of the class.

    A default that is not a literal is `UNCLEAR`; that of a field without a default is MISSING. Raises UnreadableError
    if the source cannot be read or lacks the class.
    """
    home, node = _class_of(module, name)
    found: dict[str, Any] = {}
    for base in reversed(_homes_of_bases(home, node)):
        found |= declared_defaults(*base)
    return found | {spec.name: MISSING if spec.required else _literal_default(spec.default) for spec in _fields(node)}


def class_value(module: str, name: str, attribute: str) -> ast.expr | None:
    """Return the expression that a class, or the nearest of its bases, assigns to an attribute, or None.

    Raises UnreadableError if one of these classes defines a function with the attribute's name.
    """
    home, node = _class_of(module, name)
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == attribute and home != _CONTRACT:
            raise UnreadableError(f"{home}.{name}.{attribute}")
        if isinstance(each, ast.Assign | ast.AnnAssign) and _target(each) == attribute:
            return each.value
    values = (class_value(*base, attribute) for base in _homes_of_bases(home, node))
    return next((value for value in values if value is not None), None)


class _Field(typing.NamedTuple):
    name: str
    annotation: ast.expr
    required: bool
    default: ast.expr | None = None


def _fields(node: ast.ClassDef) -> Iterator[_Field]:
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(each.annotation):
            continue
        default = each.value
        options: dict[str | None, ast.expr] = {}
        if isinstance(default, ast.Call) and ast.unparse(default.func).rpartition(".")[2] == "field":
            options = {keyword.arg: keyword.value for keyword in default.keywords}
            default = options.get("default", options.get("default_factory"))
        if "init" not in options or ast.unparse(options["init"]) != "False":
            yield _Field(each.target.id, each.annotation, default is None, each.value)


def _literal_default(written: ast.expr | None) -> Any:
    """Return a field's default as written in its class: a value, or ``field(default…)``."""
    if isinstance(written, ast.Call):
        options = {keyword.arg: keyword.value for keyword in written.keywords}
        factory = options.get("default_factory")
        made: dict[str, Any] = {"dict": {}, "list": []}
        if factory is not None:
            return made.get(ast.unparse(factory), UNCLEAR)
        written = options.get("default")
    try:
        return UNCLEAR if written is None else ast.literal_eval(written)
    except ValueError:
        return UNCLEAR


def _bases(module: str, node: ast.ClassDef) -> list[AllowedKeys]:
    """Return the keys of the base classes that are declared in source."""
    return [declared_keys(*base) for base in _homes_of_bases(module, node)]


def _homes_of_bases(module: str, node: ast.ClassDef) -> list[tuple[str, str]]:
    """Return the module and name of each base class that is declared in source."""
    found = []
    for base in node.bases:
        try:
            home, name = _home(module, base)
            found.append((_class_of(home, name)[0], name))
        except UnreadableError:  # of the standard library or of an extension: no dataclass
            continue
    return found


def _home(module: str, name: ast.expr) -> tuple[str, str]:
    """Return the module that an expression refers to, and the name in it."""
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
        return _names(module).get(name.value.id, (module, ""))[0], name.attr
    if isinstance(name, ast.Name):
        return module, name.id
    raise UnreadableError(ast.unparse(name))


def _class_of(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """Return a class's definition and its module, following imports."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    if name not in _names(module):
        raise UnreadableError(f"{module}.{name}")
    return _class_of(*_names(module)[name])


@functools.cache
def _names(module: str) -> Mapping[str, tuple[str, str]]:
    """Map each name that a module imports to the imported module and the name there. Imports for type checkers only are
    included.
    """
    found: dict[str, tuple[str, str]] = {}
    statements = list(_statements(_tree(module).body))
    for node in statements:
        if isinstance(node, ast.ImportFrom):
            home = _absolute(module, node)
            found |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
    for node in statements:  # a name that is an import to type checkers alone
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            for target in node.targets:
                found.pop(ast.unparse(target), None)
    return found


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported, including those under conditions.

    Bodies of functions and classes are not entered. Expressions are not either, because they would be ten times as many
    nodes.
    """
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            yield from _statements(each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt))
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if file_of(module).name == "__init__.py" else module.split(".")[:-1]
    kept = package[: len(package) - (node.level - 1)]
    return ".".join([*kept, *([node.module] if node.module else [])])


@functools.cache
def _tree(module: str) -> ast.Module:
    try:
        return ast.parse(file_of(module).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UnreadableError(module) from error


@functools.cache
def file_of(module: str) -> Path:
    """Return the source file of a module, found without importing its package. Raises UnreadableError if there is no
    such file.
    """
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package) if package else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        place = Path(folder, *rest)
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                return path
    raise UnreadableError(module)


def literal(module: str, name: str, default: Any = None) -> Any:
    """Return the value of a plain assignment in a module, ``default`` if there is none. Raises UnreadableError if the
    value is not a literal or the source cannot be read.
    """
    for node in _tree(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and _target(node) == name and node.value is not None:
            try:
                return ast.literal_eval(node.value)
            except ValueError as error:
                raise UnreadableError(f"{module}.{name}") from error
    return default


def classes_with(module: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of each class of a module that assigns a literal to the attribute ``name``, and the literal.
    Raises UnreadableError if the source cannot be read.
    """
    for node in _tree(module).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for each in node.body:
            if not isinstance(each, ast.Assign | ast.AnnAssign) or _target(each) != name:
                continue
            if isinstance(each.value, ast.Constant):
                yield node.name, each.value.value


class _Types(dict[str, Any]):
    """Namespace of a module in which its annotations are evaluated."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self._module = module

    def __missing__(self, name: str) -> Any:
        if name in _KNOWN:
            return _KNOWN[name]
        try:
            return _named_type(self._module, name)
        except UnreadableError:
            return Any


def _named_type(module: str, name: str) -> Any:
    """Return an enumeration's values, an alias's type, or Any for any other class."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return _type(module, node.value)
        if isinstance(node, ast.ClassDef) and node.name == name:
            values = [each.value.value for each in node.body if _is_member(each)]  # type: ignore[attr-defined]
            is_enumeration = any("Enum" in ast.unparse(base) for base in node.bases)
            return Literal[tuple(values)] if is_enumeration and values else Any
    if name not in _names(module):
        raise UnreadableError(f"{module}.{name}")
    return _named_type(*_names(module)[name])


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def _is_member(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)


def _type(module: str, annotation: ast.expr) -> Any:
    code = compile(ast.Expression(annotation), module, "eval")
    try:
        return eval(code, {}, _Types(module))  # as typing.get_type_hints evaluates it
    except (NameError, TypeError, AttributeError):
        return Any
