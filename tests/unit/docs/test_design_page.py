"""docs/design.md: its layers and rooms are those of the code."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "design.md").read_text()
ROOMS = {path.name for path in (ROOT / "src" / "veneer").iterdir() if (path / "__init__.py").exists()}


def test_layers_are_those_that_the_linter_holds():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    held = next(each for each in contracts if each.get("containers") == ["veneer"])
    told = PAGE.split("Imports go from top to bottom")[1].split("```")[1]
    assert told.split("\n")[1:-1] == held["layers"]


def test_every_room_has_a_line_in_the_layout():
    layout = PAGE.split("## 2. Layout")[1].split("```")[1]
    assert set(re.findall(r"^  (\w+)/", layout, flags=re.MULTILINE)) == ROOMS


def test_every_file_that_a_page_names_exists():
    pages = [ROOT / "docs" / "design.md", *(ROOT / "docs" / "design").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"[\w./]*\w\.(?:py|h)\b", page.read_text())}
    there = "".join(f"/{path}\n" for room in ("src", "csrc", "tests", "scripts") for path in (ROOT / room).rglob("*.*"))
    advice = {"methods/x.py", "utils.py", "helpers.py", "_ops.py"}
    assert {name for name in named if f"/{name}\n" not in there} <= advice
