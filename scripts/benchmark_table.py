"""Write the table of docs/benchmarks.md from the kept results: ``python scripts/benchmark_table.py`` after a benchmark
with ``--keep``. A test holds the page to the results.
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


def page(text: str) -> str:
    """The page with its table made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + "\n".join(lines()) + "\n\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
