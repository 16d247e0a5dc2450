"""A planned file as a person sees it: alike layers in one row."""

from __future__ import annotations

import pytest

from veneer.export.gguf.summary import ranges, rows
from veneer.store.gguf.writer import TensorSpec


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([2, 0, 1, 7, 9, 10], "0-2, 7, 9-10")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_rows_of_one_name_stand_together_and_differ_by_type_and_shape() -> None:
    layers = [("Q6_K", 256), ("Q4_K", 256), ("Q6_K", 256), ("Q4_K", 512)]
    specs = [TensorSpec("output.weight", "Q6_K", (3, 256))]
    for layer, (kind, width) in enumerate(layers):
        specs += [
            TensorSpec(f"blk.{layer}.attn_v.weight", kind, (5, width)),
            TensorSpec(f"blk.{layer}.ffn_up.weight", "Q4_K", (7, 256)),
        ]
    found = {key: [spec.name for spec in alike] for key, alike in rows(specs).items()}
    assert [key[0] for key in found] == ["output.weight", *["attn_v.weight"] * 3, "ffn_up.weight"]
    assert found["attn_v.weight", "Q6_K", (5, 256)] == ["blk.0.attn_v.weight", "blk.2.attn_v.weight"]
    assert len(found["ffn_up.weight", "Q4_K", (7, 256)]) == 4
