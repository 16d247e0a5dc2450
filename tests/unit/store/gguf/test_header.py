"""Headers of GGUF files: held against gguf's own reader, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from veneer.errors import FormatError
from veneer.store.gguf.header import Long, read_header

WORDS = [f"w{i}" for i in range(701)]


def write(path: Path, alignment: int = 32) -> Path:
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "Ünï")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 12345.5)
    writer.add_bool("llama.odd", True)
    writer.add_array("llama.attention.head_count_kv", [5, 7, 5])
    writer.add_array("tokenizer.ggml.tokens", WORDS)
    writer.add_array("tokenizer.ggml.scores", [0.5 * i for i in range(701)])
    writer.add_int64("last", -9)
    writer.add_tensor("token_embd.weight", rng.standard_normal((13, 7)).astype(np.float16))
    writer.add_tensor("blk.0.ffn_up.weight", rng.standard_normal((11, 64)).astype(np.float32))
    quantized = gguf.quants.quantize(rng.standard_normal((11, 64)).astype(np.float32), Type.Q8_0)
    writer.add_tensor("blk.0.ffn_down.weight", quantized, raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [32, 64])
def test_it_is_what_ggufs_reader_reads(tmp_path: Path, alignment: int) -> None:
    path = write(tmp_path / "x.gguf", alignment)
    reader, header = gguf.GGUFReader(path), read_header(path)
    theirs: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items() if "." in name[5:]}
    for key, value in theirs.items():
        own = header.values[key]
        assert own == Long(701) if isinstance(own, Long) else own == value, key
    assert header.values["tokenizer.ggml.tokens"] == header.values["tokenizer.ggml.scores"] == Long(701)
    whole = read_header(path, whole=True).values
    assert {key: whole[key] for key in theirs} == theirs
    assert whole["tokenizer.ggml.tokens"] == WORDS
    assert header.values["last"] == whole["last"] == -9
    found = {t.name: (t.shape, t.type, t.n_bytes) for t in header.tensors}
    assert found == {
        t.name: (tuple(map(int, reversed(t.shape))), t.tensor_type.name, t.n_bytes) for t in reader.tensors
    }
    assert header.n_bytes == path.stat().st_size


def test_a_file_that_was_cut_off_is_told_at_every_length(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.gguf").read_bytes()
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors)
    for length in (5, 17, 29, 61, 333, end // 2, end - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"perhaps cut short .* bytes\): (it ends|it declares|its tensors end)"):
            read_header(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "does not start with the bytes GGUF"),
        (b"PK\x03\x04", "does not start with the bytes GGUF"),
        (b"GGUF" + struct.pack("<I", 1), "of version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "values at byte"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "values at byte"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77), "unknown type 77 at byte 33"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**50), "values at byte"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQQ", 9, 8, 1, 5) + b"abcd",
            "a text up to",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQQ", 9, 8, 1, 2) + b"a\xff",
            "the text at byte 57 is not in UTF-8",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,
            "nest",
        ),
    ],
)
def test_what_is_no_header_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(FormatError, match=told):
        read_header(tmp_path / "x.gguf")
