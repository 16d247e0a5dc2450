"""Scripts of bench/ import names that exist, and the folders beside bench/ hide no package from their libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import veneer

ROOT = Path(__file__).parents[3]


def imported(*places: Path, code: str) -> str:
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in places]!r}", code]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True).stdout


def test_no_package_has_the_name_of_the_folder():
    assert "bench" not in packages_distributions().keys() | sys.stdlib_module_names


def test_transformers_sees_no_package_in_the_folders():
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert imported(ROOT, code=code) == imported(code=code)


def test_what_a_script_imports_of_veneer_and_of_other_scripts_exists():
    asked = {pair for path in (ROOT / "bench").rglob("*.py") for pair in names_asked_for(path.read_text("utf-8"))}
    assert len(asked) > 100
    assert not [pair for pair in asked if not is_there(*pair)]


def names_asked_for(source: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("veneer", "bench"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def is_there(module: str, name: str) -> bool:
    """Modules are read, not imported: some need packages of their peers."""
    if module == "veneer":
        return name in veneer.__all__
    place = (ROOT if module.startswith("bench") else ROOT / "src") / module.replace(".", "/")
    own = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    within = place / f"{name}.py", place / name
    return any(path.exists() for path in within) or (own.exists() and name in bound(own))


@cache
def bound(module: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(module.read_text("utf-8"))))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    taken = {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return defined | taken | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
