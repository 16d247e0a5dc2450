"""Imports that no layer check can follow, because they are made from strings, stand in the walks of folders alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "veneer"
# The lazy public names; folders that are walked; the back ends of ops, and the compiled module behind one of them;
# the reward functions that a recipe names; the work of a verb, which its page of help does without.
WALKS = {"__init__.py", "inits/__init__.py", "methods/__init__.py", "methods/variants/__init__.py", "ops/dispatch.py"}
WALKS |= {"ops/cpu/module.py", "model/blueprint/registry.py", "store/gguf/registry.py", "recipe/rewards.py"}
WALKS |= {"cli/work.py", "contract/__init__.py"}


def imports_from_strings(source: str) -> list[int]:
    """The lines that import a module of veneer, or one that is known only when they run, by its name as a string."""
    nodes = list(ast.walk(ast.parse(source)))
    harmless = {node.func for node in nodes if isinstance(node, ast.Call) and _names_another_package(node)}
    return sorted(node.lineno for node in nodes if _imports(node) and node not in harmless)


def _imports(node: ast.AST) -> bool:
    name = getattr(node, "id", getattr(node, "attr", None))
    return isinstance(node, ast.Name | ast.Attribute) and name in ("import_module", "__import__")


def _names_another_package(call: ast.Call) -> bool:
    first = call.args[0] if call.args else None
    return isinstance(first, ast.Constant) and str(first.value).partition(".")[0] != "veneer"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('import importlib\nimportlib.import_module("veneer.store")', [2]),
        ("from importlib import import_module\nimport_module(name)", [2]),
        ("modules = map(importlib.import_module, names)", [1]),
        ('__import__(f"veneer.{name}")', [1]),
        ('importlib.import_module("triton").knobs', []),
        ('importlib.metadata.version("veneer")', []),
    ],
)
def test_imports_from_strings_are_found(source: str, lines: list[int]) -> None:
    assert imports_from_strings(source) == lines


def test_only_walks_import_from_strings() -> None:
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if imports_from_strings(path.read_text())}
    assert found <= WALKS
