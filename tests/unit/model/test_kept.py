"""Fused halves keep for their backward passes what the description says, byte for byte."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, MixtralConfig, Olmo2Config, PreTrainedModel

from veneer import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.model.activation_memory import described_bytes
from veneer.model.allocation import Allocation
from veneer.model.attach import attach
from veneer.model.blueprint.decoder import Decoder
from veneer.model.blueprint.describe import describe, describe_config
from veneer.model.blueprint.parts import Strange
from veneer.model.checkpointing import checkpoint_selectively
from veneer.model.fused import block as fused_block
from veneer.model.fused.acting import acting_on, runs_fused
from veneer.model.fused.decoder import fuse
from veneer.model.fused.kept import (
    Pass,
    kept_by_attention,
    kept_by_block,
    kept_by_feed_forward,
    kept_by_loss,
    kept_by_recomputed,
    total,
)
from veneer.model.routing import Routing
from veneer.model.state import AdapterState
from veneer.train.loss import token_loss

from .conftest import FAMILIES, SIZES, WIDE, base
from .steps import quantized

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


def counted(found: Found, name: str, half: Callable[..., Tensor], weights: set[int]) -> Callable[..., Tensor]:
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
        found.append((name, kept))
        return y

    return run


def measured(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None = None) -> Found:
    """The storages that each half keeps in a training pass, in the order in which they run."""
    found: Found = []
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with monkeypatch.context() as patch:
        for name in ("attention_half", "mlp_half"):
            patch.setattr(fused_block, name, counted(found, name, getattr(fused_block, name), weights))
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(input_ids=IDS, use_cache=False).logits.float().square().mean()
    halves = list(found)
    loss.backward()
    return halves


def told(model: PreTrainedModel, stream: torch.dtype, dtype: torch.dtype, **options: Any) -> tuple[Decoder, Pass]:
    """The description of a model, and the pass over `IDS`."""
    decoder = describe(model)
    acting = acting_on(model, decoder)
    assert acting is not None
    assert runs_fused(model, stream, dtype)
    return decoder, Pass(n_tokens=IDS.numel(), stream=stream, dtype=dtype, acting=acting, **options)


def compare(model: PreTrainedModel, found: Found, decoder: Decoder, step: Pass) -> None:
    """Half by half, and block by block with what both keep counted once."""
    assert len(found) == 2 * len(decoder.blocks)
    for place, block in enumerate(decoder.blocks):
        (_, attention), (_, mlp) = found[2 * place : 2 * place + 2]
        halves = (kept_by_attention(block, step), attention), (kept_by_feed_forward(block, step), mlp)
        for said, kept in halves:
            assert not isinstance(said, Strange)
            assert total(said) == sum(n for _, n in kept), said
        both = kept_by_block(block, step)
        assert not isinstance(both, Strange)
        assert total(both) == sum(n for _, n in attention | mlp)


def adapted(model: PreTrainedModel, config: MethodConfig = LORA) -> PreTrainedModel:
    get_peft_model(model, config)
    model.enable_input_require_grads()
    assert fuse(model)
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base(family, dtype))
    decoder, step = told(model, dtype, dtype)
    assert {b.attention for b in describe_config(model.config).blocks} == {b.attention for b in decoder.blocks}
    compare(model, measured(model, monkeypatch), decoder, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base("qwen3", dtype), copy.deepcopy(METHODS[method]))
    compare(model, measured(model, monkeypatch), *told(model, dtype, dtype))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("family", ["gemma3", "neox", "phi3", "gpt2"])
def test_methods_on_joined_layers_parallel_halves_and_norms_behind(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base(family), copy.deepcopy(METHODS[method]))
    compare(model, measured(model, monkeypatch), *told(model, torch.float32, torch.float32))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_keep_what_dense_weights_keep(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, coded = adapted(base("llama")), adapted(quantized(base("llama"), kind))
    step = told(dense, torch.float32, torch.float32)[1]
    compare(coded, measured(coded, monkeypatch), *told(coded, torch.float32, torch.float32))
    assert step == told(coded, torch.float32, torch.float32)[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_autocast_keeps_a_wide_stream_and_narrow_rest(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(quantized(base(family), "nf4"))
    with torch.autocast("cpu", torch.bfloat16):
        decoder, step = told(model, torch.float32, torch.bfloat16)
    compare(model, measured(model, monkeypatch, torch.bfloat16), decoder, step)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", ["gemma3", "phi normed heads"])
def test_selective_checkpointing_keeps_less(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base(family), copy.deepcopy(METHODS[method]))
    checkpoint_selectively(model)
    decoder, step = told(model, torch.float32, torch.float32, selective=True)
    compare(model, measured(model, monkeypatch), decoder, step)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "vera"])  # whose factors a seed draws
def test_a_model_without_storage_tells_the_same(method: str) -> None:
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(FAMILIES["qwen3"]).train()
    state = AdapterState()
    attach(planned, copy.deepcopy(METHODS[method]), "default", state, Allocation(values=False))
    state.active = ("default",)
    model = adapted(base("qwen3"), copy.deepcopy(METHODS[method]))
    decoder = describe(model)
    assert acting_on(planned, describe_config(FAMILIES["qwen3"])) == acting_on(model, decoder)


def test_rows_with_adapters_of_their_own_are_not_described() -> None:
    model: Any = adapted(base("llama"))
    decoder = describe(model)
    with model.adapter_state.route(Routing(("default", "__base__", "default"))):
        assert acting_on(model, decoder) is None
    assert acting_on(model, decoder)


@pytest.mark.parametrize(("family", "rate"), [("neox", "hidden_dropout"), ("phi", "resid_pdrop")])
def test_blocks_that_drop_are_not_described(family: str, rate: str) -> None:
    config = copy.deepcopy(FAMILIES[family])
    setattr(config, rate, 0.1)
    model = adapted(base(config))
    hidden = torch.zeros(3, 7, WIDE["hidden_size"])
    assert not runs_fused(model, torch.float32, torch.float32)
    assert described_bytes(model, hidden) is None
    model.eval()
    assert runs_fused(model, torch.float32, torch.float32)
    assert described_bytes(model, hidden)


def test_nothing_is_kept_in_front_of_the_first_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base("llama")
    get_peft_model(model, LoraConfig(r=5, target_modules=["gate_proj"], layers_to_transform=[0]))
    assert fuse(model)
    found = measured(model.train(), monkeypatch)
    decoder, step = told(model, torch.float32, torch.float32, reaches=False)
    assert kept_by_attention(decoder.blocks[0], step) == ()
    assert found[0][1] == set()
    said = kept_by_feed_forward(decoder.blocks[0], step)
    assert not isinstance(said, Strange)
    assert total(said) == sum(n for _, n in found[1][1])


def test_a_block_that_is_computed_again_keeps_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base("gemma3", torch.bfloat16))
    decoder, step = told(model, torch.bfloat16, torch.bfloat16)
    assert total(kept_by_recomputed(decoder.blocks[0], step)) == IDS.numel() * model.config.hidden_size * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_keeps_the_gradient_of_hidden_states(dtype: torch.dtype) -> None:
    model = adapted(base("llama", dtype))
    loss = token_loss(model, {"input_ids": IDS, "labels": IDS}).total
    node: Any = loss.grad_fn
    said = kept_by_loss(describe(model), IDS[:, 1:].numel(), dtype)
    assert not isinstance(said, Strange)
    assert total(said) == sum(g.untyped_storage().nbytes() for g in node.grads if g is not None) > 0
    assert isinstance(kept_by_loss(describe(base("gemma2")), 3, dtype), Strange)  # it caps its logits


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Olmo2Config(**WIDE), "no norms in front of them"),
        (MixtralConfig(num_local_experts=3, **SIZES), "no kernel is of its kind"),
    ],
)
def test_a_half_that_runs_as_the_model_wrote_it_is_said_to(config: Any, reason: str) -> None:
    decoder = describe_config(config)
    step = Pass(n_tokens=7, stream=torch.float32, dtype=torch.float32, acting={})
    said = kept_by_feed_forward(decoder.blocks[1], step)
    assert isinstance(said, Strange)
    assert said.path == decoder.blocks[1].feed_forward.path
    assert reason in said.reason
    assert isinstance(kept_by_block(decoder.blocks[1], step), Strange)


def test_offload_takes_the_large_ones() -> None:
    decoder = describe_config(FAMILIES["llama"])
    step = Pass(n_tokens=900, stream=torch.float32, dtype=torch.float32, acting={})
    said = kept_by_attention(decoder.blocks[0], step)
    assert not isinstance(said, Strange)
    large = total(said, at_least=1 << 17)
    assert large == 900 * 4 * (42 + 84 + 84)  # the input, queries and attention's output
    assert large < total(said)
