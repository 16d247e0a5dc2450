"""PVeRA against its formula and PEFT, whose noise is replaced by that of the same key."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from peft.tuners.pvera.layer import PveraLayer
from torch import nn

from methods_in_peft import BASES, TARGETS, TOKENS, assert_equals_peft, base, every_base, near, site, step
from veneer import LoraConfig, PeftModel, PveraConfig, get_peft_model
from veneer.errors import ConfigError, FormatError
from veneer.methods.pvera import SampledMixture
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.linear import apply_linear

FIELDS = {"r": 6, "init_weights": False}


def sampled(n: int = 5, **fields: object) -> SampledMixture:
    torch.manual_seed(3)
    a, b, core = torch.randn(8, 7), torch.randn(n, 4), torch.randn(8)
    values = {"a": a, "b": b, "core": core, "b_scale": torch.randn(n), "key": torch.tensor(91)}
    return SampledMixture(**{key: x.double() if x.is_floating_point() else x for key, x in values.items()}, **fields)


def noise(key: int, n: int, r: int, dtype: torch.dtype) -> torch.Tensor:
    """Noise of n rows: 64 have a generator together."""
    generators = [torch.Generator().manual_seed(key + place) for place in range(n // 64 + 1)]
    return torch.cat([torch.randn(64, r, generator=each, dtype=dtype) for each in generators])[:n]


def test_inner_activations_are_drawn():
    change, x = sampled(), torch.randn(150, 7, dtype=torch.float64)
    mean, log_variance = (change.core * (x @ change.a.T)).chunk(2, dim=-1)
    drawn = mean + noise(91, 150, 4, torch.float64) * (log_variance / 2).exp()
    expected = change.b_scale * (drawn @ change.b.T)
    torch.testing.assert_close(change.apply(x), expected)
    torch.testing.assert_close(change.on(slice(201, 280), 70).apply(x[70:149]), expected[70:149])
    assert change.apply(x[:0]).shape == (0, 5)


def test_gradients_are_those_of_the_drawn_pass():
    torch.manual_seed(4)
    change = sampled(p=0.3)
    x = torch.randn(9, 7, dtype=torch.float64)
    weight = DenseWeight(torch.randn(5, 7, dtype=torch.float64))

    def output(x: torch.Tensor, core: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
        tensors = [change.a, core, change.b, b_scale, change.key]
        return apply_linear(LinearDelta(adds=(change.with_tensors(tensors),)), x, weight)

    assert torch.equal(change.apply(x), change.apply(x))
    torch.autograd.gradcheck(output, [v.clone().requires_grad_() for v in (x, change.core, change.b_scale)])


def test_a_dropout_drops_a_share_of_the_inputs():
    x = torch.ones(400, 7, dtype=torch.float64)
    dropped = sampled(p=0.25)._dropped(x)
    assert math.isclose((dropped == 0).double().mean(), 0.25, abs_tol=0.03)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])


@every_base
@pytest.mark.parametrize("saved", [True, False])
def test_it_equals_peft(on, saved, tmp_path):
    shared = ["pvera_A", "pvera_B"] if saved else []
    assert_equals_peft(PveraConfig, "PveraConfig", tmp_path, on, shared, save_projection=saved, **FIELDS)


def draws_by_key(layer: PveraLayer, mean: torch.Tensor, log_variance: torch.Tensor, name: str) -> torch.Tensor:
    """PEFT's function with the noise of a key."""
    if not layer.training:
        return mean
    drawn = noise(int(torch.randint(2**62, ())), mean.shape[:-1].numel(), mean.shape[-1], mean.dtype)
    return mean + drawn.view(mean.shape) * torch.exp(0.5 * log_variance)


@every_base
def test_training_passes_equal_pefts_from_the_same_noise(on, tmp_path, monkeypatch):
    monkeypatch.setattr(PveraLayer, "_reparametrize", draws_by_key)
    torch.manual_seed(11)
    make, targets = BASES[on]
    theirs = peft.get_peft_model(make(), peft.PveraConfig(target_modules=targets, **FIELDS)).train()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).train()
    logits, losses = [], []
    for model in (ours, theirs):
        torch.manual_seed(7)
        logits.append(step(model)[0])
        torch.manual_seed(8)
        losses.append(five_losses(model))
    near(*logits)
    near(*losses)
    assert (logits[0] - step(ours.eval())[0]).norm() > 1e-2 * logits[0].norm()


def five_losses(model: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def trained() -> PeftModel:
    torch.manual_seed(11)
    return get_peft_model(base(), PveraConfig(target_modules=TARGETS, pvera_dropout=0.2, **FIELDS))


def test_checkpointed_blocks_draw_the_same_again():
    model, found = trained().train(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        found.append(step(model))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient)


def test_it_trains_beside_others_in_a_batch_and_answers_by_its_mean():
    model = trained()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    names = ["default", "lora", "default"]
    tokens = torch.cat([TOKENS, TOKENS[:1]])
    with torch.no_grad():
        mixed = model.eval()(tokens, adapter_names=names).logits
        for row, name in enumerate(names):
            near(mixed[row], model(tokens[row : row + 1], adapter_names=[name]).logits[0])
    model.set_requires_grad(["default", "lora"])
    logits = trained_on(model, tokens, names)
    assert not torch.allclose(logits[0], logits[2])  # rows of one adapter have noise of their own
    near(logits[::2], trained_on(model, tokens[::2], names[::2]))  # whatever is between them
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def trained_on(model: PeftModel, tokens: torch.Tensor, names: list[str]) -> torch.Tensor:
    torch.manual_seed(7)
    return model.train()(tokens, adapter_names=names).logits


def test_the_file_of_another_key_is_refused(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"projection_prng_key": 0', '"projection_prng_key": 5'))
    with pytest.raises(FormatError, match=r"differs from what projection_prng_key=5 draws: base_model.pvera_A"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_what_it_refuses():
    for fields, words in (
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"pvera_dropout": 1.0}, r"pvera_dropout=1.0 must lie in \[0, 1\)"),
        ({"sample_at_inference": True}, "sample_at_inference=True is not supported: set it to False"),
        ({"generator_seed": 3}, "generator_seed=3 asks for a generator at each layer, which no checkpoint keeps"),
    ):
        with pytest.raises(ConfigError, match=words):
            PveraConfig(**fields)
    assert PveraConfig(generator_seed=3, inference_mode=True).generator_seed == 3
    assert PveraConfig(r=2).init(site("q_proj", 5, 7))["pvera_lambda_d"].tolist() == pytest.approx([0.1] * 4)
