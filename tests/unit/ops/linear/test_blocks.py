"""Rotations in blocks as batched products, against the map's own formula under autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from veneer.methods.boft import Butterfly, orders
from veneer.methods.road import PairRotation
from veneer.ops.linear import blocks
from veneer.ops.linear.around import finished, finished_backward, mapped_input, mapped_input_backward, mapped_rows
from veneer.ops.linear.layer import MANY_ROWS, LinearLayer
from veneer.records.deltas import LinearDelta
from veneer.records.terms.rotation import BlockRotation, Rotation

ROWS = MANY_ROWS + 3


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROTATIONS = {
    "joined": lambda: BlockRotation(0.4 * drawn(14, 5, 5)),
    "a prime number": lambda: BlockRotation(0.4 * drawn(13, 7, 7)),
    "wide": lambda: BlockRotation(0.2 * drawn(2, 71, 71)),
    "pairs": lambda: PairRotation(1 + 0.3 * drawn(70), 0.3 * drawn(70, seed=4), 14),
    "pairs far apart": lambda: PairRotation(1 + 0.3 * drawn(260), 0.3 * drawn(260, seed=4), 260),
    "butterfly": lambda: Butterfly(0.4 * drawn(2, 6, 4, 4), orders(24, 4, 2, device=torch.device("cpu"))),
}


def rotation(name: str, dtype: torch.dtype = torch.float64) -> Rotation:
    made = ROTATIONS[name]()
    return made.with_tensors([x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in made.tensors])


def trained(term: Rotation) -> list[Tensor]:
    return [x for x in term.tensors if x.requires_grad]


def layer_of(**terms: Rotation) -> LinearLayer:
    n = next(iter(terms.values())).width
    return LinearLayer(weight=torch.empty(n, n), records=(LinearDelta(**terms),))


@pytest.mark.parametrize("name", ROTATIONS)
def test_inputs_and_outputs_are_mapped_as_by_the_formula(name: str) -> None:
    term = rotation(name)
    x, dy = drawn(ROWS, term.width, seed=5), drawn(ROWS, term.width, seed=6)
    leaf = x.clone().requires_grad_()
    wanted = term.apply(leaf)
    dx, *gradients = torch.autograd.grad(wanted, [leaf, *trained(term)], dy)
    with torch.no_grad():
        inner, outer = layer_of(input=term), layer_of(output=term)
        torch.testing.assert_close(mapped_input(x, inner), wanted)
        torch.testing.assert_close(finished(x.clone(), outer), wanted)
        given = dy.clone()
        [of_input] = mapped_input_backward(given, mapped_rows(x, inner), inner)
        dz, [of_output], _ = finished_backward(dy, x, outer)
    torch.testing.assert_close((given, dz), (dx, dx))
    for found in (of_input, of_output):
        torch.testing.assert_close([g for g in found if g is not None], gradients)


@pytest.mark.parametrize("name", ["joined", "a prime number", "wide", "pairs"])
def test_blocks_are_those_of_the_map(name: str) -> None:
    term = rotation(name)
    matrix = term.apply(torch.eye(term.width, dtype=torch.float64)).T
    torch.testing.assert_close(torch.block_diag(*term.blocks_of_map()), matrix)


def test_small_blocks_are_joined() -> None:
    assert blocks.less_identity(rotation("joined"), torch.float64).shape == (2, 35, 35)


@pytest.mark.parametrize("name", ["joined", "wide", "pairs"])
def test_rows_that_are_served_are_mapped_as_few_are(name: str) -> None:
    term, x = rotation(name, torch.float32), drawn(ROWS, rotation(name).width).bfloat16()
    alone = replace(layer_of(input=term), rows_alone=True)
    with torch.no_grad():
        assert torch.equal(mapped_input(x, alone), torch.empty_like(x).copy_(term.apply(x)))


def test_a_map_is_not_rounded_to_16_bits_itself() -> None:
    """Rounded, 1.02 would be 1.0234."""
    term, x = PairRotation(torch.full((70,), 1.02), torch.zeros(70), 14), drawn(ROWS, 70).bfloat16()
    moved = mapped_input(x, layer_of(input=term)).double() - x.double()
    assert (moved * x).sum() / x.double().square().sum() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["joined", "wide", "pairs"])
def test_errs_no_more_than_twice_plain_torch(name: str) -> None:
    term, narrow = rotation(name, torch.float32), rotation(name, torch.bfloat16)
    x, dy = (drawn(ROWS, term.width, seed=seed).bfloat16() for seed in (5, 6))
    found = {}
    for kind, own in (("truth", rotation(name)), ("plain", narrow)):
        leaf = x.to(trained(own)[0].dtype).requires_grad_()
        y = own.apply(leaf)
        found[kind] = [y, *torch.autograd.grad(y, [leaf, *trained(own)], dy.to(y.dtype))]
    inner, given = layer_of(input=term), dy.clone()
    with torch.no_grad():
        y, [gradients] = mapped_input(x, inner), mapped_input_backward(given, mapped_rows(x, inner), inner)
    for ours, plain, true in zip([y, given, *gradients], found["plain"], found["truth"], strict=True):
        assert (ours.double() - true).norm() <= 2 * (plain.double() - true).norm() + 1e-6 * true.norm()
