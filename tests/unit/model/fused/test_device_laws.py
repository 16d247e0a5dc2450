"""Training on a device that is no CPU: what a block may ask of it, and that it computes there what the CPU does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.unit.model.steps import quantized, stir
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hostile import WAYS, hostile
from interpreter import mended_interpreter
from stand_in import EVERY, OnDevice, put_on_device, stand_in
from veneer import LoraConfig, get_peft_model
from veneer.model.fused.decoder import fuse
from veneer.model.program import add
from veneer.ops.linear.layer import LinearLayer, tensors_of
from veneer.ops.linear.op import linears
from veneer.records.deltas import LinearDelta
from veneer.records.terms.pair import Pair

pytest.importorskip("triton", reason="needs the package triton")

IDS = (torch.arange(2 * 13).view(2, 13) * 31 + 5) % 97
MASK = torch.ones_like(IDS)
MASK[1, 10:] = 0
GOAL = 60  # launches of a block, forward and backward
HELD = {"dense": 71, "dropout": 84, "nf4": 85, "dora": 131}
"""Launches of a block today: fewer are written here, more are a fault."""


@pytest.fixture(scope="module", autouse=True)
def mended() -> Iterator[None]:
    with mended_interpreter():
        yield


def fused_model(case: str, n_blocks: int) -> PreTrainedModel:
    """A Llama in bfloat16 with LoRA on every linear layer, as it trains; a base in NF4 has double quantization."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=n_blocks, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if case == "nf4":
        quantized(model, "nf4")
    dropped = 0.1 if case == "dropout" else 0.0
    lora = LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", lora_dropout=dropped, use_dora=case == "dora")
    get_peft_model(model, lora)
    stir(model)
    assert fuse(model.train())
    return model


def step(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1))
    loss.backward()
    return loss


def asked(case: str, n_blocks: int) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Launches, reads and sends of the second step."""
    model = fused_model(case, n_blocks)
    with stand_in(EVERY, computes=False) as crossings:
        put_on_device(model)
        for _ in range(2):
            crossings.clear()
            step(model, OnDevice(IDS), OnDevice(MASK))
    return crossings.launched, crossings.reads, crossings.sends


def of_a_block(case: str) -> list[Counter[str]]:
    return [two - one for one, two in zip(asked(case, 1), asked(case, 2), strict=True)]


@pytest.mark.parametrize("case", HELD)
def test_a_block_asks_no_more_than_it_may(case: str) -> None:
    launched, reads, sends = of_a_block(case)
    assert not reads, f"the host waits in each block: {reads}"
    assert not sends, f"the host sends to each block: {sends}"
    assert launched.total() == max(HELD[case], GOAL), launched.most_common()


def test_a_step_reads_its_batch_once() -> None:
    """The bounds of its sequences are found on the host."""
    _, reads, sends = asked("dense", 1)
    assert reads.total() == 1
    assert not sends


def test_a_read_put_into_a_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = add.Add.train

    def waiting(self: Any, weights: Any, run: Any, frame: Any, keep: Any) -> Any:
        bool((self.stream.read(frame)[0] > 1e9).any())
        return plain(self, weights, run, frame, keep)

    monkeypatch.setattr(add.Add, "train", waiting)
    _, reads, _ = of_a_block("dense")
    assert reads.total() == 2
    assert all("model/program/stretch.py:" in place for place in reads)  # the line of the package that asked


def test_layers_of_different_ranks_share_what_is_kept() -> None:
    """One pair has a core and scales of rows; the factors of all three lie in one tensor beside their products."""
    torch.manual_seed(5)
    x, sizes = torch.randn(7, 19), ((4, 11), (1, 5), (3, 23))
    weights, dys = [torch.randn(o, 19) for _, o in sizes], [torch.randn(7, o) for _, o in sizes]
    pairs = [Pair(a=torch.randn(r, 19), b=torch.randn(o, r), scale=0.7 + r) for r, o in sizes]
    pairs[1] = replace(pairs[1], core=torch.randn(1), b_scale=torch.randn(5))

    def both(on: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [[on(t).requires_grad_() for t in pair.tensors] for pair in pairs]
        own = [pair.with_tensors(tensors) for pair, tensors in zip(pairs, leaves, strict=True)]
        deltas = [LinearDelta(adds=(pair,)) for pair in own]
        layers = [LinearLayer(weight=on(w), records=(d,)) for w, d in zip(weights, deltas, strict=True)]
        given = on(x).requires_grad_()
        ys = linears(given, layers)
        inputs = [given, *tensors_of(layers)]
        found = torch.autograd.grad(sum((y * on(dy)).sum() for y, dy in zip(ys, dys, strict=True)), inputs)
        return [t.host if isinstance(t, OnDevice) else t for t in (*ys, *found)]

    exact = both(torch.Tensor.clone)
    with stand_in(EVERY):
        own = both(OnDevice)
    assert len(own) == len(exact) == 3 + 1 + 8
    for got, truth in zip(own, exact, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-4)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (grad.host if isinstance(grad, OnDevice) else grad).double() for name, grad in found.items()}


@pytest.mark.parametrize(("case", "way"), [*((case, None) for case in HELD), *(("nf4", way) for way in WAYS)])
def test_the_device_computes_what_the_cpu_does(case: str, way: str | None) -> None:
    """The loss to a few roundings of bfloat16, also in a hostile interpreter; gradients to twice the CPU's worst error.

    An error is the relative distance from the same step in float32.
    """
    wide, model = fused_model(case, 1).float(), fused_model(case, 1)
    step(wide, IDS, MASK)
    loss = step(model, IDS, MASK).item()
    exact, cpu = gradients(wide), gradients(model)
    with stand_in(EVERY), nullcontext() if way is None else hostile(way):
        put_on_device(model)
        found = step(model, OnDevice(IDS), OnDevice(MASK)).host
        own = gradients(model)
    assert found.item() == pytest.approx(loss, rel=2e-3)
    assert own.keys() == cpu.keys() == exact.keys()
    worst = max((cpu[name] - gradient).norm() / gradient.norm() for name, gradient in exact.items())
    for name, gradient in exact.items():
        assert (own[name] - gradient).norm() <= 2 * worst * gradient.norm(), name
