"""Forty-five minutes with a rented card: everything that only a GPU can tell, in order of worth.

    python -m bench.gpu [--out FILE] [--only WORD …] [--again failed|all] [--minutes 45] [--rehearse]

Stages: 0 the machine, 1 commands, 2 values of kernels, 3 their times, 4 training steps, 5 serving, 6 tiles. Each case
is a process with a time limit, and a failure is a row. Results are in the file as soon as a case ends, with the tables
beside it. The same command goes on where a run was cut off: a case that has a row is not run again unless --again asks.

--only: cases with such a word in their name, or of a stage's number.
--rehearse: all of it at tiny sizes on the CPU, kernels in Triton's interpreter. Times mean nothing then.

Exit status: 0 all passed or were skipped; 1 something is wrong, or is left; 3 there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.gpu.cases import STAGES, cases
from bench.gpu.runner import Case, Results, Row, run_all, summary, told
from bench.gpu.tables import tables
from bench.report import ROOT, done, ends_as_interrupted, working

NO_GPU = 3  # exit status
BUILD = ROOT / "build" / "gpu"


def main() -> int:
    args = arguments()
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "bench.gpu: there is no CUDA GPU here; nothing was checked and nothing measured. Add --rehearse to try it."
        )
        return NO_GPU
    ends_as_interrupted()
    file = args.out or BUILD / ("rehearsal.jsonl" if args.rehearse else "gpu.jsonl")
    results = Results(file)
    chosen = [case for case in cases(args.rehearse) if _is_asked(case, args.only)]
    again = {"failed": _wrong(results.rows()), "all": {row["result"] for row in results.rows()}}.get(args.again, set())
    facts = {"commit": _commit(), "at": datetime.now(UTC).isoformat(timespec="seconds")}
    until = time.monotonic() + args.minutes * 60
    left = run_all(
        chosen, results, again=again, facts=facts, until=until,
        begun=lambda case: working(f"stage {case.stage}, {STAGES[case.stage]}: {case.name}"), ended=_show,
    )  # fmt: skip
    names = {case.name for case in chosen}
    rows = [row for row in results.rows() if row["case"] in names]
    file.with_suffix(".md").write_text("\n".join(tables(results.rows())) + "\n", encoding="utf-8")
    print(f"{summary(rows, left)}\nresults: {file}; tables: {file.with_suffix('.md')}")
    return int(bool(left or _wrong(rows) or not chosen))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="by default build/gpu/gpu.jsonl, or rehearsal.jsonl")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[])
    parser.add_argument("--again", choices=("failed", "all"))
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    args.minutes = float("inf") if args.rehearse else args.minutes
    return args


def _is_asked(case: Case, words: list[str]) -> bool:
    return not words or any(word == str(case.stage) or (not word.isdigit() and word in case.name) for word in words)


def _wrong(rows: list[Row]) -> set[str]:
    return {row["result"] for row in rows} - {"passed", "skipped"}


def _show(row: Row) -> None:
    done()
    print("\n".join(told(row)), flush=True)


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
        found = subprocess.run(command, capture_output=True, check=False)
    except OSError:  # a rented machine may lack git
        return "unknown"
    return found.stdout.decode().strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
