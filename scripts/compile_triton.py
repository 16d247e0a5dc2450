"""Compile every Triton kernel for NVIDIA GPUs, down to machine code, on a machine that needs no GPU.

The interpreter, in which the tests compute, accepts what a compiler refuses: shapes that are no powers of two, tiles
that do not fit shared memory, mixed types. Each version of Triton refuses other things: builds of torch for CUDA pin
3.4 (torch 2.8) to 3.8, and the tests have the newest. Each Triton and capability gets a process of its own
(`scripts/triton_forms.py`). Ends with 1, and names what is wrong, if one fails.

    python scripts/compile_triton.py [--triton 3.6.0 3.7.1 FILE.whl …] [--capability 8.0 9.0 …] [--quick]

--triton: versions, which pip unpacks under build/triton unless they are installed, or wheels (default: the Triton that
is installed).
--quick: few forms of each kernel, in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path

SCRIPTS = Path(__file__).parent
UNPACKED = SCRIPTS.parent / "build" / "triton"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", nargs="+", default=[version("triton")], metavar="VERSION")
    parser.add_argument("--capability", nargs="+", default=["8.0", "9.0"])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    folders = {each: unpacked(each) for each in args.triton}
    jobs = list(product(folders.items(), args.capability))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        problems = pool.map(lambda job: compiled(*job[0], job[1], args.quick), jobs)
    sys.exit("\n".join(filter(None, problems)) or 0)


def unpacked(given: str) -> Path | None:
    """Return the folder of a version of Triton, or of a wheel; None for the version that is installed."""
    is_wheel = given.endswith(".whl")
    wanted = Path(given).name.split("-")[1] if is_wheel else given
    if wanted == version("triton"):
        return None
    folder = UNPACKED / wanted
    if not folder.is_dir():
        part = folder.with_name(f"{wanted}.part")  # what pip has not unpacked to its end is no Triton
        options = ["--quiet", "--no-deps", "--no-compile", "--upgrade", "--target", str(part)]
        what = given if is_wheel else f"triton=={wanted}"
        subprocess.run([sys.executable, "-m", "pip", "install", *options, what], check=True)
        part.rename(folder)
    return folder


def compiled(triton: str, folder: Path | None, capability: str, quick: bool) -> str:
    """Compile all forms in a process, print what it said, and return what is wrong."""
    title = f"Triton {Path(triton).name} for {capability}"
    command = [sys.executable, str(SCRIPTS / "triton_forms.py"), capability.replace(".", ""), *(["--quick"] * quick)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if folder is None else {"PYTHONPATH": str(folder)})
    begin = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [f"{title}: {line}" for line in done.stdout.splitlines()]
    print("\n".join(lines), f"in {time.monotonic() - begin:.0f} s", flush=True)
    if done.returncode == 0:
        return ""
    said = done.stderr.strip() or f"ended with {done.returncode}"  # a crash says nothing
    return "\n".join(f"{title}: {line}" for line in said.splitlines())


if __name__ == "__main__":
    main()
