"""docs/benchmarks.md shows the kept results."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_table", ROOT / "scripts" / "benchmark_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_made_from_the_results(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) == text, "run python scripts/benchmark_table.py"


def test_the_tables_of_gpus_are_made_from_the_kept_files(script: ModuleType, tmp_path: Path) -> None:
    text = script.GPU_PAGE.read_text(encoding="utf-8")
    assert script.gpu_page(text) == text, "run python scripts/benchmark_table.py"
    row = {"stage": 3, "case": "times, norms", "result": "passed", "commit": "0123456789"}
    row["figures"] = [{"what": "RMSNorm, bfloat16", "ms": 0.5}]
    (tmp_path / "A100.jsonl").write_text(json.dumps(row))
    made = script.gpu_page(text, tmp_path)
    assert "## A100, commit 0123456789\n" in made
    assert "| times, norms | RMSNorm, bfloat16 | 0.5 |" in made
    assert "No card" not in made.partition("<!-- gpu -->")[2]


TYPED = {
    "dpo-step", "export", "loading", "optimizer", "planning", "quantizing", "serving-adapters", "serving-arrivals",
    "serving-base", "serving-cold", "serving-one", "sweep", "training-mixed", "training-packed", "training-step",
}  # fmt: skip
"""Results from before ``--keep`` wrote the commit. None is to be added."""


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_is_one_that_keep_wrote_with_its_commit(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    if path.stem in TYPED:
        assert result["commit"] is None, "it was made again: take it out of TYPED"
        return
    assert re.fullmatch(r"[0-9a-f]{10}", result["commit"] or "")
    assert f"--keep {path.stem}" in result["command"]


def test_each_result_says_how_it_was_measured() -> None:
    orders = []
    for path in (ROOT / "bench" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {
            "order",
            "claim",
            "figure",
            "figures",
            "peer",
            "machine",
            "command",
            "commit",
            "page",
        } == result.keys(), path.name
        page, _, anchor = result["page"].partition("#")
        assert (ROOT / "docs" / "benchmarks" / page).exists(), path.name
        assert anchor, path.name
        assert all(result[key] for key in ("claim", "peer", "machine", "command")), path.name
        orders.append(result["order"])
    assert sorted(orders) == list(range(1, len(orders) + 1))
