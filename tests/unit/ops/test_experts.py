"""Experts: choices against transformers' routers, sums against float64, rows that do not depend on their companions."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from veneer.errors import ConfigError, ShapeError
from veneer.ops.experts import MOST_EXPERTS, ExpertSegment, PackedStack, Router, mix, route
from veneer.ops.four_bit import FourBitLayout, quantize_4bit
from veneer.ops.int8 import quantize_int8
from veneer.ops.packed import PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.ops.pairs import PairsPacker

OP = "experts.mix"
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
N_EXPERTS, TOP_K, D, WIDTH = 7, 3, 41, 19


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def draw_mixture(dtype, n, n_experts=N_EXPERTS, d=D, width=WIDTH):
    """Rows, choices that leave out the last expert, their weights, and the matrices of the experts."""
    gate_up, down = (0.3 * draw(n_experts, *shape, dtype=dtype) for shape in ((2 * width, d), (d, width)))
    ids = draw(n, n_experts - 1, seed=1).argsort(dim=1)[:, :TOP_K].contiguous()
    return draw(n, d, dtype=dtype, seed=2), ids, draw(n, TOP_K, seed=3).softmax(-1), gate_up, down


def stacks(*weights, backend):
    return tuple(PackedStack.of(PackedWeight.pack(each, backend=backend) for each in weight) for weight in weights)


def expected(x, ids, weights, gate_up, down, activation="silu"):
    """The sum over experts in float64, of the values rounded where the op rounds them."""
    acts = {"silu": functional.silu, "gelu": functional.gelu}
    y = torch.zeros(x.shape, dtype=torch.float64)
    for row, own in enumerate(x):
        for place, number in enumerate(ids[row].tolist()):
            gate, up = (gate_up[number].double() @ own.double()).to(x.dtype).double().chunk(2)
            acted = (acts[activation](gate) * up).to(x.dtype).double()
            y[row] += weights[row, place].double() * (down[number].double() @ acted).to(x.dtype).double()
    return y


@pytest.mark.looped("activation", ["silu", "gelu"])
@pytest.mark.looped("n", [1, 2, 11, 211])
@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_experts(dtype, n, activation, backend):
    x, ids, weights, gate_up, down = draw_mixture(dtype, n)
    y = mix(x, ids, weights, stacks(gate_up, down, backend=backend), activation, backend=backend)
    right = expected(x, ids, weights, gate_up, down, activation)
    assert y.dtype == dtype
    assert (y.double() - right).abs().max() <= 8 * UNIT[dtype] * right.abs().max()


@pytest.mark.looped("n", [1, 2, 11, 211])
@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_biases_and_clamped_units(dtype, n, backend):
    """gpt-oss: gates alternate with the values that they multiply."""
    x, ids, weights, gate_up, down = draw_mixture(dtype, n)
    biases = draw(N_EXPERTS, 2 * WIDTH, dtype=dtype, seed=4), draw(N_EXPERTS, D, dtype=dtype, seed=5)
    packed = stacks(3 * gate_up, down, backend=backend)
    packed = tuple(replace(stack, bias=bias) for stack, bias in zip(packed, biases, strict=True))
    y = mix(x, ids, weights, packed, "swiglu_oai", backend=backend)
    right = torch.zeros(x.shape, dtype=torch.float64)
    for row, own in enumerate(x.double()):
        for place, number in enumerate(ids[row].tolist()):
            inner = ((3 * gate_up)[number].double() @ own + biases[0][number].double()).to(dtype).double()
            gate, up = inner[::2].clamp(max=7), inner[1::2].clamp(-7, 7)
            acted = ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(dtype).double()
            out = (down[number].double() @ acted + biases[1][number].double()).to(dtype).double()
            right[row] += weights[row, place].double() * out
    assert (y.double() - right).abs().max() <= 8 * UNIT[dtype] * right.abs().max()
    if backend != "reference":
        alone = mix(x[-1:], ids[-1:], weights[-1:], packed, "swiglu_oai", backend=backend)
        assert torch.equal(alone, y[-1:])
    for wrong in (biases[0].double(), biases[0][:, 1:]):
        with pytest.raises(ShapeError, match="bias of experts must be contiguous"):
            mix(x, ids, weights, (replace(packed[0], bias=wrong), packed[1]), "swiglu_oai", backend=backend)


@pytest.mark.looped("gated", [True, False])
@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_expert_is_added_before_the_rounding(dtype, gated, backend):
    x, ids, weights, gate_up, down = draw_mixture(dtype, 23)
    shared, gate = draw(23, 2 * D, dtype=dtype)[:, D:], draw(23, 1, dtype=dtype) if gated else None
    packed = stacks(gate_up, down, backend=backend)
    y = mix(x, ids, weights, packed, "silu", shared=shared, shared_gate=gate, backend=backend)
    factor = gate.double().sigmoid() if gated else 1.0
    right = expected(x, ids, weights, gate_up, down) + factor * shared.double()
    assert (y.double() - right).abs().max() <= 8 * UNIT[dtype] * right.abs().max()


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_among_others(dtype, backend):
    if backend == "reference":
        pytest.skip("torch's products of a row depend on how many rows there are")
    x, ids, weights, gate_up, down = draw_mixture(dtype, 307)
    packed = stacks(gate_up, down, backend=backend)
    together = mix(x, ids, weights, packed, "silu", backend=backend)
    for rows in (slice(0, 1), slice(5, 6), slice(306, 307), slice(3, 40)):
        assert torch.equal(mix(x[rows], ids[rows], weights[rows], packed, "silu", backend=backend), together[rows])


def test_threads_change_no_bit(backend):
    if backend == "reference":
        pytest.skip("the reference is torch's own products")
    x, ids, weights, gate_up, down = draw_mixture(torch.bfloat16, 61)
    packed, before, found = stacks(gate_up, down, backend=backend), torch.get_num_threads(), []
    for n_threads in (1, 2, 3, 8):  # tasks are shared out, and with 8 threads the products
        torch.set_num_threads(n_threads)
        found.append(mix(x, ids, weights, packed, "silu", backend=backend))
    torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def draw_pairs(dtype, ranks, seed, backend, n_experts=N_EXPERTS):
    """Factors of every expert at both layers, and the same packed; rank 0 for none."""
    packer, factors, packed = PairsPacker(backend), [], []
    for number, (r, (o, i)) in enumerate(zip(ranks, ((2 * WIDTH, D), (D, WIDTH)), strict=True)):
        a, b = (0.15 * draw(n_experts, *shape, dtype=dtype, seed=seed + number) for shape in ((r, i), (o, r)))
        factors.append((a, b))
        packed.append(packer.add_experts(a, b, 1.7, dtype) if r else None)
    packer.run()
    return factors, tuple(packed)


SEGMENTS = ((0, 2, (3, 5)), (2, 9, (0, 4)), (13, 200, (6, 0)), (200, 211, (2, 2)))


@pytest.mark.looped("n", [1, 2, 11, 211])
@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_experts_are_added_to_their_own_rows(dtype, n, backend):
    """As weights that are changed row by row would give it."""
    x, ids, weights, gate_up, down = draw_mixture(dtype, n)
    segments, right = [], expected(x, ids, weights, gate_up, down)
    for number, (start, stop, ranks) in enumerate(SEGMENTS):
        start, stop = min(start, n), min(stop, n)
        factors, pairs = draw_pairs(dtype, ranks, 10 * number, backend)
        segments.append(ExpertSegment(pairs, start, stop))
        added = [gate_up.double(), down.double()]
        for place, (a, b) in enumerate(factors):
            added[place] = added[place] + 1.7 * b.double() @ a.double()
        rows = slice(start, stop)
        right[rows] = expected(x[rows], ids[rows], weights[rows], *added)
    packed = stacks(gate_up, down, backend=backend)
    y = mix(x, ids, weights, packed, "silu", segments=segments, backend=backend)
    assert (y.double() - right).abs().max() <= 8 * UNIT[dtype] * right.abs().max()
    for own, start, stop in segments if backend != "reference" else ():
        rows, alone = slice(start, stop), [ExpertSegment(own, 0, stop - start)]
        again = mix(x[rows], ids[rows], weights[rows], packed, "silu", segments=alone, backend=backend)
        assert torch.equal(again, y[rows])
    base = mix(x, ids, weights, packed, "silu", backend=backend)
    assert n < 13 or backend == "reference" or torch.equal(base[9:13], y[9:13])


def test_pairs_of_experts_that_do_not_fit(own_checks):
    x, ids, weights, gate_up, down = draw_mixture(torch.float32, 5)
    packed = stacks(gate_up, down, backend=None)
    _, pairs = draw_pairs(torch.float32, (3, 2), 0, None)
    _, fewer = draw_pairs(torch.float32, (3, 2), 0, None, n_experts=N_EXPERTS - 1)
    _, narrow = draw_pairs(torch.bfloat16, (3, 2), 0, None)
    for own, rows in ((pairs[::-1], (0, 5)), (fewer, (0, 5)), (narrow, (0, 5)), (pairs, (3, 6)), (pairs, (4, 3))):
        with pytest.raises(ShapeError, match="segments of 5 rows follow one another, and their pairs fit stacks"):
            mix(x, ids, weights, packed, "silu", segments=[ExpertSegment(own, *rows)])
    with pytest.raises(ShapeError, match=r"pairs of experts are a \(experts, r, i\)"):
        PairsPacker().add_experts(draw(7, 3, 41), draw(7, 5, 2), 1.0, torch.float32)


def test_no_rows(backend):
    x, ids, weights, gate_up, down = draw_mixture(torch.float32, 0)
    assert mix(x, ids, weights, stacks(gate_up, down, backend=backend), "silu", backend=backend).shape == (0, D)


def test_views_of_rows(backend):
    x, ids, weights, gate_up, down = draw_mixture(torch.float32, 9)
    packed = stacks(gate_up, down, backend=backend)
    wide = torch.cat([x, x], dim=1)
    y = mix(x, ids, weights, packed, "silu", backend=backend)
    assert torch.equal(mix(wide[:, :D], ids, weights, packed, "silu", backend=backend), y)
    assert torch.equal(mix(x.T.contiguous().T, ids.T.contiguous().T, weights, packed, "silu", backend=backend), y)


@pytest.mark.looped("kind", ["nf4", "int8"])
@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_codes_are_those_of_their_values(dtype, kind, backend):
    x, ids, weights, *dense = draw_mixture(dtype, 53, d=48, width=32)

    def packed(weight):
        if kind == "int8":
            return PackedCodes.pack_int8(*quantize_int8(weight.float()), dtype)
        layout = FourBitLayout(tuple(weight.shape), "nf4", 64, dtype)
        return PackedCodes.pack_4bit(*quantize_4bit(weight, "nf4"), layout, dtype)

    coded = tuple(PackedStack.of(packed(each) for each in weight) for weight in dense)
    values = [torch.stack([stack.expert(e).dense() for e in range(N_EXPERTS)]) for stack in coded]
    y = mix(x, ids, weights, coded, "silu", backend=backend)
    right = mix(x, ids, weights, stacks(*values, backend=backend), "silu", backend=backend)
    assert torch.equal(y, right)
    assert coded[0].nbytes < stacks(*values, backend=backend)[0].nbytes


def route_by(values):
    return Router(n_experts=24, top_k=5, values=values, normalized=False, scale=1.7)


@pytest.mark.looped("normalized", [True, False])
@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_softmax_and_the_best_as_transformers_has_them(dtype, normalized, backend):
    config = Qwen3MoeConfig(hidden_size=D, num_experts=13, num_experts_per_tok=4, norm_topk_prob=normalized)
    module, x = Qwen3MoeTopKRouter(config).to(dtype), draw(29, D, dtype=dtype)
    module.weight.data = draw(13, D, dtype=dtype)
    scores, weights, ids = module(x)
    found, own = route(scores.detach(), Router(n_experts=13, top_k=4, normalized=normalized), backend=backend)
    assert torch.equal(found, ids) or dtype == torch.bfloat16  # where two scores are equal, torch chooses any
    torch.testing.assert_close(own, weights.detach().float(), rtol=16 * UNIT[dtype], atol=0)


def test_scores_of_other_floating_point_numbers(backend):
    scores = draw(9, 24).half()
    found, right = (route(each, route_by("softmax"), backend=backend) for each in (scores, scores.float()))
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])


def test_mixtral_chooses_as_it_does(backend):
    module = MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=11, num_experts_per_tok=2))
    module.weight.data = draw(11, D)
    scores, weights, ids = module(draw(31, D))
    found, own = route(scores.detach(), Router(n_experts=11, top_k=2), backend=backend)
    assert torch.equal(found, ids)
    torch.testing.assert_close(own, weights.detach())


@pytest.mark.looped("groups", [(1, 1), (4, 2), (8, 3)])
def test_sigmoids_bias_and_groups_as_deepseek_has_them(groups, backend):
    config = DeepseekV3Config(
        hidden_size=D, n_routed_experts=24, num_experts_per_tok=5, n_group=groups[0], topk_group=groups[1],
        norm_topk_prob=True, routed_scaling_factor=2.5, moe_intermediate_size=8, intermediate_size=8,
    )  # fmt: skip
    module, x = DeepseekV3TopkRouter(config), draw(37, D)
    module.weight.data, module.e_score_correction_bias.data = draw(24, D), 0.3 * draw(24)
    scores, weights, ids = module(x)
    bias = module.e_score_correction_bias
    router = Router(n_experts=24, top_k=5, values="sigmoid", n_groups=groups[0], kept_groups=groups[1], scale=2.5)
    found, own = route(scores.detach(), router, bias, backend=backend)
    by_id = [torch.zeros(37, 24).scatter(1, i, w) for i, w in ((found, own), (ids, weights.detach()))]
    torch.testing.assert_close(*by_id)
    assert not torch.equal(found, route(scores.detach(), router, backend=backend)[0])  # the bias counts


@pytest.mark.looped("values", ["softmax", "sigmoid"])
def test_weights_are_scaled_and_not_normalized(values, backend):
    scores, router = draw(9, 24), route_by(values)
    all_values = scores.softmax(-1) if values == "softmax" else scores.sigmoid()
    ids, weights = route(scores, router, backend=backend)
    torch.testing.assert_close(weights, 1.7 * all_values.sort(descending=True).values[:, :5])
    torch.testing.assert_close(all_values.gather(1, ids) * 1.7, weights)


def test_of_equal_values_the_first_are_chosen(backend):
    scores = torch.zeros(3, 24)
    scores[1, 20] = 1.0
    ids, _ = route(scores, route_by("softmax"), backend=backend)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [20, 0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_a_row_of_nan_chooses_experts_that_exist(backend):
    scores = torch.full((2, 24), torch.nan)
    ids, weights = route(scores, route_by("softmax"), backend=backend)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 24 for row in ids.tolist())
    assert weights.isnan().all()


@pytest.mark.parametrize(
    "numbers",
    [
        {"n_experts": 0},
        {"n_experts": MOST_EXPERTS + 1},
        {"top_k": 0},
        {"top_k": 25},
        {"n_groups": 5},
        {"n_groups": 4, "kept_groups": 5},
        {"n_groups": 8, "kept_groups": 1},
    ],
)
def test_a_router_whose_numbers_do_not_fit(numbers):
    with pytest.raises(ConfigError, match=r"experts .* groups|groups"):
        replace(route_by("softmax"), **numbers)


def test_scores_that_do_not_fit(own_checks):
    for scores, bias in ((draw(3, 23), None), (draw(3, 24).long(), None), (draw(3, 24), torch.zeros(23))):
        with pytest.raises(ShapeError, match="a router of 24 experts takes scores"):
            route(scores, route_by("softmax"), bias)


@pytest.mark.looped("n", [1, 5, 131])
def test_a_row_may_name_an_expert_more_than_once(n, backend):
    x, ids, weights, gate_up, down = draw_mixture(torch.float32, n)
    ids[:] = 3  # more rows of one expert than the batch has
    y = mix(x, ids, weights, stacks(gate_up, down, backend=backend), "silu", backend=backend)
    torch.testing.assert_close(y, expected(x, ids, weights, gate_up, down).to(y.dtype), rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_fit(own_checks):
    x, ids, weights, gate_up, down = draw_mixture(torch.float32, 5)
    packed = stacks(gate_up, down, backend=None)
    wrong = [
        ((x[:, 1:], ids, weights, packed, "silu"), "x must be"),
        ((x.double(), ids, weights, packed, "silu"), "x must be"),
        ((x, ids[1:], weights, packed, "silu"), "experts are chosen by ids"),
        ((x, ids.int(), weights, packed, "silu"), "experts are chosen by ids"),
        ((x, ids, weights.double(), packed, "silu"), "experts are chosen by ids"),
        ((x, ids + N_EXPERTS, weights, packed, "silu"), "there are experts 0 to 6"),
        ((x, ids, weights, packed[::-1], "silu"), "stacks of a mixture"),
    ]
    for given, message in wrong:
        with pytest.raises(ShapeError, match=message):
            mix(*given)
    for beside, message in (
        ({"shared": x[1:]}, "shared must be \\(5, "),
        ({"shared": x, "shared_gate": x}, "shared_gate must be \\(5, 1\\)"),
        ({"shared_gate": x[:, :1]}, "shared_gate multiplies shared, and shared is None"),
    ):
        with pytest.raises(ShapeError, match=message):
            mix(x, ids, weights, packed, "silu", **beside)
    with pytest.raises(ConfigError, match="activation 'relu' is unknown"):
        mix(x, ids, weights, packed, "relu")


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_packed_expert_by_expert(dtype):
    weights = draw(5, 37, 19, dtype=dtype)
    stack = PackedStack.pack(weights)
    assert torch.equal(stack.panels, PackedStack.of(PackedWeight.pack(each) for each in weights).panels)
    assert torch.equal(torch.stack([stack.expert(number).dense() for number in range(5)]), weights)
    assert (stack.shape, stack.dtype, stack.nbytes) == ((5, 37, 19), dtype, stack.panels.nbytes)


def test_a_stack_of_unlike_weights():
    for weights in ([], [PackedWeight.pack(draw(4, 3)), PackedWeight.pack(draw(5, 3))]):
        with pytest.raises(ShapeError, match="one shape and kind"):
            PackedStack.of(weights)
