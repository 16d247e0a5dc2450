"""Methods of terms that no file here knows, each dropped in as one file: a change of the weight, a map of outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

import veneer
from veneer.model.fused.decoder import fused
from veneer.model.sites.places import placed_on
from veneer.store.adapter.records import read_records

HEAD = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import Tensor
from veneer.contract import LinearMethod
from veneer.records.deltas import LinearDelta
from veneer.records.terms.change import Change
from veneer.records.terms.rotation import Rotation
"""
CIRCULANT = (
    HEAD
    + """
@dataclass(frozen=True, slots=True, kw_only=True)
class Circulant(Change):
    kernel: Tensor
    size: tuple[int, int]

    @property
    def shape(self):
        return self.size

    def dense(self, dtype=None):
        o, i = self.size
        places = (torch.arange(o)[:, None] - torch.arange(i)[None]) % len(self.kernel)
        return (self.kernel if dtype is None else self.kernel.to(dtype))[places]


@dataclass(frozen=True, kw_only=True)
class CirculantConfig(LinearMethod):
    peft_type: ClassVar[str] = "CIRCULANT"

    def shapes(self, site):
        return {"kernel": (site.out_features,)}

    def init(self, site, generator=None):
        return {"kernel": torch.zeros(site.out_features)}

    def lower(self, site, params):
        return LinearDelta(adds=(Circulant(kernel=params["kernel"], size=(site.out_features, site.in_features)),))
"""
)
PAIRED = (
    HEAD
    + '''
@dataclass(frozen=True, slots=True)
class Paired(Rotation):
    """Neighbours k and k + n/2 are turned by an angle and scaled."""

    cosine: Tensor
    sine: Tensor

    @property
    def width(self):
        return 2 * len(self.cosine)

    def apply(self, x):
        first, second = x.chunk(2, dim=-1)
        halves = first * self.cosine - second * self.sine, first * self.sine + second * self.cosine
        return torch.cat(halves, dim=-1)

    def transposed(self):
        return Paired(self.cosine, -self.sine)


@dataclass(frozen=True, kw_only=True)
class PairedConfig(LinearMethod):
    peft_type: ClassVar[str] = "PAIRED"

    def shapes(self, site):
        return {"angle": (site.out_features // 2,), "length": (site.out_features // 2,)}

    def init(self, site, generator=None):
        return {"angle": torch.zeros(site.out_features // 2), "length": torch.ones(site.out_features // 2)}

    def lower(self, site, params):
        angle, length = params["angle"], params["length"]
        turn = Paired(length * angle.cos(), length * angle.sin())
        return LinearDelta(output=turn, bias=None if site.bias is None else turn.apply(site.bias))
'''
)
CHOOSY = (
    HEAD
    + """
@dataclass(frozen=True, kw_only=True)
class ChoosyConfig(LinearMethod):
    peft_type: ClassVar[str] = "CHOOSY"

    def shapes(self, site):
        return {} if site.name.endswith("v_proj") else {"a": (1, site.in_features), "b": (site.out_features, 1)}

    def init(self, site, generator=None):
        return {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}

    def lower(self, site, params):
        return LinearDelta.pair(params["a"], params["b"]) if params else LinearDelta()
"""
)
SOURCES = {"circulant": CIRCULANT, "paired": PAIRED}
BASES: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=28, intermediate_size=38, num_hidden_layers=2, vocab_size=67, num_attention_heads=7,
        num_key_value_heads=1, attention_bias=True,
    ),
    "gpt2": GPT2Config(vocab_size=67, n_embd=28, n_layer=2, n_head=7, n_positions=32),
}  # fmt: skip
TOKENS = torch.tensor([[5, 61, 2, 33, 17], [8, 8, 40, 1, 66]])


def make_base(name: str) -> PreTrainedModel:
    torch.manual_seed(41)
    return AutoModelForCausalLM.from_config(BASES[name], dtype=torch.float64).eval()


def logits(model: PreTrainedModel, **names: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, **names).logits


def step(model: PreTrainedModel) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SOURCES)
def test_it_trains_saves_loads_merges_and_mixes(name, base, dropped_method, tmp_path):
    method = dropped_method(name, SOURCES[name])
    model = veneer.get_peft_model(make_base(base), method(target_modules="all-linear"))
    plain = logits(make_base(base))
    torch.testing.assert_close(logits(model), plain)
    torch.manual_seed(43)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn_like(parameter)
    wanted = logits(model)
    assert (wanted - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(make_base(base), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    mixed = logits(loaded, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([wanted[0], plain[1]]))
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), wanted)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), wanted)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted)


@pytest.mark.parametrize("name", SOURCES)
def test_it_trains_in_fused_blocks(name, dropped_method):
    model = veneer.get_peft_model(
        make_base("llama").float(), dropped_method(name, SOURCES[name])(target_modules="all-linear")
    )
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn_like(parameter)
    model.train()
    expected = step(model)
    with fused(model):
        found = step(model)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 5e-5 * other.norm()


def test_a_method_may_have_no_parameters_at_a_site(dropped_method, tmp_path):
    method = dropped_method("choosy", CHOOSY)
    model = veneer.get_peft_model(make_base("llama"), method(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn_like(parameter)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(veneer.PeftModel.from_pretrained(make_base("llama"), tmp_path)), wanted)
    stored = read_records(tmp_path, placed_on(make_base("llama"), model.peft_config["default"]))
    assert [record.changes_nothing for record in stored.updates.values()] == [False, True] * 2
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted)
