"""Peak memory of a training step of each method, beside PEFT's.

    python -m bench.training.every_peak [--only miss oft …] [--model smollm2-135m-instruct] [--rows 4] [--tokens 256]

Every figure is the high water of a process of its own that loads a base in bfloat16, makes the adapter and takes two
bare steps (`lora_step.step`). A line is printed as its method is measured. Exit status: 0 done, 1 a method takes more
memory than PEFT's, or fails.

The methods are those of `every_method.py`, with its settings.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

from bench.lora_step import SIDES, adapted_by, base_of, optimizer_of, step
from bench.report import ends_as_interrupted, quiet_libraries, working
from bench.resident import high_water_mb
from bench.training.every_method import METHODS
from bench.training.methods import tokens_of
from bench.training.snippet9 import SEVEN
from veneer.model.fused.decoder import fuse
from veneer.store.source import resolve

N_STEPS = 2
OWN_FIELDS = ("progressbar",)  # of PEFT's configs, about what they print


def main() -> int:
    args = arguments()
    ends_as_interrupted()
    if args.side:
        print(f"{peak(args, args.only[0], args.side):.0f}")
        return 0
    print("| method | PEFT, MB | veneer | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
    missed = []
    for method in args.only:
        try:
            theirs, own = (apart(args, method, side) for side in SIDES)
        except RuntimeError as error:  # a line, not the end of the others
            print(f"| {method} | {error} |", flush=True)
            missed.append(method)
            continue
        print(f"| {method} | {theirs} | {own} | {own / theirs:.2f}x |", flush=True)
        if own > theirs:
            missed.append(method)
    print(f"more than PEFT, or failed: {', '.join(missed)}" if missed else "none takes more than PEFT")
    return int(bool(missed))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--side", choices=SIDES, help="one figure of one method, in this process")
    return parser.parse_args()


def apart(args: argparse.Namespace, method: str, side: str) -> int:
    """MB of one side in a process of its own. Raises RuntimeError with the end of its messages."""
    working(f"{method}: {side}")
    command = [sys.executable, "-m", "bench.training.every_peak", "--side", side, "--only", method]
    command += ["--model", args.model, "--rows", str(args.rows), "--tokens", str(args.tokens)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(" ".join(out.stderr.strip()[-300:].split()))
    return int(out.stdout.splitlines()[-1])


def peak(args: argparse.Namespace, method: str, side: str) -> float:
    """High water in MB of this process, once it has made an adapter and taken bare steps."""
    quiet_libraries()
    fields = {"target_modules": list(SEVEN), **METHODS[method].fields}
    if side == "veneer":
        fields = {key: value for key, value in fields.items() if key not in OWN_FIELDS}
    base = base_of(side, "dense", str(resolve(args.model)), torch.bfloat16)
    model = adapted_by(side, base, METHODS[method].config, fields)
    if side == "veneer":
        fuse(model)
    optimizer, ids = optimizer_of(model), tokens_of(model, args.rows, args.tokens)
    for _ in range(N_STEPS):
        step(side, model, optimizer, ids)
    return high_water_mb() * 2**20 / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
