"""The laws of `veneer.contract`, on every linear method in the folder and on every variant of LoRA, alone and in pairs.

A method that is dropped into ``methods/`` is found and tested here with no other edit.
"""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import veneer
from bench.kernels.differentiable import runs_of
from gradients import has_exact_gradients
from veneer.contract import LinearMethod
from veneer.errors import CompositionError
from veneer.methods.variants import dora
from veneer.model.attach.attach import adapted_layers
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import linear
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.linear import apply_embedding, apply_linear, fold_linear
from veneer.records.sites import LinearSite
from veneer.records.terms.rotation import Rotation

OUT, IN, TOKENS = 14, 6, 3  # blocks of 2 divide both, and no larger ones do

every_place = pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp.down_proj"])
every_place_and_bias = pytest.mark.parametrize(
    ("place", "has_bias"), [("self_attn.q_proj", True), ("mlp.down_proj", False)], ids=["bias", "no-bias"]
)


def make_site(place: str = "self_attn.q_proj", has_bias: bool = True, kind: str = "linear") -> LinearSite:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    bias = torch.randn(OUT, generator=generator, dtype=torch.float64) if has_bias else None
    return LinearSite(
        name=f"model.layers.1.{place}",
        in_features=IN,
        out_features=OUT,
        kind=kind,
        weight=DenseWeight(weight),
        bias=bias,
        row_sq=functools.partial(lambda w: w.square().sum(dim=1), weight),
    )


def trained(config: LinearMethod, site: LinearSite, seed: int = 5) -> dict[str, torch.Tensor]:
    """Parameters in float64 away from every neutral value, but for what is never trained."""
    generator = torch.Generator().manual_seed(seed)
    moves = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in config.shapes(site).items()
        if name not in config.packing.fixed
    }
    start = config.init(site, generator).items()
    return {
        name: value if name in config.packing.whole else value.double() + 0.4 * moves.get(name, 0)
        for name, value in start
    }


def leaves_of(config: LinearMethod, site: LinearSite, params: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [value.requires_grad_() for name, value in params.items() if name not in config.packing.fixed]


def inputs(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(site: LinearSite) -> FrozenWeight:
    assert site.weight is not None
    return site.weight


def by_rows(records: list[LinearDelta], row_index: torch.Tensor, x: torch.Tensor, site: LinearSite) -> torch.Tensor:
    """One pass of the op, each row with the record that it names."""
    runs = runs_of(row_index)
    return linear(x, LinearLayer(weight=weight_of(site), bias=site.bias, records=tuple(records), runs=runs))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_place_and_bias
def test_init_has_the_declared_names_and_shapes_and_is_finite(config, place, has_bias):
    site = make_site(place, has_bias)
    start = config.init(site, torch.Generator().manual_seed(3))
    assert {name: tuple(value.shape) for name, value in start.items()} == config.shapes(site)
    for name, value in start.items():
        assert value.dtype == config.packing.whole.get(name, torch.float32)
        assert value.isfinite().all()


def test_init_is_a_function_of_the_generator(config):
    first, again = (config.init(make_site(), torch.Generator().manual_seed(3)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name])


@every_place
def test_shapes_are_known_before_any_weight_is(config, shapes_from_weight, place):
    site = make_site(place)
    bare = LinearSite(name=site.name, in_features=IN, out_features=OUT, has_bias=site.has_bias)
    known, real = config.shapes(bare), config.shapes(site)
    if shapes_from_weight:
        assert known.keys() == real.keys()
        assert sum(map(math.prod, known.values())) == sum(map(math.prod, real.values()))
    else:
        assert known == real


def test_the_written_config_tells_the_largest_rank(config):
    places = [make_site("self_attn.q_proj"), make_site("mlp.down_proj")]
    ranks = [config.lower(site, trained(config, site)).rank for site in places]
    assert config.packed().largest_rank == max(ranks)


def test_factors_that_may_start_again_have_the_ranks_and_scales_of_the_record(every_config):
    site, starts = make_site(), [(config, config.late_start) for config in every_config if config.late_start]
    assert any(start.is_product for _, start in starts)
    for config, start in starts:
        params, shapes, before = trained(config, site), config.shapes(site), weight_of(site).dense(torch.float64)
        record = config.lower(site, params)
        assert (shapes[start.a], shapes[start.b]) == ((start.rank(site), IN), (OUT, start.rank(site)))
        assert start.scale(site) == record.low_rank.scale
        change = fold_linear(record, before)[0] - before
        product = start.scale(site) * params[start.b] @ params[start.a]
        assert start.is_product == torch.allclose(change, product, rtol=1e-12, atol=1e-12)


def test_each_parameter_has_a_name_of_its_own_on_disk(config):
    names = config.disk_names(make_site())
    assert names.keys() == config.shapes(make_site()).keys()
    assert len(set(names.values())) == len(names)


@every_place_and_bias
def test_the_start_changes_nothing(config, place, has_bias):
    """And a start that does not claim to be the base model is not."""
    site, x = make_site(place, has_bias), inputs(TOKENS, IN)
    start = config.init(site, torch.Generator().manual_seed(3))
    wide = {name: value.double() if value.is_floating_point() else value for name, value in start.items()}
    record = config.lower(site, wide)
    # a start is drawn in float32, and so are the norms that DoRA starts from
    plain = apply_linear(LinearDelta(), x, weight_of(site), site.bias)
    adapted = apply_linear(record, x, weight_of(site), site.bias)
    assert torch.allclose(adapted, plain, rtol=1e-6, atol=1e-6) == config.identity_at_start


@every_place_and_bias
def test_forward_equals_folded(config, place, has_bias):
    site, x = make_site(place, has_bias), inputs(2, TOKENS, IN)
    record = config.lower(site, trained(config, site))
    if not config.changes_weights:
        with pytest.raises(CompositionError, match="no fixed weight has its effect"):
            fold_linear(record, weight_of(site).dense(), site.bias)
        return
    weight, bias = fold_linear(record, weight_of(site).dense(), site.bias)
    adapted = apply_linear(record, x, weight_of(site), site.bias)
    close(adapted, torch.nn.functional.linear(x, weight, bias))
    assert not torch.allclose(adapted, apply_linear(LinearDelta(), x, weight_of(site), site.bias), atol=1e-2)


def test_the_storage_format_of_the_base_makes_no_difference(config, store):
    """On a quantized base a method is what it is on the dense matrix that the codes stand for, gradients included."""
    site = make_site()
    weight = store(weight_of(site).dense().float())
    matrix = weight.dense(torch.float64)
    row_sq = matrix.square().sum(dim=1)
    coded = dataclasses.replace(site, weight=weight, row_sq=lambda: row_sq)
    dense = dataclasses.replace(coded, weight=DenseWeight(matrix))
    params, x = trained(config, dense), inputs(TOKENS, IN).requires_grad_()
    leaves = [x, *leaves_of(config, site, params)]
    got, expected = (apply_linear(config.lower(s, params), x, weight_of(s), s.bias) for s in (coded, dense))
    close(got, expected)
    gradients = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected))
    for actual, wanted in zip(*gradients, strict=True):
        close(actual, wanted)


@every_place_and_bias
def test_a_row_of_a_mixed_batch_equals_the_row_alone(every_config, place, has_bias):
    site = make_site(place, has_bias)
    records = [LinearDelta(), *(c.lower(site, trained(c, site, seed)) for seed, c in enumerate(every_config))]
    row_index = torch.tensor([*range(len(records)), 1, 0, 2, 1])
    x = inputs(len(row_index), TOKENS, IN)
    mixed = by_rows(records, row_index, x, site)
    for row, index in enumerate(row_index.tolist()):
        close(mixed[row], apply_linear(records[index], x[row], weight_of(site), site.bias))


def test_a_mixed_batch_has_the_gradients_of_its_rows(config):
    site = make_site()
    params = trained(config, site)
    x, row_index = inputs(4, TOKENS, IN).requires_grad_(), torch.tensor([1, 0, 1, 0])
    leaves = [x, *leaves_of(config, site, params)]
    mixed = by_rows([LinearDelta(), config.lower(site, params)], row_index, x, site)
    got = torch.autograd.grad(mixed.square().sum(), leaves)
    alone = apply_linear(config.lower(site, params), x[[0, 2]], weight_of(site), site.bias)
    plain = apply_linear(LinearDelta(), x[[1, 3]], weight_of(site), site.bias)
    for actual, expected in zip(
        got, torch.autograd.grad(alone.square().sum() + plain.square().sum(), leaves), strict=True
    ):
        close(actual, expected)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """A loss that also changes if outputs are only rotated."""
    return (y + 1).square().sum()


@every_place_and_bias
def test_every_parameter_is_trained(config, without_gradient, place, has_bias):
    """Every entry of it in a training pass, but for the diagonals that the method's own tests name."""
    site = make_site(place, has_bias)
    params = trained(config, site)
    leaves = leaves_of(config, site, params)
    names = [name for name in params if name not in config.packing.fixed]
    record = config.lower(site, {**params, **config.drawn(site, torch.Generator().manual_seed(5))})
    y = apply_linear(record, inputs(TOKENS, IN), weight_of(site), site.bias)
    for name, gradient in zip(names, torch.autograd.grad(loss_of(y), leaves), strict=True):
        left = torch.eye(gradient.shape[-1]).expand_as(gradient) if name in without_gradient else None
        assert torch.equal(gradient == 0, torch.zeros_like(gradient).bool() if left is None else left.bool()), name


@every_place
@pytest.mark.usefixtures("keeps_gradients")
def test_gradients_are_those_of_the_forward_pass(config, place, monkeypatch):
    """DoRA's norms are held constant in its gradient, so the numeric derivative is taken with them held too."""
    site = make_site(place)
    params = trained(config, site)
    if getattr(config, "use_dora", False):
        record = config.lower(site, params)
        norms = params["lora_magnitude_vector"] / record.output_scale
        monkeypatch.setattr(dora, "_norms", lambda *_: norms)
    leaves = leaves_of(config, site, params)
    names = [name for name in params if name not in config.packing.fixed]

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        record = config.lower(site, params | dict(zip(names, values, strict=True)))
        return apply_linear(record, x, weight_of(site), site.bias)

    assert has_exact_gradients(forward, (inputs(TOKENS, IN).requires_grad_(), *leaves))


@every_place
def test_what_is_packed_has_the_same_effect_and_unpacks_to_the_same_bits(config, place):
    site = make_site(place)
    params = trained(config, site)
    packed, written = config.packing.pack(params), config.packed()
    assert {name: tuple(value.shape) for name, value in packed.items()} == written.shapes(site)
    fixed = set(written.packing.fixed) & config.shapes(site).keys()
    assert fixed <= packed.keys()  # what is written holds all that it means
    assert all(torch.equal(value, packed[name]) for name, value in written.packing.pack(packed).items())
    x = inputs(TOKENS, IN)
    plain = apply_linear(config.lower(site, params), x, weight_of(site), site.bias)
    close(apply_linear(written.lower(site, packed), x, weight_of(site), site.bias), plain)
    again = config.packing.unpack(packed)
    assert again.keys() == params.keys()
    assert all(torch.equal(again[name], value) for name, value in params.items())


def test_lowering_leaves_its_parameters_alone(config):
    site = make_site()
    params = trained(config, site)
    before = {name: value.clone() for name, value in params.items()}
    config.lower(site, params)
    assert all(torch.equal(before[name], value) for name, value in params.items())


def test_an_embedding_is_the_linear_layer_on_one_hot_rows(config):
    """Or the adapter is refused, if a row of the table would be a mix of others."""
    site = make_site("embed_tokens", has_bias=False, kind="embedding")
    token_ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    record = config.lower(site, trained(config, site))
    looked_up = weight_of(site).dense().T[token_ids]
    one_hot = torch.nn.functional.one_hot(token_ids, IN).double()
    if not config.changes_weights:
        with pytest.raises(CompositionError, match="no fixed weight has its effect"):
            apply_embedding(record, token_ids, looked_up)
        return
    if isinstance(record.input, Rotation):
        with pytest.raises(CompositionError, match="rotates the inputs of an embedding"):
            apply_embedding(record, token_ids, looked_up)
        return
    close(apply_embedding(record, token_ids, looked_up), apply_linear(record, one_hot, weight_of(site)))


class Projections(nn.Module):
    """Two linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(IN, 12)
        self.down_proj = nn.Linear(12, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.q_proj(x).sin())


def trained_projections(config: LinearMethod) -> nn.Module:
    """In float32, with an adapter away from its start."""
    torch.manual_seed(7)
    feedforward = {"feedforward_modules": ["down_proj"]} if hasattr(config, "feedforward_modules") else {}
    targets = ["q_proj", "down_proj"]
    model = veneer.get_peft_model(Projections(), dataclasses.replace(config, target_modules=targets, **feedforward))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("trains_weight", [False, True], ids=["frozen", "trained"])
def test_training_under_autocast_is_near_that_in_float32(config, trains_weight):
    """By the op on a frozen weight, and by the formula where the weight is trained as well."""
    model, x = trained_projections(config), inputs(4, TOKENS, IN).float().requires_grad_()
    for layer in adapted_layers(model).values():
        layer.weight.requires_grad_(trains_weight)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    found = []
    for narrow in (True, False):
        torch.manual_seed(5)  # for what a record draws
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = model(x)
        assert y.dtype == (torch.bfloat16 if narrow else torch.float32)
        found.append([y.float(), *torch.autograd.grad(loss_of(y.float()), leaves)])
    for near, exact in zip(*found, strict=True):
        assert near.isfinite().all()
        assert (near - exact).norm() < 0.05 * exact.norm()


def test_autocast_changes_no_bit_of_a_record(config):
    for layer in adapted_layers(trained_projections(config)).values():
        plain = layer.record("default").tensors
        with torch.autocast("cpu", torch.bfloat16):
            cast = layer.record("default").tensors
        assert len(cast) == len(plain) > 0
        for narrow, exact in zip(cast, plain, strict=True):
            assert narrow.dtype == exact.dtype
            assert torch.equal(narrow, exact)
