"""Rows that cannot be read are told before anything is planned or loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import DataError
from veneer.recipe.parts import DataPart
from veneer.recipe.readers import require_first_rows

ROWS = [{"ticket": "a", "queue": "b"}, {"ticket": "c", "queue": "d"}]


def part(folder: Path, **settings: Any) -> DataPart:
    """Templates over the columns of a file."""
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return DataPart(train=str(folder / "rows.jsonl"), completion="{queue}", **settings)


def test_a_template_that_asks_for_another_field_names_all_rows(tmp_path: Path) -> None:
    require_first_rows(part(tmp_path, prompt="{ticket}"))
    with pytest.raises(DataError, match=r"rows 1, 2.*asks for the field 'tickt'"):
        require_first_rows(part(tmp_path, prompt="{tickt}"))


def test_held_out_rows_are_looked_at_and_data_sets_of_the_hub_are_not(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "no ticket"}\n')
    with pytest.raises(DataError, match=r"other\.jsonl"):
        require_first_rows(part(tmp_path, prompt="{ticket}", eval=str(other)))
    other.write_text('{"ticket": "a", "queue": "b"}\n')
    more = DataPart(
        train=str(other), prompt="{ticket}", completion="{queue}", more=[{"source": str(tmp_path / "x.jsonl")}]
    )
    (tmp_path / "x.jsonl").write_text('{"subject": "no ticket"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl.*'ticket'"):
        require_first_rows(more)
    require_first_rows(DataPart(train="somebody/rows", prompt="{tickt}", completion="{queue}"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"ticket": \n{"ticket": "a", "queue": "b"}\n', "row 1"),
        ('["a"]\n{"ticket": "a", "queue": "b"}\n', "row 1: must be an object"),
        ("", "holds no rows"),
    ],
)
def test_a_file_that_begins_with_no_row_is_refused(tmp_path: Path, text: str, told: str) -> None:
    wanted = part(tmp_path, prompt="{ticket}")
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=told):
        require_first_rows(wanted)


def test_columns_of_no_form_name_their_file(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"ticket": "a"}\n')
    with pytest.raises(DataError, match=r"odd\.jsonl: rows have the columns \['ticket'\]"):
        require_first_rows(DataPart(train=str(tmp_path / "odd.jsonl")))
