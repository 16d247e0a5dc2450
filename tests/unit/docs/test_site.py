"""The site's pages of the API show every public name once."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import veneer

ROOT = Path(__file__).parents[3]


def test_every_public_name_stands_on_one_page() -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    shown = [
        name
        for title, folders in site.API.values()
        for name in re.findall(r"^::: .*\.(\w+)$", site.api_page(title, folders), flags=re.M)
    ]
    assert sorted(shown) == sorted(veneer._HOMES)


def test_the_navigation_names_every_page_of_docs() -> None:
    named = set(re.findall(r"^ +- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} <= named


def test_no_page_links_out_of_the_site() -> None:
    """Strict mkdocs refuses it; a file of the repository that is no page is named, not linked."""
    for path in (ROOT / "docs").rglob("*.md"):
        links = re.findall(r"\]\((\.\./[^)\s#]*)", path.read_text())
        inside = {link for link in links if (path.parent / link).resolve().is_relative_to(ROOT / "docs")}
        assert set(links) - inside <= {"../CONTRIBUTING.md", "../CHANGELOG.md"}, path.name
