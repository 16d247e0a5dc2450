"""Every CPU kernel, with each tensor that it takes replaced by one that has no plain values in memory.

And one Triton kernel, since all are started in one place. Prints a line of JSON for each: back end, op, index of the
argument, kind of tensor, and the message of the TensorError, or "no error". Any other error ends the script.
"""

import functools
import json
import os
import warnings
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as tree

from veneer.errors import TensorError
from veneer.ops.adamw import AdamWStep, Moment8bit
from veneer.ops.blockwise import dynamic_map
from veneer.ops.cpu.module import kernels
from veneer.ops.cpu.step import StepNorm, StepProgram, layer_parts, norm_parts
from veneer.ops.dispatch import backends, implementation
from veneer.ops.experts import ExpertSegment, PackedStack, Router
from veneer.ops.four_bit import FourBitLayout, quantize_4bit
from veneer.ops.grouped_low_rank import AdapterRuns, LowRankGroup, Run
from veneer.ops.int8 import quantize_int8
from veneer.ops.packed import PackedWeight
from veneer.ops.packed_codes import PackedCodes
from veneer.ops.paged_attention import PagedRows, PagedStore
from veneer.ops.pairs import FactorPair, PackedPairs, Segment, Segments
from veneer.ops.scaled import ScaledCodes
from veneer.ops.state.conv import ConvKernel, GatedInput
from veneer.ops.state.delta import DeltaInput, DeltaWeights, StateShape, StateStore
from veneer.ops.state.scan import ScanInput
from veneer.ops.state.windows import WindowStore
from veneer.ops.terms import PackedTerm
from veneer.records.terms.form import Form

N, D, OUT, R, HEADS = 6, 64, 128, 2, 2


def cases():
    """Op, and what it takes: tensors may lie in tuples and in the two classes below."""
    x, y, wide, w = torch.randn(N, D), torch.randn(N, D), torch.randn(N, OUT), torch.randn(D)
    rows = torch.arange(N)
    yield "activation.activation_forward", (x, "relu")
    yield "activation.activation_backward", (y, x, "relu")
    yield "adamw.adamw_8bit_", (x, y, (moment(x), moment(x)), AdamWStep(1e-3, (0.9, 0.99), 1e-8, 0.01, 3))
    heads, lse, bounds = torch.randn(N, HEADS, 8), torch.randn(HEADS, N), torch.tensor([0, 2, N])
    numbers = (0.3, 0, 0.0)
    yield "attention.attention_forward", (heads, heads.clone(), heads.clone(), Plain(bounds), *numbers)
    given = [heads.clone() for _ in range(4)]
    yield "attention.attention_backward", (heads, *given, lse, Plain(bounds), *numbers)
    kernel, previous = Plain(ConvKernel(torch.randn(D, 3))), torch.arange(-1, N - 1, dtype=torch.int32)
    gated = GatedInput(x, x.clone(), x.clone())
    yield "conv.conv_forward", (gated, kernel, previous)
    yield "conv.conv_backward", (y, gated, kernel, previous, (False, False))
    windows = WindowStore.zeros(1, 1, 16, D, dtype=torch.float32)
    yield "conv.windowed_conv", (windows, 0, gated, kernel, Plain(PagedRows.of([([0], 0, N)], windows)))
    yield "cross_entropy.softmax_cross_entropy", (x, rows, None, True)
    yield "dropout.drop", (x, 30000, 7, rows)
    yield "experts.route", (torch.randn(N, 8), Plain(Router(n_experts=8, top_k=2)), torch.randn(8))
    stacks = PackedStack.pack(torch.randn(3, 2 * R, D)), PackedStack.pack(torch.randn(3, D, R))
    chosen = torch.tensor([[0, 2]] * N)
    shared, segments = (y, torch.randn(N, 1)), Plain([ExpertSegment((None, None), 0, N)])
    yield "experts.mix", (x, chosen, torch.rand(N, 2), stacks, "silu", shared, segments)
    yield "glu.glu_forward", (x, y, "silu")
    yield "glu.clamped_forward", (x,)
    yield "glu.clamped_backward", (torch.randn(N, D // 2), x)
    yield "glu.glu_backward", (x, y, x.clone(), "silu", (True, True))
    group = LowRankGroup((torch.randn(R, D),), (torch.randn(OUT, R),), (0.5,))
    runs = AdapterRuns((Run(0, 0, N),), N)
    yield "grouped_low_rank.forward", (x, [group], runs, [wide])
    u = implementation("grouped_low_rank.forward", x.device, "cpu")(x, [group], runs, [wide])
    yield "grouped_low_rank.backward", ([wide], x, u, [group], runs, True)
    yield "int8.quantize_int8", (torch.randn(OUT, D),)
    yield "int8.dequantize_int8", (*quantize_int8(torch.randn(OUT, D)), torch.float32)
    yield "norm.rms_norm_forward", (x, w, 1e-5, 0.5)
    yield "norm.layer_norm_forward", (x, w, w.clone(), 1e-5)
    rstd = torch.ones(N)
    yield "norm.rms_norm_backward", (x, y, w, rstd, 0.5, True)
    yield "norm.layer_norm_backward", (x, y, w, rstd, rstd.clone(), True)
    angles = torch.randn(1, N, 4)
    yield "sample.likeliest", (x,)
    yield "scale.forward", (x, w, w.clone(), y)
    yield "scale.backward", (x, y, w, x.clone(), True)
    yield "rotary.rotate", (torch.randn(2, HEADS, N, 8), angles, angles.clone(), False, True, False)
    yield from coded_cases(x, wide)
    yield from term_cases(x, y, w)
    yield from serving_cases(x, w, wide)


def coded_cases(x, wide):
    """As `cases`, of values in codes."""
    flat, codes, absmax = torch.randn(N * D), torch.zeros(N * D, dtype=torch.uint8), torch.ones(6)
    yield "blockwise.quantize_blockwise", (flat, dynamic_map().clone(), 64)
    yield "blockwise.dequantize_blockwise", (codes, absmax, dynamic_map().clone(), 64, torch.float32, None)
    layout = FourBitLayout((OUT, D), "nf4", 64, torch.float32)
    packed = quantize_4bit(torch.randn(OUT, D), "nf4")
    yield "four_bit.quantize_4bit", (torch.randn(OUT * D), layout)
    yield "four_bit.dequantize_4bit", (*packed, layout, torch.float32)
    for op, rows_of_16_bits in (("matmul_4bit", x.bfloat16()), ("matmul_t_4bit", wide.bfloat16())):
        in_kernel = kernels().four_bit_has_product(N, D, 64, op == "matmul_t_4bit")
        yield f"four_bit.{op}", (rows_of_16_bits if in_kernel else Plain(rows_of_16_bits), *packed, layout)
    yield "ggml.quantize", (torch.randn(N, 256), "Q4_K", torch.rand(256))
    small = ScaledCodes(
        torch.zeros(OUT, D, dtype=torch.uint8),
        torch.ones(OUT, 2),
        D,
        32,
        zeros=torch.ones(OUT, 2),
        overall=torch.ones(()),
    )
    yield "scaled.decode", (small, slice(0, OUT))
    yield "scaled.matmul", (x, small)


def term_cases(x, y, w):
    """As `cases`, of the terms of records."""
    yield "terms.apply", (PackedTerm("blocks", (D // 16, 16), torch.randn(D // 16, 16, 16)), x, y, True)
    places = torch.cat([torch.arange(D + 1), torch.arange(D)]).int()
    yield "terms.apply", (PackedTerm("sparse", (D, D), w.clone(), places), x, y, False)
    form = Form("kronecker", (4, 4, 16, 16), torch.randn(4, 4), torch.randn(16, 16))
    for each in (form, Form("sparse", (D, D), w.clone(), places=torch.arange(D))):
        yield "terms.map_rows", (each, x, y, False, False)
        yield "terms.gradients", (each, y, x)
    multiplies = Form("hadamard", (N, D, R), torch.randn(R, D), torch.randn(N, R))
    yield "terms.entries", (multiplies, x)
    yield "terms.entry_gradients", (multiplies, x, y)
    factors = torch.randn(R * (D + OUT))
    yield "terms.make", (PackedTerm("hadamard", (OUT, D, R), factors), PackedWeight.pack(torch.randn(OUT, D)))


def serving_cases(x, w, wide):
    """As `cases`, of the kernels that serve."""
    heads, numbers = torch.randn(N, HEADS, 8), (0.3, 0, 0.0)
    layout = FourBitLayout((OUT, D), "nf4", 64, torch.float32)
    packed = quantize_4bit(torch.randn(OUT, D), "nf4")
    flat_panels = PackedWeight.pack(torch.randn(OUT, D)).panels
    yield "packed.pack", (torch.randn(OUT, D), D)
    yield "packed.unpack", (flat_panels, Plain((OUT, D)), D)
    yield "packed.matmul", (PackedWeight(flat_panels, (OUT, D)), x, wide, wide.clone())
    coded = PackedCodes.pack_4bit(*packed, layout, torch.float32)
    yield "packed_codes.pack_4bit", (Plain(coded), packed[0].reshape(-1), packed[1], layout.block_size)
    yield "packed_codes.pack_int8", (Plain(replace(coded, coding="int8", unit=D)), *quantize_int8(torch.randn(OUT, D)))
    yield "packed_codes.codes", (coded,)
    yield "packed_codes.dense", (coded,)
    yield "packed_codes.matmul", (coded, x, wide, wide.clone())
    store = PagedStore.zeros(2, 16, (1, HEADS, 8), dtype=torch.float32)
    step = PagedRows.of([([1], 3, N)], store)
    yield "paged_attention.append", (store, 0, heads, heads.clone(), Plain(step))
    yield "paged_attention.attend", (store, 0, heads, Plain(step), *numbers, torch.randn(HEADS, 16), torch.randn(HEADS))
    pairs = PackedPairs.pack([FactorPair(torch.randn(R, D), torch.randn(OUT, R), 0.5)], [OUT], dtype=torch.float32)
    yield "pairs.add", (x, Plain(Segments.of([Segment(pairs, 0, N)])), [wide])
    shape = StateShape(1, HEADS, 4, D // HEADS, 3)
    inner = DeltaInput(*(torch.randn(N, 1, width) for width in (4, 4, D, D, HEADS, HEADS)))
    held = ConvKernel(torch.randn(shape.conv_width, 3), None, "silu"), torch.randn(D // HEADS), 1e-6
    states, own = StateStore.zeros(1, 1, 16, shape), DeltaWeights(*held, torch.rand(HEADS), torch.randn(HEADS))
    yield "delta.delta_in_pages", (states, 0, inner, Plain(own), Plain(PagedRows.of([([0], 0, N)], states)))
    scanned = ScanInput(heads, heads.clone(), heads.clone(), torch.randn(N, HEADS), torch.rand(N, HEADS))
    yield "scan.scan", (scanned, Plain(torch.tensor([0, 2, N])), True, None)
    yield "step.add_norm", (w,)
    yield "step.add_product", (flat_panels,)


class Plain:
    """Tensors that torch reads and no kernel does, or what is made by its owner out of tensors of its own."""

    def __init__(self, tensor):
        self.tensor = tensor


def moment(x):
    return Moment8bit(torch.zeros(x.numel(), dtype=torch.uint8), torch.zeros(-(-x.numel() // 256)))


tree.register_pytree_node(PackedWeight, lambda p: ([p.panels], p.shape), lambda t, shape: PackedWeight(t[0], shape))
tree.register_pytree_node(PackedStack, lambda s: ([s.panels], s), lambda t, s: replace(s, panels=t[0]))
tree.register_pytree_node(
    PackedTerm, lambda t: ([t.values, t.index], t), lambda t, term: replace(term, values=t[0], index=t[1])
)
tree.register_pytree_node(
    Form, lambda f: ([f.values, f.second, f.places], f), lambda t, f: replace(f, values=t[0], second=t[1], places=t[2])
)
tree.register_pytree_node(PackedCodes, lambda p: ([p.panels], p), lambda t, p: replace(p, panels=t[0]))
tree.register_pytree_node(
    ScaledCodes,
    lambda w: ([w.codes, w.scales, w.zeros, w.overall], w),
    lambda t, w: replace(w, codes=t[0], scales=t[1], zeros=t[2], overall=t[3]),
)
tree.register_pytree_node(GatedInput, lambda g: ([g.x, g.before, g.after], None), lambda t, _: GatedInput(*t))
tree.register_pytree_node(DeltaInput, lambda d: (list(d.tensors), None), lambda t, _: DeltaInput(*t))
tree.register_pytree_node(ScanInput, lambda s: (list(s.tensors), None), lambda t, _: ScanInput(*t))
tree.register_pytree_node(StateStore, lambda s: ([s.data], s), lambda t, s: replace(s, data=t[0]))
tree.register_pytree_node(WindowStore, lambda s: ([s.data], s), lambda t, s: replace(s, data=t[0]))
tree.register_pytree_node(PagedStore, lambda s: ([s.data], s), lambda t, s: replace(s, data=t[0]))
tree.register_pytree_node(Moment8bit, lambda m: ([m.codes, m.absmax], None), lambda parts, _: Moment8bit(*parts))
tree.register_pytree_node(LowRankGroup, lambda g: ([*g.a, *g.b], g), lambda ab, g: replace(g, a=(ab[0],), b=(ab[1],)))


def add_norm(weight):
    StepProgram(torch.float32).add("norm", norm_parts(StepNorm(weight, None, 1e-5, False)), 0, 0)


def add_product(panels):
    StepProgram(torch.float32).add("product", [layer_parts(PackedWeight(panels, (OUT, D)), None, 1)], 0, 0, 0, -1, -1)


# A program's instructions are no ops of their own: each is added to a program.
INSTRUCTIONS = {"step.add_norm": add_norm, "step.add_product": add_product}


@functools.cache
def mesh():
    return init_device_mesh("cpu", (1,))


def odd_tensors(x):
    """Kind and tensor: as x to whoever asks for shape, dtype and device, but for "meta"."""
    yield "fake", FakeTensorMode().from_tensor(x)
    yield "distributed", DTensor.from_local(x.clone(), mesh(), [Replicate()])
    yield "wrapped", TwoTensor(x.clone(), x.clone())
    yield "functional", torch._to_functional_tensor(x.clone())
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    yield "freed", freed
    level = torch._C._functorch._vmap_increment_nesting(3, "error")
    yield "batched", torch._C._functorch._add_batch_dim(torch.stack([x] * 3), 0, level)
    torch._C._functorch._vmap_decrement_nesting()
    if x.dtype.is_floating_point:
        yield "negated", torch._neg_view(x.clone())
    yield "meta", x.to("meta")


def main():
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for op, args in cases():
        for backend in ("cpu", "triton") if op == "glu.glu_forward" and "triton" in backends(op) else ("cpu",):
            ask(backend, op, args)
    dist.destroy_process_group()


def ask(backend, op, args):
    leaves, shape = tree.tree_flatten(args)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            for kind, odd in odd_tensors(leaf):
                given = tree.tree_unflatten([*leaves[:place], odd, *leaves[place + 1 :]], shape)
                given = tree.tree_map(lambda t: t.tensor if isinstance(t, Plain) else t, given)
                print(json.dumps([backend, op, place, kind, outcome(backend, op, given)]), flush=True)


def outcome(backend, op, args):
    try:
        (INSTRUCTIONS.get(op) or implementation(op, torch.device("cpu"), backend))(*args)
    except TensorError as error:
        return str(error)
    return "no error"


main()
