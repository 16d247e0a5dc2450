"""`veneer intrinsic` writes the curve and its picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result


def test_the_curve_is_written(veneer: Callable[..., Result], model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"text {i}:", "completion": " good" if i % 2 else " bad"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("intrinsic", model_folder, "-d", tmp_path / "data.jsonl", "-o", tmp_path / "out")
    result = veneer(*command, "--dims", "7,40", "--steps", 3, "--structure-aware", "--learning-rate", 0.01)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert list(facts["scores"]) == ["7", "40"]
    assert facts["training"] == {"steps": 3, "learning_rate": 0.01, "structure_aware": True, "seed": 0}
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    assert "d90: " in result.stdout
    wrong = veneer(*command, "--dims", "7,many")
    assert (wrong.exit_code, "must be whole numbers" in wrong.stderr) == (2, True)
    taken = veneer(*command, "-o", tmp_path / "data.jsonl" / "out")
    assert (taken.exit_code, "data.jsonl is a file, not a folder" in taken.stderr) == (2, True)
