"""A public name is one class, with few exceptions, and few functions take a whole recipe where a part would do."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

SOURCES = [path.read_text() for path in (Path(__file__).parents[2] / "src" / "veneer").rglob("*.py")]


def test_two_classes_of_one_name_are_two_nouns() -> None:
    names = Counter(name for source in SOURCES for name in re.findall(r"^class ([A-Z]\w*)", source, re.MULTILINE))
    shared = sorted(name for name, n in names.items() if n > 1)
    assert len(shared) <= 5, shared


def test_functions_take_the_part_of_a_recipe_that_they_read() -> None:
    nodes = (node for source in SOURCES if ": Recipe" in source for node in ast.walk(ast.parse(source)))
    whole = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and _takes_recipe(node.args)]
    assert 0 < len(whole) <= 50, whole


def _takes_recipe(given: ast.arguments) -> bool:
    every = (*given.posonlyargs, *given.args, *given.kwonlyargs)
    return any(each.annotation is not None and ast.unparse(each.annotation).startswith("Recipe") for each in every)
