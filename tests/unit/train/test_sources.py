"""Rows that cannot be read are told before anything is planned or loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import DataError
from veneer.recipe.parts import DataPart
from veneer.train.sources import require_readable

ROWS = [{"ticket": "a", "queue": "b"}, {"ticket": "c", "queue": "d"}]


def part(folder: Path, **settings: Any) -> DataPart:
    """Templates over the columns of a file."""
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return DataPart(train=str(folder / "rows.jsonl"), completion="{queue}", **settings)


def test_a_template_that_asks_for_another_field_names_all_rows(tmp_path: Path) -> None:
    require_readable(part(tmp_path, prompt="{ticket}"))
    with pytest.raises(DataError, match=r"rows 1, 2.*asks for the field 'tickt'"):
        require_readable(part(tmp_path, prompt="{tickt}"))


def test_held_out_rows_are_looked_at_and_data_sets_of_the_hub_are_not(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "no ticket"}\n')
    with pytest.raises(DataError, match=r"other\.jsonl"):
        require_readable(part(tmp_path, prompt="{ticket}", eval=str(other)))
    require_readable(DataPart(train="somebody/rows", prompt="{tickt}", completion="{queue}"))
