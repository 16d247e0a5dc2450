"""The bytes that a trace says are what autograd saves of the pass itself, to the byte."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.model.blueprint.families import FAMILIES as DESCRIBED
from tests.unit.model.conftest import FAMILIES, base
from tests.unit.model.steps import quantized
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from veneer import AdaLoraConfig, BottleneckConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.model.adapted.routing import Routing
from veneer.model.fused import block as fused_block
from veneer.model.fused.decoder import fuse
from veneer.model.fused.saved_bytes import SavedBytes, traced_bytes

IDS = (torch.arange(3 * 23).view(3, 23) * 31 + 5) % 97
LORA = LoraConfig(r=5, target_modules="all-linear")
METHODS: dict[str, MethodConfig] = {
    "lora": LORA,
    "two targets": LoraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "ranks": LoraConfig(r=5, target_modules="all-linear", rank_pattern={"v_proj": 2, "gate_proj": 11}),
    "dropout": LoraConfig(r=5, target_modules="all-linear", lora_dropout=0.3),
    "dora": LoraConfig(r=5, target_modules="all-linear", use_dora=True),
    "dora with dropout": LoraConfig(r=7, target_modules="all-linear", use_dora=True, lora_dropout=0.2),
    "pissa": LoraConfig(r=5, target_modules="all-linear", init_lora_weights="pissa"),
    "bias": LoraConfig(r=5, target_modules="all-linear", lora_bias=True),
    "ia3": IA3Config(),
    "vera": VeraConfig(r=6, target_modules=["q_proj", "o_proj"]),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules="all-linear"),
}
Found = list[tuple[str, set[tuple[int, int]]]]


def counted(found: Found, half: Callable[..., Tensor], weights: set[int]) -> Callable[..., Tensor]:
    """A half that tells the storages which autograd keeps while it runs."""

    def run(*args: Any) -> Tensor:
        kept: set[tuple[int, int]] = set()

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and storage.nbytes():
                kept.add((storage.data_ptr(), storage.nbytes()))
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            y = half(*args)
        found.append((args[1], kept))
        return y

    return run


def measured(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Found:
    """The storages that autograd saves of each half in a training pass, in the order in which they run."""
    found: Found = []
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with monkeypatch.context() as patch:
        patch.setattr(fused_block, "run_half", counted(found, fused_block.run_half, weights))
        loss = model(input_ids=IDS, use_cache=False).logits.float().square().mean()
    halves = list(found)
    loss.backward()
    return halves


def hidden_of(model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
    """Hidden states as the pass over `IDS` begins with."""
    return torch.zeros(*IDS.shape, model.config.hidden_size, dtype=dtype)


def compare(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The trace against the pass, in which what both halves of a block save counts once."""
    traced = traced_bytes(model, hidden_of(model, dtype))
    found = measured(model, monkeypatch)
    pairs = list(zip(found[0::2], found[1::2], strict=True))
    assert len(pairs) == model.config.num_hidden_layers
    assert all(attention and mlp for (_, attention), (_, mlp) in pairs)
    n_bytes = sum(n for (_, attention), (_, mlp) in pairs for _, n in attention | mlp)
    assert traced == pytest.approx(n_bytes / len(pairs) / IDS.numel(), rel=1e-12)


def adapted(model: PreTrainedModel, config: MethodConfig = LORA) -> PreTrainedModel:
    get_peft_model(model, config)
    model.enable_input_require_grads()
    assert fuse(model)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(adapted(base(family, dtype)), monkeypatch, dtype)


def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(adapted(base(DESCRIBED["qwen3 experts"])), monkeypatch, torch.float32)


def test_pairs_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    method = LoraConfig(r=5, target_modules="all-linear", target_parameters=["all-experts"])
    compare(adapted(base(DESCRIBED["qwen3 experts"]), method), monkeypatch, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(adapted(base("qwen3", dtype), copy.deepcopy(METHODS[method])), monkeypatch, dtype)


@pytest.mark.parametrize("method", ["dora", "ia3"])
@pytest.mark.parametrize("family", ["gemma3", "neox", "phi3", "gpt2"])
def test_methods_on_joined_layers_parallel_halves_and_norms_behind(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(adapted(base(family), copy.deepcopy(METHODS[method])), monkeypatch, torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_save_what_dense_weights_save(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, coded = adapted(base("llama")), adapted(quantized(base("llama"), kind))
    compare(coded, monkeypatch, torch.float32)
    assert traced_bytes(coded, hidden_of(coded, torch.float32)) == traced_bytes(dense, hidden_of(dense, torch.float32))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_autocast_saves_a_wide_stream_and_narrow_rest(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(quantized(base(family), "nf4"))
    wide = traced_bytes(model, hidden_of(model, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = traced_bytes(model, hidden_of(model, torch.float32))
        compare(model, monkeypatch, torch.float32)
    assert wide is not None
    assert narrow is not None
    assert 0.5 * wide < narrow < 0.8 * wide


def test_adapters_of_some_blocks_count_for_those(monkeypatch: pytest.MonkeyPatch) -> None:
    some = LoraConfig(r=5, target_modules="all-linear", layers_to_transform=[1])
    compare(adapted(base("llama"), some), monkeypatch, torch.float32)


@pytest.mark.parametrize("method", ["dropout", "dora", "ia3"])
def test_weights_may_be_elsewhere(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, say: the trace itself is of a CPU."""
    model = adapted(quantized(base("gemma3"), "nf4"), copy.deepcopy(METHODS[method]))
    hidden = hidden_of(model, torch.float32)
    expected = traced_bytes(model, hidden)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which is not asked about every device
    assert traced_bytes(model.to("meta"), hidden) == expected


@pytest.mark.parametrize("method", ["dropout", "dora", "dora with dropout"])
def test_a_trace_leaves_nothing_behind(method: str) -> None:
    """Neither random numbers that it drew nor what a layer computes of its weight once."""
    losses = []
    for traces in (False, True):
        model = adapted(quantized(base("llama"), "nf4"), copy.deepcopy(METHODS[method]))
        torch.manual_seed(11)
        if traces:
            assert traced_bytes(model, hidden_of(model, torch.float32))
        losses.append(model(input_ids=IDS, labels=IDS, use_cache=False).loss)
    assert torch.equal(*losses)


def test_rows_with_adapters_of_their_own_are_not_traced() -> None:
    model: Any = adapted(base("llama"))
    with model.adapter_state.route(Routing(("default", "__base__", "default"))):
        assert traced_bytes(model, hidden_of(model, torch.float32)) is None
    assert traced_bytes(model, hidden_of(model, torch.float32))


def test_bottlenecks_and_models_that_are_not_fused_are_not_traced() -> None:
    bottlenecks = adapted(base("llama"), BottleneckConfig(reduction_factor=6))
    assert traced_bytes(bottlenecks, hidden_of(bottlenecks, torch.float32)) is None
    plain = get_peft_model(base("llama"), LORA)
    assert traced_bytes(plain, hidden_of(plain, torch.float32)) is None


@pytest.mark.parametrize(("family", "rate"), [("neox", "hidden_dropout"), ("phi", "resid_pdrop")])
def test_blocks_that_drop_are_not_traced(family: str, rate: str) -> None:
    config = copy.deepcopy(FAMILIES[family])
    setattr(config, rate, 0.1)
    model = adapted(base(config))
    assert traced_bytes(model, hidden_of(model, torch.float32)) is None
    model.eval()
    assert traced_bytes(model, hidden_of(model, torch.float32))


def test_each_storage_is_counted_once_and_weights_are_not() -> None:
    weight, x = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    saved = SavedBytes()
    with saved:
        y = (x @ weight.T).square() * x[:, :1]  # saves x twice, the weight, the product, its square
    assert saved.without([weight]) == 4 * (11 * 5 + 2 * 11 * 7)
    assert saved.without([]) == saved.without([weight]) + weight.nbytes
    assert y.requires_grad
