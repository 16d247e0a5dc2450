"""Tokenized rows in the cache, with two processes that want the same rows at once, and one that dies over them."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

from datasets import Dataset

from launch import forkserver
from models import byte_tokenizer
from patience import PATIENCE
from veneer.data.encoded_cache import FOLDER, encoded_once
from veneer.data.encoding import Encoder

N_ROWS = 1013
BEGUN = "begun"  # a file that is there as soon as a process encodes


def encode(folder: str, name: str, seconds: float) -> None:
    """Ask for the rows, and write down whether this process encoded them, and a hash of what it got."""
    os.environ["VENEER_CACHE"] = f"{folder}/cache"
    rows = Dataset.from_list([{"text": f"row {i} {'ab' * (i % 5)}"} for i in range(N_ROWS)])
    encoder = Encoder(tokenizer=byte_tokenizer(), kind="text", max_length=17)
    encoded = []

    def slowly() -> Dataset:
        Path(folder, BEGUN).touch()
        encoded.append(name)
        time.sleep(seconds)
        return rows.map(encoder, with_indices=True, remove_columns=["text"])

    found = encoded_once(rows, encoder, slowly).to_list()
    Path(folder, name).write_text(f"{len(encoded)} {hashlib.blake2b(repr(found).encode()).hexdigest()}")


def started(folder: Path, name: str, seconds: float) -> multiprocessing.Process:
    process = forkserver().Process(target=encode, args=(str(folder), name, seconds))
    process.start()
    return process


def wait_until_begun(folder: Path) -> None:
    while not (folder / BEGUN).exists():
        time.sleep(0.01)


def test_one_process_encodes_for_two(tmp_path: Path) -> None:
    first = started(tmp_path, "first", 0.5)
    wait_until_begun(tmp_path)
    second = started(tmp_path, "second", 0.0)
    for process in (first, second):
        process.join(PATIENCE)
        assert process.exitcode == 0
    told = [(tmp_path / name).read_text().split() for name in ("first", "second")]
    assert [count for count, _ in told] == ["1", "0"]
    assert told[0][1] == told[1][1]
    assert [path.is_dir() for path in (tmp_path / "cache" / FOLDER).iterdir() if path.suffix != ".lock"] == [True]


def test_the_second_encodes_where_the_first_is_killed(tmp_path: Path) -> None:
    first = started(tmp_path, "first", 60.0)
    wait_until_begun(tmp_path)
    second = started(tmp_path, "second", 0.0)
    time.sleep(0.3)
    first.kill()
    second.join(PATIENCE)
    assert second.exitcode == 0
    assert (tmp_path / "second").read_text().startswith("1 ")
    assert [path.is_dir() for path in (tmp_path / "cache" / FOLDER).iterdir() if path.suffix != ".lock"] == [True]
