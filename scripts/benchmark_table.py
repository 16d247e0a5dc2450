"""Write the table of docs/benchmarks.md from the kept results, and the tables of docs/benchmarks/gpu.md from the kept
files of `make gpu`: ``python scripts/benchmark_table.py``. A test holds the pages to the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
TYPED = "typed before `--keep`, unknown"
GPU_PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"
GPU_START, GPU_END = "<!-- gpu -->\n", "<!-- end of gpu -->\n"
START, END = "<!-- results -->\n", "<!-- end of results -->\n"
sys.path.insert(0, str(ROOT))


def results() -> list[dict[str, Any]]:
    """The kept results in the order of the page."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "bench" / "results").glob("*.json")]
    return sorted(found, key=lambda result: result["order"])


def lines() -> Iterator[str]:
    """The lines of the table."""
    from bench.report import sentence

    yield "| claim | measured | peer | machine | command | commit |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for result in results():
        claim = f"[{result['claim']}](benchmarks/{result['page']})"
        figure = sentence(result["figure"], result["figures"])
        measured = f"| {claim} | {figure} | {result['peer']} | {result['machine']} | `{result['command']}` |"
        yield f"{measured} {result['commit'] or TYPED} |"


def gpu_lines(folder: Path) -> Iterator[str]:
    """The lines of each card's tables."""
    from bench.gpu.runner import Results
    from bench.gpu.tables import tables

    files = sorted(folder.glob("*.jsonl"))
    if not files:
        yield "No card has been measured."
    for file in files:
        rows = Results(file).rows()
        yield from (f"## {file.stem}, commit {', '.join(sorted({row['commit'] for row in rows}))}", "")
        yield from tables(rows)


def page(text: str) -> str:
    """The page with its table made anew."""
    return _filled(text, START, END, lines())


def gpu_page(text: str, folder: Path = ROOT / "bench" / "results" / "gpu") -> str:
    """The page of GPUs with its tables made anew from the files of a folder."""
    return _filled(text, GPU_START, GPU_END, gpu_lines(folder))


def _filled(text: str, start: str, end: str, made: Iterator[str]) -> str:
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return before + start + "\n" + "\n".join(made) + "\n\n" + end + after


if __name__ == "__main__":
    for file, made in ((PAGE, page), (GPU_PAGE, gpu_page)):
        file.write_text(made(file.read_text(encoding="utf-8")), encoding="utf-8")
