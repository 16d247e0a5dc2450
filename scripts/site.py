"""Pages of the site that are no files of docs/: the API, made from the public names, and pages from the root.

A hook of mkdocs, see mkdocs.yml.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import veneer

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
API = {
    "adapters": ("Adapters", ("adapters", "plain", "records", "inits", "model")),
    "methods": ("Methods", ("methods",)),
    "training": ("Training", ("train", "learn")),
    "storage": ("Storage", ("store",)),
    "serving": ("Serving", ("serve",)),
}
"""Pages by name: a title, and the folders whose public names they show."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for name, (title, folders) in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(title, folders)))
    for source, target in FROM_ROOT.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links of pages from the root lead from docs/, and links to the root's pages to their copies."""
    markdown = markdown.replace("](docs/", "](")
    for source, target in FROM_ROOT.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}").replace(f"]({source}", f"]({target}")
    return markdown


def api_page(title: str, folders: tuple[str, ...]) -> str:
    """A page for the public names of some folders: what each is comes from its docstring."""
    parts = [f"# {title}\n", "Names that `from veneer import …` gives.\n"]
    return "\n".join([*parts, *(f"::: {home}.{name}\n" for name, home in public_names(folders))])


def public_names(folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Names with their modules, in the order of the package."""
    for name, home in veneer._HOMES.items():
        if re.match(rf"veneer\.({'|'.join(folders)})\b", home):
            yield name, home
