"""Fused blocks against the model's own code: logits, loss and every adapter gradient, and where they stand aside."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import logging
from typing import Any

import pytest
import torch
from tests.unit.model import steps
from tests.unit.model.conftest import FAMILIES, SIZES, WIDE, base
from tests.unit.model.steps import (
    BATCHES,
    IDS,
    LORA,
    adapted,
    assert_all_fused,
    assert_near_under_autocast,
    assert_same,
    error,
    quantized,
    step,
    stir,
)
from transformers import (
    Qwen2MoeConfig,
    SeedOssConfig,
)

from interpreter import mended_interpreter
from veneer import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    prepare_model_for_kbit_training,
)
from veneer.contract import MethodConfig
from veneer.model.fused import decoder
from veneer.model.fused.block import FusedBlock
from veneer.model.fused.decoder import fuse, fused, is_fused, unfuse
from veneer.ops import dispatch

MOE: dict[str, Any] = {
    **WIDE, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20,
}  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_general_path(family: str, batch: str, halves: list[str]) -> None:
    assert_all_fused(adapted(base(family)), BATCHES[batch], halves)


RECORDS: dict[str, MethodConfig] = {
    "dora": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", use_dora=True),
    "rslora": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", use_rslora=True),
    "lora_bias": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", lora_bias=True),
    "biases": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", bias="lora_only"),
    "pissa": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights="pissa"),
    "ia3": IA3Config(),
    "vera": VeraConfig(r=11, target_modules="all-linear"),
    "adalora": AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, target_modules="all-linear", total_step=50),
    "dropout": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", lora_dropout=0.3),
    "dora and dropout": LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", use_dora=True, lora_dropout=0.3),
    "vera and dropout": VeraConfig(r=11, target_modules="all-linear", vera_dropout=0.3),
}


LAYOUTS = ("llama", "gemma2", "phi3", "neox", "gpt2")
"""Projections apart and in one, weights turned, halves one after the other or side by side, norms before and behind."""
OTHERS = [
    (family, method)
    for place, family in enumerate(name for name in FAMILIES if name not in LAYOUTS)
    for method in [list(RECORDS)[(2 * place + k) % len(RECORDS)] for k in range(2)]
]


@pytest.mark.product
@pytest.mark.parametrize(("family", "method"), [*itertools.product(LAYOUTS, RECORDS), *OTHERS])
def test_every_record_runs_fused(family: str, method: str, halves: list[str]) -> None:
    """On each layout every record, and on each other family two of them."""
    assert_all_fused(adapted(base(family), RECORDS[method]), BATCHES["packed"], halves)


@pytest.mark.parametrize("method", RECORDS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_every_record_on_a_quantized_base(quant_type: str, method: str, halves: list[str]) -> None:
    assert_all_fused(adapted(quantized(base("llama"), quant_type), RECORDS[method]), BATCHES["padded"], halves)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LoraConfig(r=5, target_modules=["k_proj", "o_proj"]), {"attention", "mlp"}),
        (IA3Config(target_modules=["k_proj"]), {"attention", "mlp"}),
    ],
)
@pytest.mark.parametrize("sliding", [True, False])
def test_layers_that_slide_beside_layers_that_do_not(
    sliding: bool, method: MethodConfig, expected: set[str], batch: str, halves: list[str]
) -> None:
    model = adapted(base(Qwen2MoeConfig(use_sliding_window=sliding, sliding_window=13, **MOE)), method)
    before = step(model, BATCHES[batch])
    with fused(model) as takes:
        halves.clear()
        found = step(model, BATCHES[batch])
    assert takes
    assert set(halves) == expected
    assert (found[0] - before[0]).norm() <= 2e-5 * before[0].norm()
    assert error(found[2], before[2]) <= 2e-5


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("batch", BATCHES)
def test_on_a_quantized_base(quant_type: str, batch: str, halves: list[str]) -> None:
    assert_all_fused(adapted(quantized(base("llama"), quant_type)), BATCHES[batch], halves)


@pytest.mark.parametrize(
    ("family", "is_padded"), [("llama", True), ("gpt2", False)], ids=["llama-padded", "gpt2-whole"]
)
def test_on_the_kernels_of_cuda(
    family: str, is_padded: bool, halves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but in Triton's interpreter: every op of a step in the layouts that the blocks hand it.

    There each token takes its own time, so that there are few, but more than the 16 of which codes are multiplied.
    """
    pytest.importorskip("triton", reason="needs the package triton")
    monkeypatch.setattr(dispatch, "_DEVICES", {"triton": "cpu"})
    monkeypatch.setattr(decoder, "KERNELS", {"cpu": "triton"})
    model = base(family)
    monkeypatch.setattr(steps, "IDS", IDS[:2, :12])
    mask = torch.tensor([[1] * 10 + [0] * 2, [0] * 3 + [1] * 9])
    batch = {"attention_mask": mask} if is_padded else {}
    with mended_interpreter():
        assert_all_fused(adapted(quantized(model, "nf4") if family == "llama" else model), batch, halves)


def test_a_kernel_that_triton_refuses_leaves_the_general_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = pytest.importorskip("triton.errors", reason="needs the package triton")
    launching = importlib.import_module("veneer.ops.triton.norm")
    monkeypatch.setattr(dispatch, "_DEVICES", {"triton": "cpu"})
    monkeypatch.setattr(decoder, "KERNELS", {"cpu": "triton"})

    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise errors.TritonError("at 3:9:\n  held = most\nExpected dtype ['fp32'] but got fp64")

    monkeypatch.setattr(
        type(launching._forward_kernel), "__getitem__", lambda self, grid: functools.partial(refuse, self)
    )
    model = base("llama")
    expected = model(IDS).logits
    assert not fuse(model)
    assert torch.equal(model(IDS).logits, expected)
    (record,) = caplog.records
    assert "LlamaForCausalLM runs the general path, not the fused one" in record.message
    assert "refuses the kernel _forward_kernel: Expected dtype ['fp32'] but got fp64. Install" in record.message


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "phi3", "neox", "gpt2"])
def test_in_bfloat16_errs_no_more_than_twice_the_general_path(family: str) -> None:
    model = adapted(base(family, torch.bfloat16))
    exact = step(copy.deepcopy(model).double(), BATCHES["packed"])
    general = step(model, BATCHES["packed"])
    with fused(model):
        found = step(model, BATCHES["packed"])
    assert (found[0] - exact[0]).norm() <= 2 * (general[0] - exact[0]).norm()
    assert error(found[2], exact[2]) <= 2 * error(general[2], exact[2])


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_beside_a_float32_stream_under_autocast(
    family: str, compute_dtype: torch.dtype | None, halves: list[str]
) -> None:
    model = quantized(base(family, torch.bfloat16), "nf4", compute_dtype)
    model = adapted(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    assert_near_under_autocast(model, halves)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_gradient_checkpointing(family: str, reentrant: bool, halves: list[str]) -> None:
    model = adapted(base(family))
    with fused(model):
        expected = step(model, BATCHES["packed"])
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        halves.clear()
        found = step(model, BATCHES["packed"])
    assert found[2].keys() == expected[2].keys()
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])
    assert halves.count("mlp") == 2 * 2  # once forward, once again backward


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(r=5, target_modules=["q_proj"], modules_to_save=["gate_proj"]), {"attention"}),
        (LoraConfig(r=5, target_modules=["v_proj"], modules_to_save=["input_layernorm"]), {"mlp"}),
        (LoraConfig(r=5, target_modules=["v_proj"], init_lora_weights="pissa"), {"attention", "mlp"}),
        (LoraConfig(r=5, target_modules=["o_proj"], layers_to_transform=[1]), {"attention", "mlp"}),
        (BottleneckConfig(after_attention=True, after_mlp=False, reduction_factor=7), {"attention", "mlp"}),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), set()),
        (AdaptionPromptConfig(adapter_len=3, adapter_layers=1), {"attention", "mlp"}),
        (AdaptionPromptConfig(adapter_len=3, adapter_layers=2), {"mlp"}),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {"attention", "mlp"}),
    ],
)
def test_what_does_not_fit_runs_the_general_path(config: MethodConfig, expected: set[str], halves: list[str]) -> None:
    model = adapted(base("llama"), config)
    before = step(model, {})
    with fused(model):
        halves.clear()
        found = step(model, {})
    assert set(halves) == expected
    assert error(found[2], before[2]) <= 2e-5


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens_go_with_every_family(
    family: str, config: type[MethodConfig], caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(base(family), config(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    before = step(model, BATCHES["padded"])
    with caplog.at_level(logging.WARNING), fused(model) as is_now:
        found = step(model, BATCHES["padded"])
    assert is_now
    assert not caplog.records
    assert (found[0] - before[0]).norm() <= 2e-5 * before[0].norm()
    assert error(found[2], before[2]) <= 2e-5


def test_a_fused_decoder_takes_the_arguments_of_the_models_own() -> None:
    model = base("neox")
    own = inspect.signature(model.base_model.forward)
    with fused(model):
        assert inspect.signature(model.base_model.forward) == own


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("gpt2", LoraConfig(r=5, target_modules=["c_attn"], modules_to_save=["c_fc"]), {"attention"}),
        ("neox", LoraConfig(r=5, target_modules=["dense"], modules_to_save=["dense_4h_to_h"]), {"attention"}),
        ("phi", LoraConfig(r=5, target_modules=["q_proj"], modules_to_save=["input_layernorm"]), set()),
        ("phi3", LoraConfig(r=5, target_modules=["qkv_proj"]), {"attention", "mlp"}),
    ],
)
def test_halves_of_other_kinds_that_do_not_fit(
    family: str, config: MethodConfig, expected: set[str], halves: list[str]
) -> None:
    model = adapted(base(family), config)
    for batch in BATCHES.values():
        before = step(model, batch)
        with fused(model):
            halves.clear()
            found = step(model, batch)
        assert set(halves) == expected
        assert error(found[2], before[2]) <= 2e-5


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        ("gpt2", "attn.attn_dropout", {"mlp"}),
        ("gpt2", "mlp.dropout", {"attention"}),
        ("phi", "resid_dropout", set()),
        ("neox", "post_mlp_dropout", set()),
    ],
)
def test_dropout_of_the_model_itself(family: str, module: str, expected: set[str], halves: list[str]) -> None:
    model = adapted(base(family))
    for name, part in model.named_modules():
        if name.endswith(module):
            part.p = 0.3
    before = step(model, {})
    with fused(model):
        halves.clear()
        found = step(model, {})
        assert set(halves) == expected
        halves.clear()
        step(model.eval(), {})
    assert set(halves) == {"attention", "mlp"}
    assert error(found[2], before[2]) <= 2e-5


def test_a_dropout_that_a_half_computes_itself(halves: list[str]) -> None:
    model = adapted(base(SeedOssConfig(residual_dropout=0.4, **SIZES)))
    before = step(model, {})
    with fused(model):
        halves.clear()
        found = step(model, {})
        assert not halves
        step(model.eval(), {})
    assert set(halves) == {"attention", "mlp"}
    assert error(found[2], before[2]) <= 2e-5


def test_a_block_of_zeros_is_told_by_the_others() -> None:
    model = base("neox serial")
    with torch.no_grad():
        for parameter in model.base_model.layers[0].parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        model.base_model.layers[0].attention.dense.bias.zero_()
        model.base_model.layers[0].mlp.dense_4h_to_h.bias.zero_()
    assert_same(adapted(model))


def test_several_active_adapters(halves: list[str]) -> None:
    model: Any = adapted(base("llama"))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.set_adapter(["default", "second"])
    model.set_requires_grad("second")
    stir(model)
    before = step(model, {})
    with fused(model):
        halves.clear()
        found = step(model, {})
    assert set(halves) == {"attention", "mlp"}
    assert error(found[2], before[2]) <= 2e-5


def test_several_active_adapters_that_drop_values_each_for_itself(halves: list[str]) -> None:
    model: Any = adapted(base("llama"), dataclasses.replace(LORA, lora_dropout=0.3))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.2))
    model.set_adapter(["default", "second"])
    model.set_requires_grad("second")
    stir(model)
    before = step(model, {})
    with fused(model):
        halves.clear()
        found = step(model, {})
    assert set(halves) == {"mlp"}
    assert error(found[2], before[2]) <= 2e-5


@pytest.mark.parametrize(
    "batch",
    [
        {"output_attentions": True},
        {"use_cache": True},
        {"attention_mask": torch.eye(17, dtype=torch.bool)[None, None].expand(3, 1, 17, 17)},
        {"attention_mask": torch.tensor([[1, 0, 1] + [1] * 14] * 3)},
    ],
    ids=["attentions", "cache", "own mask", "padding inside"],
)  # fmt: skip
def test_stands_aside_where_the_caller_asks_for_more(batch: dict[str, Any], halves: list[str]) -> None:
    model = adapted(base("llama"))
    model.set_attn_implementation("eager")
    with fused(model):
        halves.clear()
        step(model, batch)
    assert not halves


@pytest.mark.parametrize("asked", [False, None])
def test_attention_weights_that_nobody_wants_leave_it_fused(asked: bool | None, halves: list[str]) -> None:
    model = adapted(base("llama"))
    model.set_attn_implementation("eager")
    with fused(model):
        halves.clear()
        step(model, {"output_attentions": asked})
        assert halves
        model.config.output_attentions = True
        halves.clear()
        step(model, {"output_attentions": asked})
    assert bool(halves) is (asked is False)


def test_hooks_on_parts_are_called(halves: list[str]) -> None:
    model = adapted(base("llama"))
    calls: list[str] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, y: calls.append("hook"))
    with fused(model):
        halves.clear(), calls.clear()
        step(model, {})
    assert calls == ["hook"]
    assert halves == ["attention", "attention", "mlp"]


def test_generation_is_the_same() -> None:
    model = adapted(base("mistral")).eval()
    expected = model.generate(IDS[:1], max_new_tokens=9, do_sample=False)
    with fused(model):
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=9, do_sample=False), expected)


def test_frozen_adapters_and_copies() -> None:
    model = adapted(base("llama"))
    classes = [type(m) for m in model.modules()]
    assert fuse(model)
    assert fuse(model)
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    twin = copy.deepcopy(model)
    assert is_fused(twin)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any(isinstance(m, FusedBlock) for m in model.modules())


def test_weights_that_train_are_left_to_autograd(halves: list[str]) -> None:
    model = base("llama").train()
    expected = step(model, {})
    with fused(model) as takes:
        halves.clear()
        found = step(model, {})
    assert takes
    assert not halves
    assert error(found[2], expected[2]) <= 2e-5
