"""The goals of a subject, shown one after the other: tests prove the equal, benchmarks measure the fast and the small.

bases: adapters on models as they are stored (GGUF, FP8, MXFP4, NVFP4, GPTQ, AWQ, HQQ, compressed-tensors).
methods: every method of PEFT beside PEFT.

Each goal is a command of its own; `--list` prints them. The output of each goes to a file in ``--logs``. Prints a
line a goal with its seconds and its end. Exit status: 0 all goals that ran have ended well, 1 not.

    python -m bench.goals bases|methods [--only NAME …] [--gguf model.Q4_K_M.gguf] [--model FOLDER] [--peft-tests DIR]
        [--task TRAIN.jsonl EVAL.jsonl] [--logs FOLDER] [--list]

Goals whose files are not given are left out, and named: they do not change the exit status. Run it on a quiet machine:
a subject takes some hours.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bench.report import Rows, working

ROOT = Path(__file__).parents[1]
SUBJECTS = {
    "bases": {
        "decoded values": "pytest tests/golden/test_quantized.py tests/unit/quant tests/unit/ops/test_ggml.py",
        "logits and gradients": "pytest tests/unit/store/test_quantized_folders.py",
        "experts in codes": "pytest tests/unit/store/test_coded_experts.py",
        "bad files": "pytest tests/unit/store/gguf tests/unit/store/test_quantized_folders.py",
        "in llama.cpp": "pytest tests/unit/export/gguf tests/e2e/test_gguf_adapter_page.py",
        "a step": "training.formats --parts step",
        "one row and sixteen": "training.formats --parts few",
        "GGUF beside its dense copy": "files.gguf_file {gguf}",
        "the first opening": "files.gguf_file {gguf} --first",
        "planned bytes": "training.plan",
        "planned seconds": "training.plan --time",
        "beside PEFT": "training.stored_peft",
        "merged and quantized": "files.requantize {model} --formats",
        "where to train": "files.trained_where {model} --task {task}",
    },
    "methods": {
        "equal to PEFT": "pytest tests/unit/methods tests/unit/inits tests/contract",
        "plain LoRA out": "pytest tests/unit/adapters/test_as_lora.py",
        "a step": "training.every_method",
        "a step on NF4": "training.every_method --base nf4",
        "peak memory": "training.every_peak",
        "planned bytes": "training.plan",
        "eight methods in one pass": "training.eight_methods",
        "PEFT's tests": "training.peft_suite --tests {peft_tests}",
    },
}


def main() -> int:
    args = arguments()
    given = {"gguf": args.gguf, "model": args.model, "peft_tests": args.peft_tests, "task": args.task}
    goals = {name: line for name, line in SUBJECTS[args.subject].items() if not args.only or name in args.only}
    commands = {name: command(line, given) for name, line in goals.items()}
    if args.list:
        print("\n".join(f"{name}: {shlex.join(line) if line else goals[name]}" for name, line in commands.items()))
        return 0
    args.logs.mkdir(parents=True, exist_ok=True)
    rows = Rows(commands, ("seconds", "ended", "output"))
    failed = False
    for name, line in commands.items():
        if line is None:
            rows.add(name, "-", "left out", f"wants {goals[name]}")
            continue
        log = args.logs / f"{args.subject}-{name.replace(' ', '-')}.txt"
        working(f"{name}: {shlex.join(line)}")
        start = time.monotonic()
        with log.open("w") as out:
            status = subprocess.run(line, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode
        failed |= status != 0
        rows.add(name, f"{time.monotonic() - start:.0f}", "well" if status == 0 else f"status {status}", str(log))
    return int(failed)


def command(line: str, given: dict[str, list[Path] | Path | None]) -> list[str] | None:
    """Return the words of a goal's command, or None if a file that it reads is not given."""
    program, *words = line.split()
    found = [sys.executable, "-m", program if program == "pytest" else f"bench.{program}"]
    for word in words:
        if not word.startswith("{"):
            found.append(word)
        elif (value := given[word.strip("{}")]) is None:
            return None
        else:
            found += map(str, value if isinstance(value, list) else [value])
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="goals by their names, as --list prints them")
    parser.add_argument("--gguf", type=Path, help="a GGUF file in blocks")
    parser.add_argument("--model", type=Path, help="a folder whose weights have never been in 4 bits")
    parser.add_argument("--peft-tests", type=Path, help="the folder tests of PEFT's source distribution")
    parser.add_argument("--task", type=Path, nargs=2, help="rows to train on, and held-out rows")
    parser.add_argument("--logs", type=Path, default=Path("build/goals"))
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    unknown = set(args.only or ()) - SUBJECTS[args.subject].keys()
    if unknown:
        parser.error(f"no goal is named {sorted(unknown)}: {args.subject} has {list(SUBJECTS[args.subject])}")
    return args


if __name__ == "__main__":
    sys.exit(main())
