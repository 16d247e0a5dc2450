"""Steps with glibc's heap as it is by itself, and as training keeps it: fresh memory, seconds, high water.

Settings are those of `plan.py`. A process for each setting and heap, the two by turns; medians of the rounds.

    python -m bench.training.heap [--model NAME|FOLDER] [--only 12 16 18] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import nullcontext

from bench.report import ends_as_interrupted, last_printed
from bench.training.plan import carried_out, name_of, recipe_of, settings

HEAPS = ("usual", "kept")


def apart(number: int, heap: str, model: str) -> dict[str, float]:
    """Run seven steps of a setting in a process of its own."""
    command = [sys.executable, "-m", "bench.training.heap", "--part", heap, "--only", str(number), "--model", model]
    return last_printed(command, f"setting {number}, {heap}")


def main() -> None:
    """Print a table, a row a setting."""
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", type=int, nargs="+", default=[0, 12, 16, 18, 19, 20, 21])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=HEAPS)
    options = parser.parse_args()
    if options.part is not None:
        recipe = recipe_of(settings()[options.only[0]], options.model, rows=2, length=128)
        print(json.dumps(carried_out(recipe, nullcontext if options.part == "usual" else None)))
        return
    heads = [f"{heap}: {what}" for heap in HEAPS for what in ("fresh MB", "s", "high water MB")]
    print(f"| | setting | {' | '.join(heads)} | time |\n{'| --- ' * (3 + len(heads))}|", flush=True)
    for number in options.only:
        runs = [[apart(number, heap, options.model) for heap in HEAPS] for _ in range(options.rounds)]
        usual, kept = (
            {key: statistics.median(run[key] for run in each) for key in each[0]} for each in zip(*runs, strict=True)
        )
        cells = [
            text
            for run in (usual, kept)
            for text in (f"{run['fresh'] / 1e6:.0f}", f"{run['seconds']:.3f}", f"{run['process'] / 1e6:.0f}")
        ]
        ratio = kept["seconds"] / usual["seconds"]
        print(f"| {number} | {name_of(number)} | {' | '.join(cells)} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
