"""LoRA-GA and CorDA: factors measured on gradients and inputs are PEFT's, on any base, and are saved as plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import veneer
from methods_in_peft import TARGETS, TOKENS, base, near
from veneer import CordaConfig, LoraConfig, LoraGAConfig, PeftModel
from veneer.errors import AdapterNameError, ConfigError, DataError, NonFiniteError
from veneer.inits.corda import of_covariance
from veneer.inits.lora_ga import of_gradient
from veneer.model.attach.attach import adapted_layers
from veneer.quant.dense import DenseWeight
from veneer.records.sites import LinearSite

R, ALPHA = 3, 5
BATCHES = [torch.randint(0, 71, (1, 23), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(4)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "vocab_size": 71}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).eval()


BASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (base, TARGETS),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}
every_base = pytest.mark.parametrize("on", BASES)


def fields(start: str, on: str = "llama", **changes: Any) -> dict[str, Any]:
    own = {"r": R, "lora_alpha": ALPHA, "target_modules": BASES[on][1], "init_lora_weights": start}
    return {**own, **changes}


def backward(model: nn.Module, batches: list[Tensor] = BATCHES[:2]) -> Callable[[], None]:
    """A few tokens each: a gradient of a rank that the randomized decompositions see whole."""

    def run() -> None:
        for batch in batches:
            model(input_ids=batch[:, :6], labels=batch[:, :6]).loss.backward()

    return run


def forward(model: nn.Module, batches: list[Tensor] = BATCHES) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            model(input_ids=batch)

    return run


def factors(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    held = {path: layer.adapters["default"] for path, layer in adapted_layers(model).items()}
    return {path: (each["lora_A"].detach(), each["lora_B"].detach()) for path, each in held.items()}


def pefts(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    layers = {name: each for name, each in model.named_modules() if hasattr(each, "lora_A")}
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (each.lora_A["default"].weight.detach(), each.lora_B["default"].weight.detach())
        for name, each in layers.items()
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def lora_ga(on: str = "llama", model: Any = None, **settings: Any) -> PeftModel:
    config = LoraConfig(**fields("lora_ga", on), lora_ga_config=LoraGAConfig(**settings))
    model = veneer.get_peft_model(BASES[on][0]() if model is None else model, config)
    torch.manual_seed(9)
    veneer.initialize_lora_ga_weights(model, backward(model))
    return model


def corda(on: str = "llama", model: Any = None, **settings: Any) -> PeftModel:
    config = LoraConfig(**fields("corda", on), corda_config=CordaConfig(**settings))
    model = veneer.get_peft_model(BASES[on][0]() if model is None else model, config)
    veneer.initialize_lora_corda_weights(model, forward(model))
    return model


@every_base
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit"])
def test_lora_ga_starts_as_in_peft(on: str, direction: str, scale: str) -> None:
    """But for the signs of singular vectors; GPT-2's layers store Wᵀ, of which PEFT's "stable" counts the inputs."""
    settings = {"direction": direction, "scale": scale, "stable_gamma": 7}
    model = BASES[on][0]()
    config = peft.LoraConfig(**fields("lora_ga", on), lora_ga_config=peft.LoraGAConfig(**settings))
    peft.preprocess_loraga(model, config, backward(model))
    expected = pefts(peft.get_peft_model(model, config))
    found = lora_ga(on, **settings)
    assert found.training is False
    assert factors(found).keys() == expected.keys()
    for path, (a, b) in factors(found).items():
        wanted_a, wanted_b = expected[path]
        if on == "gpt2" and scale == "stable":
            wanted_b = wanted_b * (b.shape[0] / a.shape[1]) ** 0.25
        torch.testing.assert_close(a.abs(), wanted_a.abs(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b.abs(), wanted_b.abs(), rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    near(logits(found), logits(BASES[on][0]()))


def test_lora_ga_takes_the_norm_of_the_weight_or_triplets_at_random() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, gradient = (torch.randn(13, 11, generator=generator) for _ in range(2))
    site = LinearSite(name="q", in_features=11, out_features=13, weight=DenseWeight(weight))
    a, b = of_gradient(site, gradient, (R, 2.0), LoraGAConfig(scale="weight_svd"))
    assert b[:, 0].norm().item() == pytest.approx(torch.linalg.svdvals(weight)[0].item(), rel=1e-5)
    u, s, vt = torch.linalg.svd(gradient)
    near(a.abs(), vt[:R].abs())
    assert (b[:, 1].norm() / b[:, 0].norm()).item() == pytest.approx((s[R + 1] / s[R]).item(), rel=1e-4)
    a, b = of_gradient(site, gradient, (R, 2.0), LoraGAConfig(direction="random", scale="unit"), generator)
    products = u[:, : 2 * R].T @ b @ a @ vt[: 2 * R].T  # r of the 2 r triplets, each of A with its own of B
    near(products, products.diagonal().diag())
    assert int((products.diagonal() > 1e-3).sum()) == R


@every_base
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(on: str, method: str) -> None:
    model = BASES[on][0]()
    config = peft.LoraConfig(
        **fields("corda", on), corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method)
    )
    preprocess_corda(model, config, forward(model))
    expected = pefts(peft.get_peft_model(model, config))
    found = corda(on, corda_method=method)
    assert factors(found).keys() == expected.keys()
    for path, (a, b) in factors(found).items():
        wanted_a, wanted_b = expected[path]
        product = wanted_b @ wanted_a
        assert (b @ a - product).norm() <= 1e-3 * product.norm()
        torch.testing.assert_close(a.norm(dim=1), wanted_a.norm(dim=1), rtol=1e-3, atol=1e-6)
    near(logits(found), logits(BASES[on][0]()))


def test_corda_of_plain_inputs_is_pissa() -> None:
    """A covariance without directions leaves the weight's own triplets."""
    weight = torch.randn(13, 11, generator=torch.Generator().manual_seed(2))
    site = LinearSite(name="q", in_features=11, out_features=13, weight=DenseWeight(weight))
    u, s, vt = torch.linalg.svd(weight)
    for method, part in (("ipm", slice(R)), ("kpm", slice(11 - R, 11))):
        a, b = of_covariance(site, 2 * torch.eye(11), (R, 0.5), CordaConfig(corda_method=method))
        near(0.5 * b @ a, (u[:, part] * s[part]) @ vt[part])


@pytest.mark.parametrize("start", [lora_ga, corda])
def test_saved_it_is_plain_lora_on_the_plain_base(start: Any, tmp_path: Path) -> None:
    model = moved(start())
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.shape[0] for key, value in written.items() if "lora_A" in key} == {2 * R}
    back = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    near(logits(back), logits(model))
    assert (logits(model) - logits(base())).norm() > 1e-2
    assert PeftModel.from_pretrained(base(), tmp_path).peft_config["default"].init_lora_weights is True


@pytest.mark.parametrize("start", [lora_ga, corda])
def test_a_base_in_four_bits_is_the_dense_one_that_its_codes_stand_for(start: Any, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    quantize = veneer.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    coded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantize).eval()
    dense = base()
    with torch.no_grad():
        for path, layer in coded.named_modules():
            if hasattr(layer, "frozen_format"):
                dense.get_submodule(path).weight.copy_(layer.frozen_format().dense())
    found, expected = (factors(start(model=model)) for model in (coded, dense))
    for path, each in found.items():
        for value, wanted in zip(each, expected[path], strict=True):
            assert (value.abs() - wanted.abs()).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_checkpointed_blocks_are_counted_once(reentrant: bool) -> None:
    expected, model = factors(lora_ga()), base()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for path, (a, b) in factors(lora_ga(model=model)).items():
        torch.testing.assert_close(a.abs(), expected[path][0].abs(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b.abs(), expected[path][1].abs(), rtol=1e-3, atol=1e-5)


def test_other_adapters_and_the_base_stay_as_they_are() -> None:
    model = veneer.get_peft_model(base(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "other")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.add_adapter("default", LoraConfig(**fields("lora_ga")))
    model.set_adapter("default")
    veneer.initialize_lora_ga_weights(model, backward(model))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in adapted_layers(model).values())


def new(start: str, model: Any = None, **changes: Any) -> PeftModel:
    return veneer.get_peft_model(base() if model is None else model, LoraConfig(**fields(start, **changes)))


def test_an_adapter_that_starts_otherwise_is_refused() -> None:
    plain = veneer.get_peft_model(base(), LoraConfig(r=R, target_modules=TARGETS))
    with pytest.raises(ConfigError, match=r"'default' does not start from LoraGAConfig: it is LoraConfig with .*=True"):
        veneer.initialize_lora_ga_weights(plain, backward(plain))
    with pytest.raises(ConfigError, match="does not start from CordaConfig"):
        veneer.initialize_lora_corda_weights(new("lora_ga"), lambda: None)


def test_a_pass_that_shows_nothing_is_refused() -> None:
    told = r"model\.layers\.0\.self_attn\.q_proj, .* and 2 more: leave these layers out"
    with pytest.raises(DataError, match=rf"train_step gave no gradient to {told}"):
        veneer.initialize_lora_ga_weights(new("lora_ga"), lambda: None)
    with pytest.raises(DataError, match=rf"run_model gave no input to {told}"):
        veneer.initialize_lora_corda_weights(new("corda"), lambda: None)
    broken = base()
    with torch.no_grad():
        broken.model.embed_tokens.weight[:] = float("nan")
    model = new("corda", broken)
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        veneer.initialize_lora_corda_weights(model, forward(model))


def test_a_rank_that_a_weight_cannot_give_is_refused_before_the_pass() -> None:
    one = r"v_proj: r=7 needs 14 directions, and a weight of shape \(12, 24\) has 12: give r=6"
    with pytest.raises(ConfigError, match=rf"layers\.0\S+{one}.*; .*layers\.1\S+{one}"):
        veneer.initialize_lora_ga_weights(new("lora_ga", r=7), lambda: pytest.fail("the pass has begun"))
    model = new("corda", rank_pattern={r"1\.self_attn\.v_proj": 13})
    with pytest.raises(ConfigError, match=r"layers\.1\S+v_proj: r=13 must be at most 12, the smaller side"):
        veneer.initialize_lora_corda_weights(model, lambda: pytest.fail("the pass has begun"))


def test_a_refused_start_leaves_the_adapter_as_it_was() -> None:
    """The first layers are measured, and others are not."""
    for start, begin in (
        ("lora_ga", veneer.initialize_lora_ga_weights),
        ("corda", veneer.initialize_lora_corda_weights),
    ):
        model = new(start)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        layer = model.model.layers[0].self_attn.q_proj
        with pytest.raises(DataError, match=r"to model\.layers\.0\.self_attn\.v_proj, .* and 1 more"):
            begin(model, lambda layer=layer: layer(torch.ones(5, 24)).sum().requires_grad_().backward())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_corda_divides_by_the_largest_input() -> None:
    """A pass without tokens, as an expert has it, counts for nothing; one whose largest input is 0 is refused."""
    expected, model = factors(corda()), new("corda")

    def run() -> None:
        forward(model)()
        model.model.layers[1].mlp.down_proj(torch.zeros(0, model.config.intermediate_size))

    veneer.initialize_lora_corda_weights(model, run)
    for path, both in factors(model).items():
        for found, wanted in zip(both, expected[path], strict=True):
            torch.testing.assert_close(found, wanted)
    flat = base()
    with torch.no_grad():
        flat.model.layers[1].input_layernorm.weight[:] = 0
    model, told = new("corda", flat), r"model\.layers\.1\.self_attn\.q_proj, model\.layers\.1\.self_attn\.v_proj"
    with pytest.raises(DataError, match=f"the largest input in a pass of run_model is 0 at {told}, and CorDA divides"):
        veneer.initialize_lora_corda_weights(model, forward(model))


def test_a_start_of_other_modules_than_linear_layers_is_refused() -> None:
    model = new("corda", target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match="CordaConfig starts the factors of linear layers; 'default' adapts none"):
        veneer.initialize_lora_corda_weights(model, forward(model))


def test_a_merged_adapter_is_refused() -> None:
    model = lora_ga()
    model.merge_adapter()
    with pytest.raises(AdapterNameError, match="are merged"):
        veneer.initialize_lora_ga_weights(model, backward(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"corda_config": CordaConfig()},
            "corda_config has no effect with init_lora_weights=True: set init_lora_weights='corda'",
        ),
        ({"lora_ga_config": {"scale": "unit"}}, "lora_ga_config has no effect with init_lora_weights=True"),
        ({"init_lora_weights": "corda", "target_parameters": ["a"]}, "does not go with target_parameters"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"gamma": 3}}, r"unknown keys \['gamma'\]"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(r=R, **settings)


def test_settings_of_the_starts() -> None:
    with pytest.raises(ConfigError, match="stable_gamma=0 must be above 0"):
        LoraGAConfig(stable_gamma=0)
    with pytest.raises(ConfigError, match="corda_method='all' must be 'ipm' or 'kpm'"):
        CordaConfig(corda_method="all")  # type: ignore[arg-type]
    given = {"corda_method": "kpm", "cache_file": None, "verbose": True}
    config = LoraConfig(r=R, init_lora_weights="corda", corda_config=given)
    assert config.corda_config == CordaConfig(corda_method="kpm")
