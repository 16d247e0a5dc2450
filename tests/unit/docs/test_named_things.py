"""The pages name what exists: files, names of the package, options of commands and scripts, links."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from veneer import IA3Config, LoraConfig, OFTConfig, PromptTuningConfig
from veneer.cli.app import app

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "src" / "veneer"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md")] + sorted(ROOT.glob("docs/**/*.md"))
VERBS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
EXAMPLES = {"x", "test_x", "yours"}  # the file that a reader is about to write
OTHERS_WORDS = {"core/CPU", "requests/s"}  # of TRL in docs/recipe.md, and a unit
RESULTS = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_files(page: Path) -> None:
    places = {ROOT: folders(ROOT), PACKAGE: folders(PACKAGE), PACKAGE / "model": {"blueprint", "fused"}}
    places |= {ROOT / "csrc": folders(ROOT / "csrc"), PACKAGE / "serve": folders(PACKAGE / "serve")}
    named = set(re.findall(r"(?<![\w./-])\w+/[\w/.-]*\w|(?<![\w./-])\w+/(?!\w)", page.read_text())) - OTHERS_WORDS
    for path in named:
        homes = [place for place, first in places.items() if path.split("/")[0] in first]
        known = any(place.joinpath(path).exists() or place.joinpath(f"{path}.py").exists() for place in homes)
        assert not homes or known or EXAMPLES & set(re.split(r"[/.]", path)), path


def folders(place: Path) -> set[str]:
    """Return the folders of the source alone: a reader who has tried a page has folders of results too."""
    return {path.name for path in place.iterdir() if path.is_dir() and path.name.isidentifier()} - RESULTS


@pages
def test_names_of_the_package(page: Path) -> None:
    for name in re.findall(r"(?<![\w./`])`?(veneer(?:\.[A-Za-z_]\w*)+)(?!\.?\w)", page.read_text()):
        assert is_there(name), name


def is_there(name: str) -> bool:
    found: Any = importlib.import_module("veneer")
    at = "veneer"
    for part in name.split(".")[1:]:
        at = f"{at}.{part}"
        found = getattr(found, part, None) or (importlib.util.find_spec(at) and importlib.import_module(at))
    return bool(found)


@pages
def test_options_of_commands(page: Path) -> None:
    for verb, rest in commands(page, r"\bveneer ([a-z][\w-]*)"):
        command = VERBS.get(verb)
        of_a_group = getattr(command, "commands", None)
        if of_a_group is not None:
            command = of_a_group.get((rest.split() or [""])[0])
        if command is not None:
            options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
            assert set(OPTION.findall(rest)) <= options | {"--help"}, (verb, rest)


@pages
def test_options_of_scripts(page: Path) -> None:
    for script, rest in commands(page, r"python -m bench\.([\w.]+)"):
        sources = [ROOT / "bench" / f"{name.replace('.', '/')}.py" for name in (script, "kernels.op_tables")]
        taken = "".join(source.read_text() for source in sources)
        assert {name for name in OPTION.findall(rest) if f'"{name}"' not in taken} == set(), script


def commands(page: Path, start: str) -> Iterator[tuple[str, str]]:
    """The names that are called, each with the rest of its line (of its code span)."""
    for line in page.read_text().replace("\\\n", " ").splitlines():
        yield from re.findall(rf"{start}([^`;|#]*)", line)


@pages
def test_links(page: Path) -> None:
    for url in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if url.startswith("http"):
            continue
        name, _, anchor = url.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), url
        assert not anchor or anchor in anchors(target), url


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_front_page_names_the_usual_learning_rates() -> None:
    rates = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0].startswith("**"):
            names = re.findall(r"\*\*(.+?)\*\*", cells[0])
            given = [float(rate) for rate in cells[3].split(";")]
            rates |= dict(zip(names, given * (len(names) // len(given)), strict=True))
    configs = {
        "LoRA": LoraConfig,
        "DoRA": LoraConfig,
        "OFT": OFTConfig,
        "IA3": IA3Config,
        "prompt tuning": PromptTuningConfig,
    }
    assert rates == {name: config.usual_learning_rate for name, config in configs.items()}
