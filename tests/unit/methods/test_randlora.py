"""RandLoRA against a sum of terms and PEFT."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from methods_in_peft import TARGETS, TOKENS, assert_drops_inputs, assert_equals_peft, base, every_base, site
from veneer import RandLoraConfig, get_peft_model
from veneer.errors import ConfigError
from veneer.methods.randlora import Draw, bases
from veneer.records.linear import fold_linear

SETTINGS = {"randlora_alpha": 4.0}


@pytest.mark.parametrize(("o", "i"), [(11, 5), (5, 11)])
def test_it_is_a_sum_of_terms(o, i):
    config, place = RandLoraConfig(r=2, randlora_alpha=3.0), site("q_proj", o, i)
    scales, columns = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    a, b = (each.double() for each in Draw(seed=0, r=2, small=5, large=11).on(torch.device("cpu")))
    rows = [scales[r, j] * a[r, 0] * columns[j] for r in range(2) for j in range(3)]
    change = 1.5 * sum(torch.outer(left, row) for left, row in zip(b.flatten(1).T, rows, strict=True))
    w = torch.randn(o, i, dtype=torch.float64)
    record = config.lower(place, {"randlora_lambda": scales, "randlora_gamma": columns})
    torch.testing.assert_close(fold_linear(record, w)[0], w + (change if o > i else change.T))
    x, dy = torch.randn(3, i, dtype=torch.float64), torch.randn(3, o, dtype=torch.float64)
    torch.testing.assert_close(record.changes[0].matmul(x), x @ record.added().T)
    torch.testing.assert_close(record.changes[0].matmul_t(dy), dy @ record.added())


@every_base
@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"very_sparse": True, "projection_prng_key": 5}], ids=str)
def test_it_equals_peft(fields, on, tmp_path):
    fields = {"r": 5, "randlora_alpha": 20, "init_weights": False, **fields}
    assert_equals_peft(RandLoraConfig, "RandLoraConfig", tmp_path, on, ["randlora_A", "randlora_B"], **fields)


def test_bases_are_drawn_once_and_go_with_their_adapters(monkeypatch):
    drawn, draw_on = [], Draw.on
    monkeypatch.setattr(Draw, "on", lambda self, device: drawn.append(self.seed) or draw_on(self, device))
    seeds = range(700, 709)
    model = get_peft_model(base(), RandLoraConfig(r=5, projection_prng_key=700, target_modules=TARGETS), "700")
    for seed in seeds[1:]:
        model.add_adapter(str(seed), RandLoraConfig(r=5, projection_prng_key=seed, target_modules=TARGETS))
    for _ in range(2):
        model(TOKENS[:1].repeat(9, 1), adapter_names=[str(seed) for seed in seeds])
    assert sorted(drawn) == list(seeds)
    copied = copy.deepcopy(model)
    copied(TOKENS)
    assert len(drawn) == 9
    held = [weakref.ref(bases(Draw(seed=seed, r=5, small=24, large=40))) for seed in seeds]
    assert len(drawn) == 9
    assert all(each() for each in held)
    del copied
    model.unload()
    gc.collect()
    assert not any(each() for each in held)


def test_dropout_zeroes_inputs_of_the_change():
    assert_drops_inputs(RandLoraConfig(r=3, target_modules=["0"], randlora_dropout=0.375, init_weights=False))


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="r=0 must be a whole number of at least 1"):
        RandLoraConfig(r=0)
    with pytest.raises(ConfigError, match=r"projection_prng_key=.* must be a seed of torch: a whole number from"):
        RandLoraConfig(projection_prng_key=2**64)
    with pytest.raises(ConfigError, match=r"randlora_dropout=1.0 must lie in \[0, 1\)"):
        RandLoraConfig(randlora_dropout=1.0)
