"""Terms of a record, and records with terms of every kind, against matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from veneer import FourierFTConfig
from veneer.errors import CompositionError
from veneer.quant.dense import DenseWeight
from veneer.records import linear
from veneer.records.deltas import LinearDelta
from veneer.records.linear import apply_linear, apply_projected, compose_linear, entered, fold_blocks, fold_linear
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change, Transposed, Weighed
from veneer.records.terms.in_groups import in_groups
from veneer.records.terms.pair import Pair
from veneer.records.terms.rotation import BlockRotation
from veneer.records.terms.scale import Scale

OUT, IN = 7, 5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer(Change):
    """A change of a kind that no file here knows."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), len(self.right)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.outer(self.left, self.right).sin()
        return made if dtype is None else made.to(dtype)


def pair(r: int = 2) -> Pair:
    return Pair(a=normal(r, IN), core=normal(r), b=normal(OUT, r), b_scale=normal(OUT), scale=0.7)


def change() -> Outer:
    return Outer(left=normal(OUT), right=normal(IN))


def block_matrix(rotation: BlockRotation) -> Tensor:
    return torch.block_diag(*rotation.blocks)


ROTATIONS = {"input": lambda: BlockRotation(normal(1, IN, IN)), "output": lambda: BlockRotation(normal(OUT, 1, 1))}


def everything() -> LinearDelta:
    return LinearDelta(
        adds=(change(), pair(), pair(3)), input=ROTATIONS["input"](), output=ROTATIONS["output"](), bias=normal(OUT)
    )


def test_pairs_are_joined_to_one_that_comes_first():
    first, second, other = pair(), pair(3), change()
    record = LinearDelta(adds=(other, first, second))
    assert record.rank == 5
    assert record.adds[1:] == (other,)
    torch.testing.assert_close(record.added(), first.dense(torch.float64) + second.dense(torch.float64) + other.dense())


def test_the_formula_of_a_record_with_all_terms():
    record, w, x, c = everything(), normal(OUT, IN), normal(3, IN), normal(OUT)
    whole = block_matrix(record.output) @ (w + record.added()) @ block_matrix(record.input)
    torch.testing.assert_close(apply_linear(record, x, DenseWeight(w), c), x @ whole.T + record.bias)
    torch.testing.assert_close(fold_linear(record, w, c), (whole, record.bias))
    scaled = replace(record, input=Scale(normal(IN)), output=Scale(normal(OUT)))
    whole = scaled.output_scale[:, None] * (w + record.added()) * scaled.input_scale
    torch.testing.assert_close(fold_linear(scaled, w)[0], whole)
    turned = fold_linear(record.transposed(), w.T)[0].T
    torch.testing.assert_close(turned, fold_linear(record, w)[0])


def test_rotations_are_not_rounded_under_autocast():
    x, y = normal(3, IN).float(), normal(3, OUT).float()
    record = LinearDelta(
        input=BlockRotation(normal(1, IN, IN).float()), output=BlockRotation(normal(1, OUT, OUT).float())
    )
    plain = entered(record, x), apply_projected(record, [], y)
    with torch.autocast("cpu", torch.bfloat16):
        cast = entered(record, x), apply_projected(record, [], y)
    assert all(map(torch.equal, cast, plain))


@pytest.mark.parametrize("output", ["rotation", "scale", "none"])
def test_rows_folded_block_by_block_are_those_of_the_whole(output, monkeypatch):
    record, w = everything(), normal(OUT, IN)
    record = replace(record, output={"rotation": record.output, "scale": Scale(normal(OUT)), "none": None}[output])
    whole, _ = fold_linear(record, w)
    blocks = list(fold_blocks(record, iter(w.split([2, 4, 1])), torch.float64))
    assert [len(block) for block in blocks] == [2, 4, 1]
    torch.testing.assert_close(torch.cat(blocks), whole)
    monkeypatch.setattr(linear, "BLOCK_VALUES", 2 * IN)
    with torch.no_grad():
        torch.testing.assert_close(fold_linear(record, w)[0], whole)


def test_a_change_is_weighed_and_transposed():
    own, x, dy = change(), normal(3, IN), normal(3, OUT)
    half = own.weighed(0.5)
    assert isinstance(half, Weighed)
    assert isinstance(half.transposed(), Transposed)
    matrix = 0.5 * own.dense()
    for made, wanted in (
        (half.dense(), matrix), (half.matmul(x), x @ matrix.T), (half.matmul_t(dy), dy @ matrix),
        (half.transposed().dense(), matrix.T), (half.transposed().matmul(dy), dy @ matrix),
        (half.transposed().matmul_t(x), x @ matrix.T), (half.look_up(torch.tensor([4, 1])), matrix.T[[4, 1]]),
    ):  # fmt: skip
        torch.testing.assert_close(made, wanted)
    assert half.shape == (OUT, IN)
    assert half.transposed().shape == (IN, OUT)
    assert half.nbytes == 8 * (OUT + IN)
    other = half.with_tensors([tensor * 2 for tensor in half.tensors])
    torch.testing.assert_close(other.dense(), 0.5 * torch.outer(2 * own.left, 2 * own.right).sin())


def test_what_is_asked_of_a_record():
    empty, low, full = LinearDelta(), LinearDelta(adds=(pair(),)), everything()
    scales = LinearDelta(output=Scale(normal(OUT)))
    rotates = LinearDelta(input=ROTATIONS["input"]())
    for record, answers in {
        empty: (True, False, True, True, True), low: (True, True, False, True, False),
        LinearDelta(adds=(change(),)): (True, False, False, False, False), scales: (False, False, True, True, False),
        rotates: (False, False, False, False, False), full: (False, False, False, False, False),
    }.items():  # fmt: skip
        asked = record.only_adds, record.is_low_rank, record.only_scales, record.is_elementary, record.changes_nothing
        assert asked == answers, record.told
    assert [len(record.tensors) for record in (empty, low, scales, rotates, full)] == [0, 4, 1, 1, 7]
    assert full.nbytes == sum(tensor.nbytes for tensor in full.tensors)
    parts = "a low-rank pair", "a change of the whole weight", "a rotation of its inputs", "a rotation of its outputs"
    assert full.told == " and ".join((*parts, "a bias"))
    a, b = low.factors()
    torch.testing.assert_close(b @ a, low.added())


def test_what_has_no_factors_or_sum_says_so():
    with pytest.raises(CompositionError, match="a record with a scale of its outputs has no factors"):
        LinearDelta(output=Scale(normal(OUT))).factors()
    with pytest.raises(CompositionError, match="a rotation of its inputs cannot be weighed"):
        LinearDelta(input=ROTATIONS["input"]()).weighed(0.3)
    with pytest.raises(CompositionError, match="changes no weight, only a bias"):
        LinearDelta(bias=normal(OUT)).added()
    with pytest.raises(CompositionError, match="scale or rotate its inputs or outputs"):
        compose_linear([LinearDelta(input=ROTATIONS["input"]()), LinearDelta(adds=(pair(),))])


def test_maps_act_one_after_the_other_each_on_the_layer_made_so_far():
    w, c, x = normal(OUT, IN), normal(OUT), normal(3, IN)
    first = LinearDelta(input=BlockRotation(normal(1, IN, IN)), output=Scale(normal(OUT)))
    turn = BlockRotation(normal(1, OUT, OUT))
    second = LinearDelta(input=Scale(normal(IN)), output=turn, bias=turn.apply(c))
    third = LinearDelta(input=BlockRotation(normal(1, IN, IN)))
    made, _ = fold_linear(third, fold_linear(second, fold_linear(first, w)[0])[0])
    whole = compose_linear([first, second, third], c)
    torch.testing.assert_close(fold_linear(whole, w, c)[0], made)
    torch.testing.assert_close(whole.bias, turn.apply(c))
    torch.testing.assert_close(apply_linear(whole, x, DenseWeight(w), c), x @ made.T + turn.apply(c))
    moved = whole.input.with_tensors([2 * tensor for tensor in whole.input.tensors])
    torch.testing.assert_close(moved.apply(x), 8 * whole.input.apply(x))
    y, dy = normal(3, OUT), normal(3, OUT)
    torch.testing.assert_close((whole.output.apply(y) * dy).sum(), (y * whole.output.transposed().apply(dy)).sum())
    assert compose_linear([third, first], None).bias is None


def test_what_is_added_has_a_sum_of_any_weights():
    parts, own = [LinearDelta(adds=(pair(),), bias=normal(OUT)), LinearDelta(adds=(change(), pair()))], normal(OUT)
    whole = compose_linear([part.weighed(w, own) for part, w in zip(parts, (0.3, -2.0), strict=True)], own)
    torch.testing.assert_close(whole.added(), 0.3 * parts[0].added() - 2 * parts[1].added())
    torch.testing.assert_close(whole.bias, own + 0.3 * (parts[0].bias - own))


def test_a_derived_change_computes_in_the_dtype_of_its_own() -> None:
    """A spectrum computes in float32, since there is no FFT in 16 bits: its multiple does too."""
    config = FourierFTConfig(n_frequency=7, target_modules=["q"])
    site = LinearSite(name="q", in_features=11, out_features=13)
    params = {name: torch.randn(shape).bfloat16() for name, shape in config.shapes(site).items()}
    (spectrum,) = config.lower(site, params).adds
    x = torch.randn(3, 11)
    torch.testing.assert_close(spectrum.weighed(0.5).apply(x), 0.5 * spectrum.apply(x))
    assert spectrum.weighed(0.5).dtype == spectrum.dtype == torch.float32


@pytest.mark.parametrize("make", [change, pair])
def test_rows_times_numbers_are_those_of_the_matrix(make):
    term, factors = make(), normal(OUT)
    scaled = term.with_rows_times(factors)
    matrix = factors[:, None] * term.dense(torch.float64)
    torch.testing.assert_close(scaled.dense(torch.float64), matrix)
    torch.testing.assert_close(scaled.with_rows_times(factors).dense(torch.float64), factors[:, None] * matrix)
    x = normal(3, IN)
    torch.testing.assert_close(scaled.apply(x), x @ matrix.T)
    torch.testing.assert_close(scaled.transposed().dense(torch.float64), matrix.T)


def test_the_gradient_of_a_change_of_scaled_rows_is_that_of_its_matrix():
    scaled, dy = change().with_rows_times(normal(OUT)), normal(3, OUT)
    torch.testing.assert_close(scaled.matmul_t(dy), dy @ scaled.dense())


@pytest.mark.parametrize("make", [change, pair])
def test_a_change_in_groups_is_block_diagonal(make):
    term = make()
    grouped = in_groups(term, 7)
    assert grouped.shape == (OUT, 7 * IN)
    blocks = term.dense(torch.float64)
    torch.testing.assert_close(grouped.dense(), torch.block_diag(*blocks.split(1)))
    torch.testing.assert_close(grouped.weighed(0.3).blocks(torch.float64), 0.3 * blocks)
    moved = grouped.with_tensors([2 * tensor for tensor in grouped.tensors])
    assert not torch.equal(moved.dense(), grouped.dense())
    assert in_groups(term, 1) is term
