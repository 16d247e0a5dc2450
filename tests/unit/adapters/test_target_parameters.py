"""LoRA on experts that are held as stacked parameters, and on routers; the oracle is PEFT, both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from flat_records import flat_record
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.errors import CompositionError, ConfigError, TargetError
from veneer.model.adapted.parameters import AdaptedParameters, runs_by_convention
from veneer.model.attach.attach import live_parameters
from veneer.records.stacks import stack, unstack

from .conftest import close

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 20,
    "intermediate_size": 13,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=7),
    "gpt-oss": lambda: GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, sliding_window=5),
    "llama4": lambda: Llama4TextConfig(
        **SIZES, num_local_experts=3, intermediate_size_mlp=11, interleave_moe_layer_step=1, attention_chunk_size=16
    ),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.tensor([[5, 61, 2, 33, 17, 8], [8, 8, 40, 1, 66, 3]])


def make(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").to(dtype).eval()
    if family != "llama4":
        model.set_experts_implementation("eager")  # grouped products ask for sizes that are multiples of four
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_parameters": BOTH} | settings)


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def gradients(model: Any, names: Any) -> dict[str, Tensor]:
    model.train()
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    model.eval()
    return names(model)


def ours_by_key(model: PeftModel) -> dict[str, Tensor]:
    live = live_parameters(model, model.adapter_state, "default")
    return {key: value.grad for key, value in live.items()}


def theirs_by_key(model: Any) -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(model, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {r".*\.1\..*\.experts\.gate_up_proj": 4}},
    ],
    ids=["both", "with-modules", "patterns"],
)
def test_peft_computes_the_same_both_ways(family: str, settings: Any, tmp_path: Path) -> None:
    ours = get_peft_model(make(family), lora(**settings))
    close(logits(ours), logits(make(family)))
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(family), tmp_path / "ours", is_trainable=True).eval()
    assert not torch.allclose(logits(ours), logits(make(family)), atol=1e-3)
    close(logits(ours), logits(theirs))
    a, b = gradients(ours, ours_by_key), gradients(theirs, theirs_by_key)
    assert a.keys() == b.keys()
    for key in a:
        close(a[key], b[key])

    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(make(family), tmp_path / "theirs")
    assert torch.equal(logits(back), logits(ours))
    written = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])


def test_a_router_is_a_matrix_like_any_other(tmp_path: Path) -> None:
    ours = get_peft_model(make("mixtral"), lora(target_parameters=["mlp.gate.weight", *BOTH]))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("mixtral"), tmp_path).eval()
    close(logits(ours), logits(theirs))
    merged = logits(ours.merge_and_unload())
    close(merged, logits(theirs))


def test_the_weight_of_a_linear_layer_is_that_layer(tmp_path: Path) -> None:
    ours = get_peft_model(make("mixtral"), lora(target_parameters=["q_proj.weight"]))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make("mixtral"), tmp_path).eval()
    close(logits(ours), logits(theirs))


@pytest.mark.parametrize("family", CONFIGS)
def test_merging_unmerging_and_unloading(family: str) -> None:
    base = make(family, torch.float64)
    before, plain = {k: v.clone() for k, v in base.state_dict().items()}, logits(base)
    torch.manual_seed(11)
    model = get_peft_model(base, lora())
    randomize(model)
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert unloaded.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in unloaded.state_dict().items())
    torch.manual_seed(11)
    again = get_peft_model(unloaded, lora())
    randomize(again)
    torch.testing.assert_close(logits(again.merge_and_unload()), adapted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_run_one_by_one_give_what_the_folded_stack_gives(implementation: str, monkeypatch: Any) -> None:
    model = get_peft_model(make("gpt-oss", torch.float64), lora())
    randomize(model)
    experts = [m for m in model.modules() if isinstance(m, AdaptedParameters)]
    assert len(experts) == 2
    assert all(runs_by_convention(m) for m in experts)
    one_by_one = logits(model)
    monkeypatch.setattr("veneer.model.adapted.parameters.runs_by_convention", lambda module: False)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), one_by_one, rtol=1e-10, atol=1e-10)


def test_a_small_update_of_a_bfloat16_base_survives() -> None:
    """Rounded into the weight it would act on the wrong values: the error is that of the output's rounding alone."""
    weights = make("mixtral").to(torch.bfloat16)
    model = get_peft_model(weights, lora())
    experts = next(m for m in model.modules() if isinstance(m, AdaptedParameters))
    with torch.no_grad():
        for parameter in experts.adapters["default"].parameters():
            parameter.normal_(std=0.03)
    x, chosen = torch.randn(7, 20).bfloat16(), torch.arange(14).view(7, 2) % 3
    share = torch.full((7, 2), 0.5)
    exact = wide_experts(experts, x, chosen, share)
    with torch.no_grad():
        got = experts(x, chosen, share).double()
        model.disable_adapter().__enter__()
    assert (got - exact).abs().max() < 2**-7 * exact.abs().max()


def wide_experts(experts: Any, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
    """The closed form in float64 from the effective weights, never rounded."""
    params = experts.adapters["default"]
    stacks = {}
    for name in ("gate_up_proj", "down_proj"):
        a, b = unstack(params[name]["lora_A"].double(), params[name]["lora_B"].double(), 3)
        stacks[name] = experts._parameters[name].double() + b @ a * 7 / 3
    y = torch.zeros(x.shape, dtype=torch.float64)
    for n in range(x.shape[0]):
        for k in range(chosen.shape[1]):
            e = int(chosen[n, k])
            gate, up = (stacks["gate_up_proj"][e] @ x[n].double()).chunk(2)
            y[n] += share[n, k] * (stacks["down_proj"][e] @ (torch.nn.functional.silu(gate) * up))
    return y.detach()


def test_factors_stack_and_unstack() -> None:
    pairs = [(torch.randn(2, 5), torch.randn(7, 2)) for _ in range(3)]
    a, b = unstack(*stack(pairs), experts=3)
    assert all(torch.equal(a[e], pairs[e][0]) and torch.equal(b[e], pairs[e][1]) for e in range(3))
    assert flat_record(a=a, b=b).rank == 2


def test_several_adapters_change_different_parameters(tmp_path: Path) -> None:
    model = get_peft_model(make("mixtral", torch.float64), lora(target_parameters=BOTH[:1]))
    model.add_adapter("second", lora(target_parameters=BOTH, r=2))
    model.set_requires_grad("second")
    randomize(model)
    model.set_adapter(["default", "second"])
    together = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), together, rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = get_peft_model(make("mixtral", torch.float64), lora())
    randomize(model)
    plain = gradients(model, ours_by_key)
    plain = {key: value.clone() for key, value in plain.items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    for key, value in gradients(model, ours_by_key).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_parameters": ["experts.gate_proj"]}, r"no parameter of the model \(nearest: .*gate_up_proj"),
        ({"target_parameters": ["input_layernorm.weight"]}, r"of shape \(20,\).*matrix"),
        ({"target_parameters": ["embed_tokens.weight"]}, "name the module in target_modules"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "takes too: drop one"),
        ({"modules_to_save": ["experts"]}, "takes too: drop one"),
        ({"rank_pattern": {"experts.up": 3}}, "rank_pattern key 'experts.up' matches none"),
    ],
)
def test_what_names_no_matrix_is_refused_and_nothing_is_left(settings: Any, says: str) -> None:
    base = make("mixtral")
    with pytest.raises(TargetError, match=says):
        get_peft_model(base, lora(**settings))
    assert type(base).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.1}, {"lora_bias": True}, {"use_dora": True}, {"target_parameters": "experts"}],
    ids=str,
)
def test_settings_that_do_not_go_with_it_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match="target_parameters"):
        lora(**settings)


def test_a_start_from_the_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="a stack of 3 experts' matrices"):
        get_peft_model(make("mixtral"), lora(init_lora_weights="pissa"))


def test_rows_cannot_take_different_experts() -> None:
    model = get_peft_model(make("mixtral"), lora())
    with pytest.raises(CompositionError, match="any row"):
        model(TOKENS, adapter_names=["default", "__base__"])


def test_experts_have_no_sum_in_an_adapter() -> None:
    model = get_peft_model(make("mixtral"), lora())
    with pytest.raises(CompositionError, match="experts"):
        model.add_weighted_adapter(["default"], [0.5], "half")
