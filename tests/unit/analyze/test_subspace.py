"""Fastfood and the subspace of all weights: closed forms of the matrices that are never formed."""

import pytest
import torch

from veneer.analyze.subspace import Fastfood, Subspace, hadamard, layer_of
from veneer.errors import ConfigError

WEIGHTS = {
    "model.embed.weight": torch.randn(7, 5),
    "model.layers.0.a.weight": torch.randn(11, 3),
    "model.layers.0.b.bias": torch.randn(13).bfloat16(),
    "model.layers.1.a.weight": torch.randn(11, 3),
}
LAYERS = ["model.embed", "model.layers.0", "model.layers.1"]


def test_hadamard_is_sylvesters_matrix():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = torch.kron(two, torch.kron(two, two)) / 8**0.5
    x = torch.randn(3, 8)
    torch.testing.assert_close(hadamard(x), x @ matrix)


def matrix_of(projection, d):
    return torch.stack([projection(row) for row in torch.eye(d)], dim=1)


def test_fastfood_is_the_product_that_it_names():
    d, n = 8, 19
    projection = Fastfood(d, n, torch.Generator().manual_seed(3))
    h, blocks = hadamard(torch.eye(d)), []
    for gauss, order, sign in zip(projection.gauss, projection.order, projection.sign, strict=True):
        permutation = torch.eye(d)[order]
        blocks.append(h @ torch.diag(gauss) @ permutation @ h @ torch.diag(sign.float()))
    torch.testing.assert_close(matrix_of(projection, d), torch.cat(blocks)[:n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [1, 13, 32])
def test_entries_have_the_variance_of_one_over_d_and_columns_differ(d):
    matrix = matrix_of(Fastfood(d, 40_009, torch.Generator().manual_seed(5)), d)
    assert float(matrix.var()) * d == pytest.approx(1, rel=0.1)
    assert abs(float(matrix.mean())) < 0.02
    gram = matrix.T @ matrix / len(matrix) * d
    torch.testing.assert_close(gram, torch.eye(d), rtol=0, atol=0.25)


@pytest.mark.parametrize("structure_aware", [False, True])
def test_a_subspace_starts_at_the_weights_and_moves_them_all(structure_aware):
    space = Subspace(WEIGHTS, 12, structure_aware=structure_aware, seed=4)
    assert sum(p.numel() for p in space.parameters() if p.requires_grad) == 12
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in space.weights().items())
    with torch.no_grad():
        space.theta.normal_()
    moved = space.weights()
    assert all(value.dtype == WEIGHTS[name].dtype for name, value in moved.items())
    assert all(bool((value != WEIGHTS[name]).float().mean() > 0.8) for name, value in moved.items())
    again, other = Subspace(WEIGHTS, 12, structure_aware=structure_aware, seed=4), Subspace(WEIGHTS, 12, seed=5)
    for one in (again, other):
        one.theta.data = torch.nn.functional.pad(space.theta.data, (0, one.theta.numel() - space.theta.numel()))
    assert all(torch.equal(value, moved[name]) for name, value in again.weights().items())
    assert not torch.equal(other.weights()["model.embed.weight"], moved["model.embed.weight"])


def test_structure_aware_factors_scale_their_layer_alone():
    space = Subspace(WEIGHTS, 12, structure_aware=True)
    assert space.layers == LAYERS
    with torch.no_grad():
        space.theta.normal_()
        before = space.weights()
        space.factors[1] = 3.0
    for name, value in space.weights().items():
        factor = 3.0 if layer_of(name) == LAYERS[1] else 1.0
        if value.dtype == torch.float32:
            torch.testing.assert_close(value - WEIGHTS[name], factor * (before[name] - WEIGHTS[name]))
    sum(value.float().sum() for value in space.weights().values()).backward()
    assert bool((space.factors.grad != 0).all())


@pytest.mark.parametrize(("d", "structure_aware"), [(0, False), (3, True), (115, False)])
def test_a_dimension_that_does_not_fit(d, structure_aware):
    with pytest.raises(ConfigError, match="must lie between"):
        Subspace(WEIGHTS, d, structure_aware=structure_aware)
