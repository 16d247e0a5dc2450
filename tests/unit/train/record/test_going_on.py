"""Changes that a resumed run may make: the number of processes, if its steps keep their rows."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.errors import ConfigError
from veneer.recipe.recipe import Recipe, parse_recipe
from veneer.train.record.going_on import changes_since


def recipe(global_batch: int, **training: Any) -> Recipe:
    part = {"model": {"source": "nowhere/at-all"}, "data": {"train": "rows.jsonl"}, "output": "out"}
    return parse_recipe({**part, "training": training, "distributed": {"global_batch": global_batch}})


@pytest.mark.parametrize(
    ("batches", "training", "refused"),
    [
        ((192, 192), {}, None),
        (
            (96, 64),
            {},
            r"processes: 4 before, 8 now\n +distributed\.global_batch: 96 before, 64 now",
        ),  # 96 // 64 is 1 too
        ((192, 192), {"dataloader_drop_last": True}, "processes: 4 before, 8 now"),
    ],
)
def test_another_number_of_processes_goes_on_with_the_same_rows_alone(
    batches: tuple[int, int], training: dict[str, Any], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (recipe(each, **training) for each in batches)
    before = {"recipe": old.model_dump(), "n_processes": 4}
    monkeypatch.setattr("veneer.recipe.recipe._n_processes", lambda: 8)
    monkeypatch.setattr("veneer.train.record.going_on.n_processes", lambda: 8)
    if refused is not None:
        with pytest.raises(ConfigError, match=refused):
            changes_since(before, new, allow=False)
    found = changes_since(before, new, allow=refused is not None)
    assert [each.key for each in found] == ["processes", *["distributed.global_batch"] * (batches[0] != batches[1])]
