"""Stages 2 and 3: the kernels of a family on a GPU, their values against float64, their memory, and their times.

    python -m bench.gpu.kernels values|memory|times FAMILY [--rehearse]

values: errors are held against float64, at most twice those of the peer's own code in the same dtype; codecs must give
the reference's very bits. Exit status 1 if one does not hold.
memory: the values at tiny sizes under NVIDIA's compute-sanitizer.
times: in turns with the peer, by events; and by replays of a graph, where the host has no part. What is wanted of a
kernel is the rate at which its bytes move, beside that of a copy in stage 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

from bench.gpu.runner import skip

REHEARSED = "--rehearse" in sys.argv
PARTS = ("values", "memory", "times")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("family")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.part == "memory":
        return _under_sanitizer(args.family)
    os.environ["TRITON_INTERPRET"] = str(int(args.rehearse))  # read when triton is imported
    from bench.gpu.measured_kernels import check, timed

    return check(args.family, args.rehearse, args.tiny) if args.part == "values" else timed(args.family, args.rehearse)


def _under_sanitizer(family: str) -> int:
    program = shutil.which("compute-sanitizer")
    if program is None or REHEARSED:
        skip("compute-sanitizer is not on the path" if program is None else "compute-sanitizer needs a GPU")
    command = [program, "--error-exitcode", "1", sys.executable, "-m", "bench.gpu.kernels", "values", family, "--tiny"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
