"""A quantized base that is cut while it is loaded: a process holds its part and two blocks; the bits stay."""

from __future__ import annotations

import json
from pathlib import Path

import cut_loading
from cut_loading import INNER, N_BLOCKS, WIDTH
from launch import together

N = 4
N_VALUES = 4 * WIDTH**2 + 3 * WIDTH * INNER  # of a block
SLACK = 9_000_000  # allocator, and what loading imports


def test_a_process_holds_its_part_and_two_blocks_while_it_loads(tmp_path: Path) -> None:
    cut_loading.base(tmp_path / "base")
    together(cut_loading.loaded, tmp_path, N, "int8")
    coded, dense = N_VALUES, 2 * N_VALUES  # bytes of a block, and of the one in the file
    for rank in range(N):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        cut, whole = found["cut"], found["whole"]
        assert cut["rise"] < N_BLOCKS * coded / N + 2 * dense + SLACK < 0.81 * N_BLOCKS * coded < 0.81 * whole["rise"]
        assert cut["fused"]
        assert (cut["loss"], cut["norms"], cut["held"]) == (whole["loss"], whole["norms"], whole["held"])
