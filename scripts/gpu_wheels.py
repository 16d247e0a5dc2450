"""Gather the wheels that a rented machine with a GPU lacks, for `make gpu` there without a network.

    python scripts/gpu_wheels.py [--has FREEZE] [--python 3.12] [--cuda 130] [--into build/gpu-wheels]

--has: the output of ``pip freeze`` on that machine (default: torch and what it brings, transformers, accelerate).
--cuda: the CUDA version of its torch; of bitsandbytes' libraries that one alone is kept.

Versions are those of this environment. There: ``pip install --no-index --no-deps build/gpu-wheels/*.whl``, and veneer's
own wheel, which ``scripts/wheel`` builds, or its source.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PEERS = ("peft", "bitsandbytes", "liger-kernel")
BROUGHT = ("torch", "transformers", "accelerate")  # there by default, with all that they need
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in range(17, 36)))  # glibc of Ubuntu 22.04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--has", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", default="130")
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "gpu-wheels")
    args = parser.parse_args()
    there = needed(BROUGHT, args.python) if args.has is None else frozen(args.has.read_text(encoding="utf-8"))
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = sorted(needed((*own, *PEERS), args.python) - there)
    args.into.mkdir(parents=True, exist_ok=True)
    lacking = [name for name in wanted if not gathered(name, args)]
    for wheel in args.into.glob("bitsandbytes-*.whl"):
        trim(wheel, args.cuda)
    wheels = list(args.into.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.0f} MiB, in {args.into}")
    sys.exit(f"no wheel for Python {args.python}: {', '.join(lacking)}" if lacking else 0)


def needed(names: tuple[str, ...], python: str) -> set[str]:
    """The packages that these need, themselves too, by what is installed here."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found, waiting = set[str](), list(names)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate(environment)):
            continue
        found.add(name)
        try:
            waiting += distribution(name).requires or []
        except PackageNotFoundError:  # its newest version is taken, without what it needs
            continue
    return found


def frozen(text: str) -> set[str]:
    """The packages of a list as ``pip freeze`` writes it."""
    names = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in text.splitlines())
    return {canonicalize_name(found[0]) for found in names if found}


def gathered(name: str, args: argparse.Namespace) -> bool:
    """Download a wheel in this environment's version; return False if there is none."""
    try:
        name += f"=={distribution(name).version.partition('+')[0]}"
    except PackageNotFoundError:
        print(f"{name} is not installed here: its newest version", flush=True)
    where = [word for platform in PLATFORMS for word in ("--platform", platform)]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", args.python, "--dest", str(args.into)]
    return (
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *where, name], check=False).returncode == 0
    )


def trim(wheel: Path, cuda: str) -> None:
    """Leave one library of bitsandbytes' many in its wheel, where each CUDA version has its own."""
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in given.infolist():
            if is_needed(entry.filename, cuda):
                content = given.read(entry)
                if entry.filename.endswith(".dist-info/RECORD"):
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(line for line in lines if is_needed(line.partition(",")[0], cuda)).encode()
                kept.writestr(entry, content)
    part.replace(wheel)


def is_needed(path: str, cuda: str) -> bool:
    """Return False for a library of another CUDA version, of ROCm or of Intel's GPUs."""
    library = re.search(r"libbitsandbytes_(\w+)\.so", path)
    return library is None or library[1] == f"cuda{cuda}"


if __name__ == "__main__":
    main()
