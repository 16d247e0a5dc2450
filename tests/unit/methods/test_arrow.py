"""Arrow against its formula and PEFT's model of the same saved LoRAs."""

from __future__ import annotations

import os
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from methods_in_peft import TARGETS, TOKENS, base, near, site
from veneer import ArrowConfig, LoraConfig, PeftModel, convert_to_lora, create_arrow_model, get_peft_model
from veneer.errors import CompositionError, ConfigError
from veneer.methods.arrow import amplified
from veneer.model.attach.attach import adapted_layers
from veneer.quant.dense import DenseWeight
from veneer.records.linear import apply_linear

SETTINGS = {"n_experts": 3, "rng_seed": 5}
FIELDS = {"top_k": 2, "router_temperature": 0.3, "rng_seed": 5}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Five LoRAs on one base."""
    found = []
    for seed in range(5):
        config, model = LoraConfig(r=3, lora_alpha=4.0 + seed, target_modules=TARGETS, init_lora_weights=False), base()
        torch.manual_seed(seed)
        get_peft_model(model, config).save_pretrained(tmp_path / f"lora{seed}")
        found.append(tmp_path / f"lora{seed}")
    return found


def logits(model: torch.nn.Module, tokens: Tensor = TOKENS, **inputs: object) -> Tensor:
    with torch.no_grad():
        return model(tokens, **inputs).logits


def test_each_token_takes_the_pairs_that_amplify_it_most():
    config, place = ArrowConfig(top_k=2, n_experts=3, r=2, router_temperature=0.5), site("q_proj", 7, 5)
    a, b, scales, directions = (torch.randn(*shape) for shape in ((3, 2, 5), (3, 7, 2), (3,), (3, 5)))
    params = {"arrow_A": a, "arrow_B": b, "arrow_scales": scales, "arrow_prototypes": directions}
    x, w = torch.randn(4, 5), torch.randn(7, 5)
    for token, found in zip(x, apply_linear(config.lower(place, params), x, DenseWeight(w)), strict=True):
        near_ones = sorted(range(3), key=lambda e: -abs(float(directions[e] @ token)))[:2]
        shares = torch.stack([(directions[e] @ token).abs() / 0.5 for e in near_ones]).softmax(dim=0)
        change = sum(s * scales[e] * b[e] @ a[e] @ token for s, e in zip(shares, near_ones, strict=True))
        torch.testing.assert_close(found, w @ token + change)


def test_no_tokens_are_a_mixture_of_none():
    config, place = ArrowConfig(top_k=2, n_experts=3, r=2), site("q_proj", 7, 5)
    record, w = config.lower(place, config.init(place)), DenseWeight(torch.randn(7, 5))
    assert apply_linear(record, torch.zeros(0, 5), w).shape == (0, 7)
    assert apply_linear(record, torch.zeros(2, 0, 5), w).shape == (2, 0, 7)


def test_a_prototype_is_what_a_pair_amplifies_most():
    a, b = torch.randn(3, 11), torch.randn(7, 3)
    b[:, 0] *= 9  # a gap, for the iteration
    _, _, right = torch.linalg.svd(b @ a)
    torch.testing.assert_close((amplified(a, b, seed=3) @ right[0]).abs(), torch.tensor(1.0))


@pytest.mark.parametrize("general", [0, 2])
def test_it_equals_peft(general, folders):
    tasks, others = folders[general:], folders[:general]
    theirs = peft.create_arrow_model(
        base(),
        [os.fspath(path) for path in tasks],
        peft.ArrowConfig(use_gks=bool(general), **FIELDS),
        [os.fspath(path) for path in others],
    ).eval()
    model = create_arrow_model(base(), tasks, ArrowConfig(use_gks=bool(general), **FIELDS), others)
    wanted = logits(theirs)
    near(logits(model), wanted)
    assert (wanted - logits(base())).norm() > 1e-3 * wanted.norm()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **how), theirs.generate(input_ids=TOKENS, **how))


def test_one_file_holds_it(folders, tmp_path):
    model = create_arrow_model(base(), folders, ArrowConfig(**FIELDS))
    model.save_pretrained(tmp_path / "arrow")
    again = PeftModel.from_pretrained(base(), tmp_path / "arrow" / "arrow_router")
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["default"].n_experts == 5


def test_a_row_does_not_depend_on_the_rows_beside_it(folders):
    model = create_arrow_model(base(), folders, ArrowConfig(**FIELDS))
    model.load_adapter(folders[0], "lora")
    names = ["arrow_router", "lora", "__base__", "arrow_router"]
    tokens = torch.cat([TOKENS, TOKENS])
    mixed = logits(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        near(mixed[row], logits(model, tokens[row : row + 1], adapter_names=[name])[0])


def test_a_mixture_of_one_is_the_lora(folders):
    model = create_arrow_model(base(), folders[:1], ArrowConfig(top_k=1))
    near(logits(model), logits(PeftModel.from_pretrained(base(), folders[0])))
    assert len(adapted_layers(model)) == 6


def test_what_it_refuses(folders, tmp_path):
    config = ArrowConfig(**FIELDS)
    with pytest.raises(ConfigError, match="must be a list of at least top_k=2 adapters"):
        create_arrow_model(base(), folders[:1], config)
    with pytest.raises(ConfigError, match="use_gks=True needs general_adapter_paths"):
        create_arrow_model(base(), folders, ArrowConfig(use_gks=True, **FIELDS))
    for one in (folders[0], os.fspath(folders[0])):
        with pytest.raises(ConfigError, match="must be a list of at least top_k=2 adapters"):
            create_arrow_model(base(), one, config)
        with pytest.raises(ConfigError, match="needs general_adapter_paths, a list of adapters"):
            create_arrow_model(base(), folders, ArrowConfig(use_gks=True, **FIELDS), one)
    with pytest.raises(ConfigError, match="general_adapter_paths has no effect with use_gks=False"):
        create_arrow_model(base(), folders, config, ["nobody/has-this"])
    other = {"rank": {"r": 5}, "layers": {"target_modules": ["q_proj"]}}
    for name, fields in other.items():
        lora = LoraConfig(**{"r": 3, "target_modules": TARGETS, **fields})
        get_peft_model(base(), lora).save_pretrained(tmp_path / name)
    with pytest.raises(CompositionError, match="the adapters have different ranks"):
        create_arrow_model(base(), [folders[0], tmp_path / "rank"], config)
    with pytest.raises(CompositionError, match=r"only one of the adapters .* changes model.layers.0.mlp.down_proj"):
        create_arrow_model(base(), [folders[0], tmp_path / "layers"], config)
    get_peft_model(base(), LoraConfig(target_modules=TARGETS, use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(CompositionError, match="reads the weights of its base"):
        create_arrow_model(base(), [folders[0], tmp_path / "dora"], config)
    biased = LoraConfig(target_modules=TARGETS, lora_bias=True, init_lora_weights=False)
    get_peft_model(base(), biased).save_pretrained(tmp_path / "bias")
    with pytest.raises(CompositionError, match=r"a low-rank pair and a bias, .*low-rank pairs alone"):
        create_arrow_model(base(), [folders[0], tmp_path / "bias"], config)
    model = create_arrow_model(base(), folders, config)
    with pytest.raises(CompositionError, match="no fixed weight has its effect"):
        model.merge_adapter()
    with pytest.raises(CompositionError, match="no fixed weight has its effect"):
        convert_to_lora(model, 3, "arrow_router")
    with pytest.raises(ConfigError, match=r"top_k=0 must .*router_temperature=0 must be above 0"):
        ArrowConfig(top_k=0, router_temperature=0)
    with pytest.raises(ConfigError, match="top_k=3 is above the 2 adapters"):
        ArrowConfig(n_experts=2)
