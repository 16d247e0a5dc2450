"""Selective checkpointing: the same gradients to the bit, what is dear computed once, less kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from veneer import BitsAndBytesConfig, LoraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.model.fused.decoder import fused
from veneer.model.memory import checkpointing
from veneer.model.memory.checkpointing import checkpoint_selectively, is_selective
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops import four_bit, int8

WIDTH, INNER, RANK = 42, 58, 5
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 3,
    "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(num_key_value_heads=1, head_dim=14, **SIZES),
    "qwen3": Qwen3Config(num_key_value_heads=1, head_dim=14, **SIZES),
    "neox": GPTNeoXConfig(hidden_act="gelu", rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **SIZES),
}
IDS = (torch.arange(3 * 17).view(3, 17) * 31 + 5) % 97
PACKED = torch.cat([torch.arange(4), torch.arange(13)])[None].expand(3, -1)
LORA = LoraConfig(r=RANK, lora_alpha=7, target_modules="all-linear")


def adapted(name: str, config: MethodConfig = LORA, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name]))
    for path, module in list(model.model.named_modules()) if quantization else ():
        if isinstance(module, nn.Linear):
            spec = quantization.spec_of(path, tuple(module.weight.shape), module.weight.dtype)
            model.model.set_submodule(path, QuantLinear.from_dense(module, spec))
    get_peft_model(model, config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    logits = model(input_ids=IDS, position_ids=PACKED, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.mm.out,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm_.default,
)


class Products(TorchDispatchMode):
    """The sizes of the products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.seen.append(tuple(args[-1].shape))
        return func(*args, **(kwargs or {}))


def products(model: PreTrainedModel) -> list[tuple[int, ...]]:
    with Products() as mode:
        gradients(model)
    return mode.seen


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dear", [10, 10_000])
def test_general_path_equals_no_checkpointing(
    name: str, dropout: float, dear: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "DEAR", dear)
    model = adapted(name, LoraConfig(r=RANK, lora_alpha=7, lora_dropout=dropout, target_modules="all-linear"))
    expected = gradients(model)
    checkpoint_selectively(model)
    assert_equal(gradients(model), expected)


def test_large_products_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    once = products(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = products(model)
    monkeypatch.setattr(checkpointing, "DEAR", 10)
    checkpoint_selectively(model)
    kept = products(model)
    up = (WIDTH, INNER)  # Wᵀ of gate and up; forward in two blocks
    assert again.count(up) == once.count(up) + 4
    assert kept.count(up) == once.count(up)
    second = (RANK, INNER)  # Bᵀ of gate and up: cheap
    assert kept.count(second) == again.count(second) > once.count(second)
    monkeypatch.setattr(checkpointing, "DEAR", WIDTH)
    assert products(model).count(up) == again.count(up)


@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
        {"load_in_8bit": True},
    ],
    ids=["4 bits", "int8"],
)
def test_products_with_quantized_weights_are_not_computed_again(
    quantization: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "DEAR", 10)
    model = adapted("llama", quantization=BitsAndBytesConfig(**quantization))
    asked: list[str] = []
    for ops in (four_bit, int8):
        own = ops.implementation
        monkeypatch.setattr(ops, "implementation", lambda op, *args, own=own: asked.append(op) or own(op, *args))

    def counted() -> tuple[dict[str, Tensor], int]:
        asked.clear()
        return gradients(model), sum("matmul" in op for op in asked)

    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again = counted()
    checkpoint_selectively(model)
    found, kept = counted()
    assert_equal(found, expected)
    assert kept == again - 2 * 7


@pytest.mark.parametrize("name", MODELS)
def test_fused_path_equals_no_checkpointing(name: str) -> None:
    model = adapted(name)
    with fused(model) as takes:
        assert takes
        expected = gradients(model)
        checkpoint_selectively(model)
        assert_equal(gradients(model), expected)


def test_fused_halves_run_once_and_keep_less() -> None:
    model = adapted("llama")
    kept: dict[str, int] = {}
    with fused(model):
        switches: dict[str, Callable[[], None]] = {
            "none": lambda: None,
            "selective": lambda: checkpoint_selectively(model),
        }
        for how, switch in switches.items():
            switch()
            total = 0

            def count(tensor: Tensor) -> Tensor:
                nonlocal total
                total += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
                gradients(model)
            kept[how] = total
    projected = IDS.numel() * (WIDTH + 2 * 14 + 2 * INNER) * 2  # q, k, v, gate and up of two blocks
    assert kept["none"] - kept["selective"] == projected


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=RANK, target_modules=["q_proj"], modules_to_save=["o_proj"]),
        LoraConfig(r=RANK, target_modules=["gate_proj"], lora_dropout=0.4, modules_to_save=["up_proj"]),
        LoraConfig(
            r=RANK, target_modules=["up_proj", "k_proj"], use_dora=True, modules_to_save=["v_proj", "down_proj"]
        ),
    ],
)
def test_blocks_of_which_a_half_is_the_models_own(config: MethodConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "DEAR", 10)
    model = adapted("llama", config)
    with fused(model):
        expected = gradients(model)
        once = products(model)
        checkpoint_selectively(model)
        assert_equal(gradients(model), expected)
        assert len(products(model)) > len(once)


def test_every_other_use_of_the_switch_stays() -> None:
    model: Any = adapted("llama")
    with fused(model):
        block = model.base_model.layers[0]
        checkpoint_selectively(model)
        assert is_selective(block)
        assert not is_selective(block.eval())
        block.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert not is_selective(block)
        assert block.gradient_checkpointing
        checkpoint_selectively(model)
        model.gradient_checkpointing_disable()
        assert not is_selective(block)
        assert not block.gradient_checkpointing


def test_rows_with_adapters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "DEAR", 10)
    model: Any = adapted("llama")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    model.set_requires_grad("second")

    def routed() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(input_ids=IDS, adapter_names=["default", "second", "__base__"], use_cache=False).logits
        logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with fused(model):
        expected = routed()
        checkpoint_selectively(model)
        assert is_selective(model.base_model.layers[0])
        assert_equal(routed(), expected)


def test_attention_with_dropout_is_computed_again() -> None:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q = torch.zeros(1, 1, 3, 5)
    policy = checkpointing._policy
    assert policy(None, op, q, q, q).name == policy(None, op, q, q, q, 0.0).name == "MUST_SAVE"
    assert policy(None, op, q, q, q, 0.3).name == policy(None, op, q, q, q, dropout_p=0.3).name == "PREFER_RECOMPUTE"
