"""Spectra and overlaps against the matrices written out in float64."""

import math

import pytest
import torch

from flat_records import flat_record
from veneer.analyze.overlap import sign_conflict, subspace_overlap
from veneer.analyze.report import compare, describe
from veneer.analyze.spectrum import spectrum, spectrum_of_dense
from veneer.errors import CompositionError, ShapeError
from veneer.records.deltas import LinearDelta


def record(seed: int, r: int = 5, o: int = 13, i: int = 19, scale: float = 1.3) -> LinearDelta:
    g = torch.Generator().manual_seed(seed)
    return flat_record(
        a=torch.randn(r, i, generator=g, dtype=torch.float64),
        b=torch.randn(o, r, generator=g, dtype=torch.float64),
        scale=scale,
    )


def matrix(r: LinearDelta) -> torch.Tensor:
    return r.added()


def test_the_spectrum_is_that_of_the_matrix():
    delta = record(0)
    found, expected = spectrum(delta), torch.linalg.svdvals(matrix(delta))
    torch.testing.assert_close(found.s, expected[:5])
    torch.testing.assert_close(found.u * found.s @ found.vt, matrix(delta))
    assert found.norm == pytest.approx(float(matrix(delta).norm()))
    assert found.energy(2) == pytest.approx(float(expected[:2].square().sum() / expected.square().sum()))


@pytest.mark.parametrize(("values", "rank"), [([3.0, 3.0, 3.0], 3.0), ([7.0, 0.0, 0.0], 1.0), ([0.0, 0.0], 0.0)])
def test_effective_rank_of_flat_single_and_empty_spectra(values, rank):
    assert spectrum_of_dense(torch.diag(torch.tensor(values))).effective_rank == pytest.approx(rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_counts_no_rounding(dtype):
    g = torch.Generator().manual_seed(3)
    b, a = torch.randn(211, 7, generator=g, dtype=dtype), torch.randn(7, 307, generator=g, dtype=dtype)
    assert spectrum_of_dense(b @ a).rank == spectrum(LinearDelta.pair(a, b, 1.3)).rank == 7
    assert spectrum_of_dense(torch.zeros(3, 5, dtype=dtype)).rank == 0


def test_effective_rank_of_a_known_spectrum():
    p = (0.75, 0.25)
    entropy = -sum(x * math.log(x) for x in p)
    assert spectrum_of_dense(torch.diag(torch.tensor([6.0, 2.0]))).effective_rank == pytest.approx(math.exp(entropy))


def test_lines_are_in_the_order_of_a_model():
    found = spectrum(record(0))
    order = ["model.embed_tokens", "layers.2.attn.q_proj", "layers.2.attn.k_proj", "layers.2.attn.o_proj"]
    order += ["layers.2.mlp.gate_proj", "layers.2.mlp.up_proj", "layers.2.mlp.down_proj", "layers.10.attn.q_proj"]
    two_stacks = ["shared", "encoder.block.0.o", "encoder.block.1.q", "decoder.block.0.o", "decoder.block.1.q"]
    for each in ([*order, "lm_head"], [*two_stacks, "classifier"]):
        spectra = dict.fromkeys(sorted(each), found)
        assert [line.path for line in describe(spectra, 2)] == each
        assert [line.path for line in compare(spectra, spectra, 2)] == each


def test_overlap_of_the_same_disjoint_and_nested_directions():
    eye = torch.eye(7, dtype=torch.float64)
    one = spectrum(flat_record(a=eye[:3], b=torch.diag(torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64))))
    same = spectrum(flat_record(a=eye[:2], b=torch.eye(3, dtype=torch.float64)[:, :2] * 4))
    other = spectrum(flat_record(a=eye[4:6], b=torch.eye(3, dtype=torch.float64)[:, :2]))
    assert subspace_overlap(one, same, 3, 2) == pytest.approx(1)
    assert subspace_overlap(one, other, 3, 2) == pytest.approx(0)
    assert subspace_overlap(one, same, 1, 2) == subspace_overlap(one, same, 2, 1) == pytest.approx(1)


def test_sign_conflict_counts_entries_that_both_change():
    a = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, -1.0]])
    b = torch.tensor([[2.0, 5.0, 7.0], [-1.0, 2.0, 0.0]])
    assert sign_conflict(a, b) == pytest.approx(2 / 4)
    assert sign_conflict(a, torch.zeros_like(a)) == 0


def test_what_has_no_spectrum_or_does_not_fit_says_so():
    with pytest.raises(CompositionError, match="without its base"):
        spectrum(flat_record(out_scale=torch.ones(3)))
    with pytest.raises(ShapeError, match="rank 5"):
        subspace_overlap(spectrum(record(1)), spectrum(record(2)), 6, 1)
    with pytest.raises(ShapeError, match="not the same layer"):
        subspace_overlap(spectrum(record(1)), spectrum(record(2, i=17)), 1, 1)
