"""`veneer sweep` is `veneer train` for a recipe with a sweep part."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from veneer.cli.app import app


def test_a_recipe_without_a_sweep_is_refused_and_one_with_it_is_checked_as_by_train(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    recipe = {"model": {"source": "none"}, "data": {"train": "none.jsonl"}, "output": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(app, ["sweep", str(path)])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert "recipe.yaml has no sweep part: add one, or start the run with `veneer train`." in done.output
    path.write_text(yaml.safe_dump(recipe | {"sweep": {"grid": {"adapter.rr": [2]}, "scheduler": "ash"}}))
    told = [CliRunner().invoke(app, [verb, str(path)]).output for verb in ("sweep", "train")]
    assert told[0] == told[1]
    assert "sweep.scheduler: 'ash' is unknown: it is one of none, asha" in told[0]
