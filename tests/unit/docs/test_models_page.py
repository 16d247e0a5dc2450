"""The table of models is what becomes of each type now."""

from pathlib import Path

import pytest
from tests.tiny_configs import CAUSAL, CLASSES, IMAGES, SEQ2SEQ
from tests.tiny_types import row_of, rows_in

ROWS = rows_in((Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8"))
SAMPLE = ("llama", "lfm3", "mamba2", "seq2seq/t5", "classes/bert")
KNOWN = {*CAUSAL, *IMAGES, *(f"seq2seq/{name}" for name in SEQ2SEQ), *(f"classes/{name}" for name in CLASSES)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SAMPLE else [pytest.mark.full]) for n in ROWS])
def test_a_row_is_what_becomes_of_its_type(name):
    if name not in KNOWN:
        pytest.skip(f"this transformers has no {name}")
    row = row_of(name)
    assert row == ROWS[name], f"write it anew: python scripts/models_table.py {name}"


def test_no_type_that_is_served_differs_from_generate():
    assert not [name for name, row in ROWS.items() if "differs" in row[5]]
