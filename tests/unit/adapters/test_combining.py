"""Combining adapters on a model: the result acts as the weighted sum of updates, whatever the methods of the parts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models import gpt2_config, llama_config
from veneer import BottleneckConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from veneer.adapters.peft_model import PeftModel
from veneer.contract import MethodConfig
from veneer.errors import AdapterNameError, CompositionError, ConfigError

IDS = torch.randint(0, 101, (2, 11), generator=torch.Generator().manual_seed(5))
WEIGHTS = [0.7, -0.4, 1.3]
PARTS = {
    "plain": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "stable": LoraConfig(r=5, lora_alpha=2, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False),
    "biased": LoraConfig(
        r=2, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    ),
    "decomposed": LoraConfig(r=4, lora_alpha=7, use_dora=True, target_modules=["q_proj"], init_lora_weights=False),
}


def llama() -> torch.nn.Module:
    torch.manual_seed(3)
    config = llama_config(
        vocab_size=101,
        hidden_size=40,
        intermediate_size=53,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def with_parts(*names: str) -> PeftModel:
    model = llama()
    for i, name in enumerate(names):
        torch.manual_seed(10 + i)
        model = get_peft_model(model, PARTS[name], name)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B_bias"):
                p.normal_()
    return model


@torch.no_grad()
def merged_by_hand(names: tuple[str, ...], weights: list[float]) -> torch.Tensor:
    """Logits of the base with ``W + Σ w_i (W_i - W)`` and biases alike, each W_i from merging that part alone."""
    base = llama()
    sums = {key: value.clone() for key, value in base.state_dict().items()}
    for name, weight in zip(names, weights, strict=True):
        alone = with_parts(*names).merge_and_unload(adapter_names=[name]).state_dict()
        for key in sums:
            sums[key] += weight * (alone[key] - base.state_dict()[key])
    base.load_state_dict(sums)
    return base(IDS).logits


@pytest.mark.parametrize("names", [("plain", "stable", "biased"), ("plain", "stable")])
def test_linear_is_the_exact_sum_of_updates(names):
    model = with_parts(*names)
    weights = WEIGHTS[: len(names)]
    assert model.add_weighted_adapter(list(names), weights, "sum", "linear").worst == 0
    model.set_adapter("sum")
    torch.testing.assert_close(model(IDS).logits, merged_by_hand(names, weights), rtol=1e-4, atol=1e-5)


def test_scales_beside_factors_keep_their_change_of_the_bias():
    model = with_parts("plain")
    model.add_adapter("scales", IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False))
    model.delete_adapter("plain")
    model.add_adapter("factors", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False))
    bias = model.model.layers[0].self_attn.q_proj.bias
    with torch.no_grad():
        bias.normal_()
    model.add_weighted_adapter(["scales", "factors"], [0.7, 1.2], "sum", "linear", 40)
    layer = model.model.layers[0].self_attn.q_proj
    expected = bias + 0.7 * (layer.folded(["scales"])["bias"] - bias)
    torch.testing.assert_close(layer.folded(["sum"])["bias"], expected)


def test_a_full_rank_sum_holds_dora_too():
    model = with_parts("plain", "decomposed")
    q_only = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    model.delete_adapter("plain")
    torch.manual_seed(1)
    model.add_adapter("other", q_only)
    report = model.add_weighted_adapter(["decomposed", "other"], [0.6, 0.8], "sum", "svd", svd_rank=40)
    assert report.worst < 1e-6
    base = llama().model.layers[1].self_attn.q_proj.weight
    layer = model.model.layers[1].self_attn.q_proj
    total = sum(w * (layer.folded([n])["weight"] - base) for n, w in (("decomposed", 0.6), ("other", 0.8)))
    torch.testing.assert_close(layer.folded(["sum"])["weight"], base + total, rtol=1e-4, atol=1e-5)


def test_ranks_that_differ_from_layer_to_layer_survive_a_save(tmp_path):
    model = with_parts("plain", "stable")
    model.add_weighted_adapter(["plain", "stable"], [0.5, 0.5], "sum", "cat")
    model.set_adapter("sum")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "sum")
    torch.testing.assert_close(again(IDS).logits, expected)


def test_ia3_adapters_combine_to_ia3():
    model = get_peft_model(llama(), IA3Config(init_ia3_weights=False), "a")
    model.add_adapter("b", IA3Config(init_ia3_weights=False))
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "sum", "linear")
    layer = model.model.layers[0].mlp.down_proj
    vectors = {n: layer.adapters[n]["ia3_l"] for n in ("a", "b", "sum")}
    torch.testing.assert_close(vectors["sum"], 1 + 0.3 * (vectors["a"] - 1) + 0.6 * (vectors["b"] - 1))


def test_conv1d_and_ties():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        gpt2_config(vocab_size=101, n_embd=40, n_layer=1, n_head=4, n_positions=37)
    ).eval()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn"], init_lora_weights=False)
    model = get_peft_model(base, config, "a")
    model.add_adapter("b", config)
    report = model.add_weighted_adapter(["a", "b"], [0.8, -1.4], "both", "ties_svd", density=0.4)
    assert 0 < report.worst < 1
    assert model.peft_config["both"].r == 3


def test_nothing_is_added_where_it_cannot_be(tmp_path):
    model = with_parts("plain", "stable")
    with pytest.raises(AdapterNameError, match="nobody"):
        model.add_weighted_adapter(["plain", "nobody"], [1, 1], "sum", "linear")
    with pytest.raises(ConfigError, match="one weight for each"):
        model.add_weighted_adapter(["plain"], [1, 1], "sum", "linear")
    with pytest.raises(CompositionError, match="needs a density"):
        model.add_weighted_adapter(["plain", "stable"], [1, 1], "sum", "ties")
    model.add_adapter("scales", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(CompositionError, match="no method writes both into one adapter"):
        model.add_weighted_adapter(["plain", "scales"], [1, 1], "sum", "linear")
    model.add_adapter("whole", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(CompositionError, match="modules_to_save"):
        model.add_weighted_adapter(["plain", "whole"], [1, 1], "sum", "linear")
    assert set(model.peft_config) == {"plain", "stable", "scales", "whole"}


def test_values_are_not_loaded_into_an_adapter_of_other_settings(tmp_path):
    with_parts("plain").save_pretrained(tmp_path)
    model = get_peft_model(llama(), replace(PARTS["plain"], lora_alpha=7), "plain")
    before = model(IDS).logits
    with pytest.raises(ConfigError, match=r"lora_alpha=7 here, 5 there"):
        model.load_adapter(tmp_path / "plain", "plain")
    get_peft_model(llama(), IA3Config()).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConfigError, match="is a LORA, the files hold a IA3"):
        model.load_adapter(tmp_path / "ia3", "plain")
    torch.testing.assert_close(model(IDS).logits, before)


def test_the_default_way_suits_the_adapters():
    model = get_peft_model(llama(), IA3Config(init_ia3_weights=False), "a")
    model.add_adapter("b", IA3Config(init_ia3_weights=False))
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "usual")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.6], "linear", "linear")
    held = model.model.layers[0].mlp.down_proj.adapters
    assert torch.equal(held["usual"]["ia3_l"], held["linear"]["ia3_l"])
    model = with_parts("plain", "stable")
    assert model.add_weighted_adapter(["plain", "stable"], [1, 1], "usual").worst > 0  # an SVD back to the largest rank
    assert model.model.layers[0].self_attn.q_proj.adapters["usual"]["lora_A"].shape[0] == 5


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5", None])
def test_weights_that_are_no_finite_numbers_are_refused(weight: object) -> None:
    model = with_parts("plain", "stable")
    with pytest.raises(CompositionError, match=r"weights=\[.*\] must be a list of finite numbers"):
        model.add_weighted_adapter(["plain", "stable"], [0.7, weight], "sum", "linear")  # type: ignore[list-item]
    assert "sum" not in model.peft_config


def test_arguments_of_other_types_are_named_in_one_error() -> None:
    model = with_parts("plain", "stable")
    wrong: Any = {"combination_type": 5, "svd_rank": 2.5, "density": "0.5", "seed": None}
    with pytest.raises(CompositionError) as caught:
        model.add_weighted_adapter("plain", 0.5, "sum", **wrong)  # type: ignore[arg-type]
    assert str(caught.value).split("; ") == [
        "adapters='plain' must be a list of strings",
        "weights=0.5 must be a list of finite numbers",
        "combination_type=5 must be a string or None",
        "svd_rank=2.5 must be a whole number or None",
        "density='0.5' must be a finite number or None",
        "seed=None must be a whole number",
    ]
    assert "sum" not in model.peft_config


@pytest.mark.parametrize("weights", [np.array([0.5, -2]), torch.tensor([0.5, -2]), (np.float32(0.5), np.int64(-2))])
def test_weights_may_be_numpy_s_or_torch_s(weights: Any) -> None:
    model = with_parts("plain", "stable")
    model.add_weighted_adapter(["plain", "stable"], weights, "sum", "linear")
    model.add_weighted_adapter(["plain", "stable"], [0.5, -2], "expected", "linear")
    held = model.model.layers[0].self_attn.q_proj.adapters
    assert all(torch.equal(held["sum"][key], held["expected"][key]) for key in ("lora_A", "lora_B"))


@pytest.mark.parametrize("config", [BottleneckConfig(), PromptTuningConfig(num_virtual_tokens=3)])
def test_a_part_that_is_no_update_of_layers_is_not_left_out_in_silence(config: MethodConfig) -> None:
    model = with_parts("plain")
    model.add_adapter("beside", config)
    with pytest.raises(CompositionError, match=f"'beside' \\({config.peft_type}\\) is no update of linear layers"):
        model.add_weighted_adapter(["plain", "beside"], [0.7, 1.3], "sum", "linear")
    assert "sum" not in model.peft_config
