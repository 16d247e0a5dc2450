"""docs/recipe.md is what scripts/recipe_table.py makes of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
TRAINING = "## training"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("recipe_table", ROOT / "scripts" / "recipe_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_versions(page: str) -> str:
    return "\n".join(line for line in page.splitlines() if not line.startswith("Made with "))


def test_the_page_is_made_from_the_code() -> None:
    """If other versions of transformers or TRL are installed, their settings are left out."""
    written, made = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"), script().page()
    if script()._made_with().strip() not in written:
        written, made = (without_versions(page).partition(TRAINING)[0] for page in (written, made))
    assert written == made, "write it anew: python scripts/recipe_table.py > docs/recipe.md"


def test_the_page_names_every_key() -> None:
    said = script().comments()
    assert said["model.source"].startswith("a folder, a .gguf file")
    assert said["training.optim"].endswith("(max_grad_norm: 0)")  # from the lines below it
    assert {"data.train", "adapter.r", "output", "seed"} <= set(said)
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert [key for key in said if f"`{key.rpartition('.')[2]}`" not in page] == []
