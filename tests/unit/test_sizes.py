"""Files, folders and functions have sizes that one reads at a sitting, and an import within a function says why."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for room in ("src", "bench", "tests", "scripts", "examples")
    for path in (ROOT / room).rglob("*.py")
}
ONE_FILE_EACH = {Path("src/veneer") / room for room in ("methods", "serve/http")}  # of a method, and of a route


def test_files_have_500_lines_at_most() -> None:
    long = {str(path): source.count("\n") for path, source in FILES.items() if source.count("\n") > 500}
    assert not long


def test_folders_of_the_source_have_35_files_at_most() -> None:
    folders = [path.parent for path in FILES if path.parts[0] == "src"]
    full = {str(folder): folders.count(folder) for folder in set(folders) - ONE_FILE_EACH if folders.count(folder) > 35}
    assert not full


def test_functions_have_50_lines_at_most_below_their_docstrings() -> None:
    """Parameters are not counted: options of a command, and tensors of a kernel, have a line each."""
    long = {
        f"{path}:{node.name}": n_lines
        for path, source in FILES.items()
        if _has_long_part(source)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (n_lines := _lines_of(node)) > 50
    }
    assert not long


def test_imports_within_functions_say_why() -> None:
    silent = []
    for path, source in FILES.items():
        lines = source.splitlines() if path.parts[0] == "src" else []
        for number, line in enumerate(lines):
            before = "#" if lines[number - 1] == "try:" else lines[number - 1].strip()  # of a file, not of a function
            follows = before.startswith(("import ", "from "))  # the first of several says it for all
            is_within = re.match(r"\s+(import \w+|from [\w.]+ import )", line) and "TYPE_CHECKING:" not in before
            if is_within and not follows and "#" not in line and not before.startswith("#"):
                silent.append(f"{path}:{number + 1}")
    assert not silent


def _has_long_part(source: str) -> bool:
    """Return True if a function of the file may be long: none begins within so many lines. Parsing takes longer."""
    return any(part.count("\n") > 50 for part in re.split(r"^ *(?:async )?(?:def|class) ", source, flags=re.MULTILINE))


def _lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
