"""Seconds by a card's data sheet."""

from __future__ import annotations

from collections import Counter

import pytest

from veneer.plan.cards import Card
from veneer.plan.products import MatrixProduct
from veneer.plan.time import seconds_on
from veneer.plan.work import Codec, Work


def test_a_data_sheet_gives_products_bytes_updates_and_calls_their_time() -> None:
    card = Card(n_bytes=3e9, bandwidth=7e9, flops=5e9, source="a sheet")
    products = Counter({MatrixProduct(3, 5, 7, "bfloat16"): 11})
    work = Work(
        products,
        attention=17.0,
        torch_attention=Counter({64: 19}),
        moved=21.0,
        decoded=9.0,
        decoded_tiles=Counter({Codec("ggml_decode", (12,)): 2, Codec("ggml_decode", (14,)): 3}),
        updated=35.0,
        updated_8bit=7.0,
        n_ops=13,
    )
    found = seconds_on(work, card)
    assert found.kinds["products"] == pytest.approx((2 * 3 * 5 * 7 * 11 + 17 + 19) / 2.5e9)
    assert found.kinds["elementwise"] == pytest.approx(28 / 7e9)
    assert found.kinds["updates"] == pytest.approx((35 + 16 * 7) / 7e9)
    assert found.kinds["calls"] == pytest.approx(13e-5)
    assert found.step == pytest.approx(sum(found.kinds.values()))
    assert "a sheet" in found.source
