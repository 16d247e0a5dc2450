"""OFT against Cayley's transform and PEFT."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

import veneer
from methods_in_peft import (
    TOKENS,
    assert_convolutions_equal_peft,
    assert_equals_peft,
    base,
    convolutions,
    near,
    site,
    step,
)
from veneer import OFTConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.methods.oft import nearest_divisor
from veneer.records.linear import fold_linear
from veneer.records.orthogonal import cayley, neumann, skew_symmetric

SETTINGS = {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 4}


def test_blocks_turn_the_inputs():
    config, place = OFTConfig(oft_block_size=3, use_cayley_neumann=False), site("q_proj", 7, 6)
    q = torch.randn(2, 3, dtype=torch.float64)
    w = torch.randn(7, 6, dtype=torch.float64)
    r = torch.block_diag(*cayley(skew_symmetric(q, 3)))
    torch.testing.assert_close(r @ r.T, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(fold_linear(config.lower(place, {"oft_R": q}), w)[0], w @ r.T)


def test_a_skew_symmetric_matrix_is_filled_row_by_row():
    assert skew_symmetric(torch.tensor([[1.0, 2.0, 3.0]]), 3)[0].tolist() == [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]


def test_the_series_goes_to_the_transform():
    torch.manual_seed(2)
    q = skew_symmetric(0.1 * torch.randn(2, 6, dtype=torch.float64), 4)
    errors = [float((neumann(q, n) - cayley(-q)).norm()) for n in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(
    ("n", "wanted", "found"), [(12, 5, 4), (12, 8, 6), (24, 32, 24), (576, 32, 32), (7, 3, 1), (40, 7, 8)]
)
def test_a_size_that_does_not_divide_is_the_nearest_that_does(n, wanted, found):
    assert nearest_divisor(n, wanted) == found


@pytest.mark.parametrize(
    "fields",
    [
        {"oft_block_size": 4},
        {"oft_block_size": 5, "num_cayley_neumann_terms": 3},
        {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False},
        {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 7},
    ],
    ids=str,
)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(OFTConfig, "OFTConfig", tmp_path, init_weights=False, **fields)


def points():
    torch.manual_seed(3)
    return nn.Sequential(OrderedDict(first=nn.Conv2d(5, 8, 1), second=nn.Conv2d(8, 4, (1, 1), stride=2)))


def test_convolutions_of_single_points_equal_peft(tmp_path):
    fields = {"oft_block_size": 4, "init_weights": False}
    assert_convolutions_equal_peft("OFTConfig", tmp_path, points, **fields)


def test_wider_convolutions_equal_pefts_merged_ones(tmp_path):
    torch.manual_seed(11)
    config = peft.OFTConfig(target_modules=["first", "second"], oft_block_size=5, init_weights=False)
    reference = peft.get_peft_model(convolutions(), config)
    reference.save_pretrained(tmp_path)
    model, x = veneer.PeftModel.from_pretrained(convolutions(), tmp_path), torch.randn(2, 5, 9, 8)
    with torch.no_grad():
        wanted = reference.merge_and_unload()(x)
        assert (convolutions()(x) - wanted).norm() > 1e-2 * wanted.norm()
        near(model(x), wanted)
        near(model.merge_and_unload()(x), wanted)


def test_convolutions_in_groups_are_refused():
    with pytest.raises(TargetError, match="0 is a convolution in 2 groups, which this method cannot change"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), OFTConfig(target_modules=["0"]))


def test_embeddings_equal_peft(tmp_path):
    torch.manual_seed(11)
    config = peft.OFTConfig(target_modules=["embed_tokens", "v_proj"], oft_block_size=5, init_weights=False)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    model = veneer.PeftModel.from_pretrained(base(), tmp_path / "peft", is_trainable=True)
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    reference = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True)
    (logits, grads), (wanted, wanted_grads) = step(model), step(reference)
    assert (base()(TOKENS).logits - wanted).norm() > 1e-2 * wanted.norm()
    near(logits, wanted)
    assert len(grads) == len(wanted_grads) == 3
    for ours, theirs in zip(grads.values(), wanted_grads.values(), strict=True):
        near(ours, theirs)
    near(model.merge_and_unload()(TOKENS).logits.detach(), wanted)


def test_constrained_blocks_stay_near_the_identity():
    config, place = OFTConfig(oft_block_size=3, coft=True, eps=0.1, inference_mode=True), site("q_proj", 7, 6)
    short, long = torch.full((2, 3), 1e-3), torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    free = OFTConfig(oft_block_size=3)
    scaled = 0.1 / 2**0.5 * long / torch.tensor([[50.0], [8.0]]).sqrt()
    for given, meant in ((short, short), (long, scaled)):
        mine, wanted = config.lower(place, {"oft_R": given}), free.lower(place, {"oft_R": meant})
        torch.testing.assert_close(mine.input.blocks, wanted.input.blocks)


def test_training_with_constrained_blocks_is_peft_s() -> None:
    """PEFT moves the parameters before each forward pass, veneer after each step: all losses but rounding are equal."""
    fields = {"oft_block_size": 3, "coft": True, "eps": 0.05, "init_weights": False, "target_modules": ["v_proj"]}
    torch.manual_seed(3)
    model = veneer.get_peft_model(base(), veneer.OFTConfig(**fields))
    reference = peft.get_peft_model(base(), peft.OFTConfig(**fields))
    peft.set_peft_model_state_dict(reference, veneer.get_peft_model_state_dict(model))
    losses = []
    for side in (model, reference):
        optimizer = torch.optim.SGD([p for p in side.parameters() if p.requires_grad], lr=0.3)
        losses.append([])
        for number in range(5):
            loss = side(TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if side is model:
                model.update_and_allocate(number)
            losses[-1].append(loss.item())
    near(torch.tensor(losses[0]), torch.tensor(losses[1]))
    assert losses[0][4] != losses[0][0]


@pytest.mark.parametrize(("kind", "share"), [("linear", 0.41), ("embedding", 0.6)])
def test_dropout_leaves_some_blocks_where_they_are(kind, share):
    place = replace(site("q_proj", 20, 20), kind=kind)
    config = OFTConfig(oft_block_size=4, module_dropout=share, init_weights=False)
    params = config.init(place)
    drawn = config.drawn(place, torch.Generator().manual_seed(5))
    side = "output" if kind == "embedding" else "input"
    whole, dropped = (getattr(config.lower(place, params | given), side).blocks for given in ({}, drawn))
    still = (dropped == torch.eye(4)).all(dim=(1, 2))
    assert still.sum() == int(share * 5)
    assert torch.equal(dropped[~still], whole[~still])


@pytest.mark.parametrize("fields", [{"block_share": True, "oft_block_size": 4}, {"oft_block_size": 20}], ids=str)
def test_dropout_needs_several_blocks(fields):
    assert not OFTConfig(module_dropout=0.9, **fields).drawn(site("q_proj", 20, 20))


def test_an_embedding_draws_its_dropped_blocks_in_training():
    torch.manual_seed(2)
    fields = {"oft_block_size": 4, "module_dropout": 0.6, "init_weights": False}
    model = get_peft_model(nn.Sequential(nn.Embedding(7, 20)), OFTConfig(target_modules=["0"], **fields))
    ids = torch.tensor([5])
    assert torch.equal(model.eval()(ids), model(ids))
    model.train()
    assert len({tuple(model(ids).flatten().tolist()) for _ in range(8)}) > 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 2}, "r=2 and oft_block_size=32: one must be 0"),
        ({"oft_block_size": 0}, "r=0 and oft_block_size=0: one must be 0"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms=0 must lie in "),
        ({"module_dropout": 1.0}, "module_dropout=1.0 must lie in [0, 1)"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        OFTConfig(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cayley_of_16_bits_is_solved_in_float32(dtype: torch.dtype) -> None:
    q = skew_symmetric(torch.randn(3, 10).mul(0.3).to(dtype), 5)
    assert cayley(q).dtype == dtype
    torch.testing.assert_close(cayley(q).float(), cayley(q.float()), rtol=0.02, atol=0.02)


def test_a_series_of_too_many_terms_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_cayley_neumann_terms=101 must lie in \[1, 100\]"):
        OFTConfig(num_cayley_neumann_terms=101)
