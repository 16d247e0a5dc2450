"""Importance matrices: both formats are read, one is written, damage is one clear error."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from veneer.errors import FormatError
from veneer.store.gguf.importance import read_importance, write_importance

SUMS = {
    "blk.0.ffn_up.weight": torch.tensor([[6.0, 3.0, 0.75]]),
    "blk.0.ffn_up_exps.weight": torch.tensor([[5.0, 1.0], [0.0, 0.0], [6.0, 9.0]]),
}
COUNTS = {"blk.0.ffn_up.weight": torch.tensor([3]), "blk.0.ffn_up_exps.weight": torch.tensor([4, 0, 3])}


def write(path: Path, **changes: object) -> None:
    write_importance(path, SUMS, COUNTS, data_sets=["text.txt"], n_chunks=7, chunk_size=512, **changes)  # type: ignore[arg-type]


def test_means_come_back_with_what_they_were_taken_from(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf")
    found = read_importance(tmp_path / "x.gguf")
    assert (found.data_set, found.n_chunks) == ("text.txt", 7)
    assert found.means.keys() == SUMS.keys()
    assert found.means["blk.0.ffn_up.weight"].tolist() == [2.0, 1.0, 0.25]
    experts = found.of("blk.0.ffn_up_exps.weight", columns=2, n_experts=3)
    assert experts is not None
    assert experts.tolist() == [[1.25, 0.25], [1.0, 1.0], [2.0, 3.0]]
    assert [pair.value for pair in found.pairs()] == ["x.gguf", "text.txt", 2, 7]


def test_an_expert_that_saw_nothing_weighs_all_columns_alike(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_tensor("a.weight.in_sum2", np.array([[8.0, 2.0], [0.0, 0.0], [3.0, 9.0]], dtype="f"))
    writer.add_tensor("a.weight.counts", np.array([[2.0], [0.0], [3.0]], dtype="f"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_importance(tmp_path / "x.gguf")
    assert found.of("a.weight", 2, 3).tolist() == [[4.0, 1.0], [1.0, 1.0], [1.0, 3.0]]  # type: ignore[union-attr]
    assert found.of("b.weight", 2, 3) is None
    with pytest.raises(FormatError, match=r"holds 6 values for a\.weight, which has 8: .*another model"):
        found.of("a.weight", 4, 2)


def test_counts_that_do_not_divide_the_sums_are_told(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_tensor("a.weight.in_sum2", np.ones((1, 7), dtype="f"))
    writer.add_tensor("a.weight.counts", np.ones((3, 1), dtype="f"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"damaged: a\.weight has 7 sums for 3 counts\. Collect"):
        read_importance(tmp_path / "x.gguf")


def dat(entries: dict[str, tuple[int, list[float]]]) -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (n_calls, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_calls, len(values))]
        parts.append(np.array(values, dtype="<f4").tobytes())
    return b"".join([*parts, struct.pack("<ii", 11, 4), b"wiki"])


def test_the_older_format_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(dat({"a.weight": (4, [8.0, 2.0]), "b.weight": (0, [8.0, 2.0])}))
    found = read_importance(tmp_path / "x.dat")
    assert {name: values.tolist() for name, values in found.means.items()} == {"a.weight": [2, 0.5], "b.weight": [1, 1]}
    assert (found.data_set, found.n_chunks) == ("wiki", 11)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged: it ends too early"),
        (b"\xff\xff\xff\xff", "a count of -1"),
        (dat({"a.weight": (4, [8.0, 2.0])})[:20], "it ends too early"),
        (dat({"a.weight": (4, [8.0, float("nan")])}), r"a\.weight that are not finite"),
        (dat({"a.weight": (4, [8.0, -1.0])}), "below zero"),
        (dat({}), "holds no matrices"),
        (b"GGUF\x03\x00\x00\x00", "no importance matrix, or is damaged"),
    ],
)
def test_damage_is_told(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.dat").write_bytes(content)
    with pytest.raises(FormatError, match=reason):
        read_importance(tmp_path / "x.dat")


def test_a_file_that_is_not_there_or_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no importance matrix .*no such file"):
        read_importance(tmp_path / "x.dat")
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="is a GGUF file, and no importance matrix"):
        read_importance(tmp_path / "x.gguf")
