"""The hidden product of a feed-forward half is made once on the way back: the same gradients, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.unit.model.conftest import FAMILIES, base
from tests.unit.model.steps import BATCHES, IDS, adapted, quantized, step

from veneer import IA3Config, LoraConfig
from veneer.contract import MethodConfig
from veneer.model.fused.decoder import fused
from veneer.model.memory.checkpointing import checkpoint_selectively
from veneer.ops.linear import op
from veneer.plan.live_bytes import LiveBytes

METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear"),
    "dora": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", use_dora=True),
    "attention alone": LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=[]),
}


def made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "takes_input_late", lambda layer: False)


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_gradients_are_the_same_to_the_bit(
    storage: str, method: str, selective: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base("llama") if storage == "dense" else quantized(base("llama"), storage)
    adapted(model, METHODS[method])
    if selective:
        checkpoint_selectively(model)
    with fused(model) as takes:
        assert takes
        once = step(model, BATCHES["padded"])
        made_before(monkeypatch)
        twice = step(model, BATCHES["padded"])
    assert once[1] == twice[1]
    assert once[2].keys() == twice[2].keys()
    assert all(torch.equal(once[2][name], twice[2][name]) for name in once[2])


@pytest.mark.parametrize(
    ("family", "selective", "most"), [("llama", False, 3), ("llama", True, 3), ("phi3", False, 5), ("phi3", True, 3)]
)
def test_few_tensors_of_the_hidden_width_are_alive_on_the_way_back(family: str, selective: bool, most: int) -> None:
    """Gate and up lie apart in one family and as one in the other. Without the hidden product written over its own
    gradient there were 4, 6, 6 and 8.
    """
    config = copy.deepcopy(FAMILIES[family])
    config.intermediate_size = 587  # like no other width
    model = adapted(base(config))
    if selective:
        checkpoint_selectively(model)
    live = LiveBytes()
    with fused(model), live:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        live.mark("backward")
        loss.backward()
    assert most_alive(live, IDS.numel() * 587 * 4) == most


def most_alive(live: LiveBytes, unit: int) -> int:
    """The most tensors of ``unit`` bytes, or half as many of twice the size, that come in the backward pass."""
    alive = most = 0
    born: set[int] = set()
    for event in (event for event in live.events if event.mark == "backward"):
        if event.n_bytes in (unit, 2 * unit):
            born.add(event.number)
        alive += event.n_bytes // unit if event.number in born else 0
        most = max(most, alive)
    return most
