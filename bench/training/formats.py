"""Training steps and products on bases as people have them, beside NF4.

A step is LoRA of rank 16 on all linear layers, on SmolLM2 whose linear layers are stored in each format. Before it is
timed its blocks must run fused. Logits, gradients and losses are compared with those on the decoded weights.
Products are those of one layer of each shape of the model, with 1024 rows; with a few, by weights packed as they are
served and by weights as they are stored. All formats take turns.

    python -m bench.training.formats [--parts products few step] [--model smollm2-135m-instruct]
        [--dtype float32|bfloat16] [--formats NF4 Q8_0 …] [--rows 4] [--tokens 256] [--repeats 5]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.lora_step import adapted, base_of, optimizer_of, require_fused, step
from bench.same import course, require_same, stir
from bench.turns import Goal, Timing, faster_dtype, in_turns, show, timed
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.ops.bits import pack
from veneer.ops.four_bit import FourBitLayout
from veneer.quant.four_bit import FourBitSpec
from veneer.quant.fp8 import Fp8Spec
from veneer.quant.ggml import GgmlSpec
from veneer.quant.grouped import GroupedSpec
from veneer.quant.mxfp4 import Mxfp4Spec
from veneer.quant.nvfp4 import Nvfp4Spec
from veneer.quant.packing import packed_codes
from veneer.store.source import resolve

CHECKED = (1, 16, 33)  # rows of the products that are compared first
GROUP = 64  # divides 576, SmolLM2's width
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""llama-quantize's type where blocks of 256 do not divide a row."""
BESIDE, ROWS = "NF4", (1, 16)
WHOLE = 256  # inputs of the largest block
LIMIT = {"Q4_K": 1.3, "Q6_K": 1.3}


def ggml(kind: str, weight: Tensor) -> tuple[Any, dict[str, Tensor]]:
    fits = kind not in FALLBACK or weight.shape[1] % 256 == 0
    spec = GgmlSpec(tuple(weight.shape), kind if fits else FALLBACK[kind], weight.dtype)
    return spec, spec.quantize(weight)


def grouped(bits: int, zeros: torch.dtype, weight: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """GPTQ's, AWQ's or HQQ's numbers in memory, rounded to the nearest."""
    (o, i), most = weight.shape, (1 << bits) - 1
    blocks = weight.float().view(o, -1, GROUP)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scales = ((high - low) / most).half()
    zero = (-low / scales.float()).clamp(0, most)
    zero = zero.round().to(zeros) if zeros == torch.uint8 else zero.to(zeros)
    codes = (blocks / scales.float()[:, :, None] + zero.float()[:, :, None]).round().clamp(0, most).to(torch.uint8)
    spec = GroupedSpec(shape=(o, i), bits=bits, group=GROUP, dtype=weight.dtype, zeros=zeros)
    return spec, {"weight": pack(codes.view(o, i), bits), "scales": scales, "zeros": zero}


def of_spec(make: Callable[[Tensor], Any], weight: Tensor) -> tuple[Any, dict[str, Tensor]]:
    spec = make(weight)
    return spec, spec.quantize(weight)


GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
FORMATS: dict[str, Callable[[Tensor], tuple[Any, dict[str, Tensor]]]] = {
    "NF4": partial(of_spec, lambda w: FourBitSpec(FourBitLayout(tuple(w.shape), dtype=w.dtype))),
    **{kind: partial(ggml, kind) for kind in GGML},
    "FP8": partial(of_spec, lambda w: Fp8Spec(tuple(w.shape), w.dtype)),
    "GPTQ 4": partial(grouped, 4, torch.uint8),
    "GPTQ 3": partial(grouped, 3, torch.uint8),
    "GPTQ 8": partial(grouped, 8, torch.uint8),
    "HQQ 4": partial(grouped, 4, torch.float16),
    "MXFP4": partial(of_spec, lambda w: Mxfp4Spec(tuple(w.shape), w.dtype)),
    "NVFP4": partial(of_spec, lambda w: Nvfp4Spec(tuple(w.shape), w.dtype)),
}


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    print(f"{args.model}, {str(args.dtype).removeprefix('torch.')}")
    for part in args.parts:
        {"products": products, "few": few_rows, "step": steps}[part](args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("products", "few", "step"), default=("products", "few", "step"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what this CPU multiplies faster")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype) if args.dtype else faster_dtype()
    args.formats = list(dict.fromkeys([BESIDE, *args.formats]))
    args.place = str(resolve(args.model))
    return args


# Products.


def products(args: argparse.Namespace) -> None:
    """One layer of each shape, as often as a block has it."""
    linears = block_of(args)
    frozen = {name: [bound(name, weight) for weight in linears] for name in args.formats}
    for name, weights in frozen.items():
        check_products(name, weights, args.dtype)
    for transposed in (False, True):
        inputs = [torch.randn(1024, w.shape[0 if transposed else 1]).to(args.dtype) for w in linears]
        ways = {name: partial(timed, partial(multiply, w, inputs, transposed, 1)) for name, w in frozen.items()}
        title = f"the products of a block, 1024 rows{', transposed' * transposed}"
        show(title, in_turns(ways, args.repeats), BESIDE)


def few_rows(args: argparse.Namespace) -> None:
    """The same with inputs cut to whole blocks of every format, beside NF4 as it is served.

    Times are also told for equal bytes: those of the format in its file.
    """
    linears = [weight[:, : weight.shape[1] // WHOLE * WHOLE].contiguous() for weight in block_of(args)]
    frozen = {name: [bound(name, weight) for weight in linears] for name in args.formats}
    packed = {name: [served(name, weight, args.dtype) for weight in weights] for name, weights in frozen.items()}
    nbytes = {name: sum(weight.nbytes for weight in weights) for name, weights in frozen.items()}
    held = {name: sum(weight.nbytes for weight in weights) for name, weights in packed.items()}
    for n in ROWS:
        inputs, calls = [torch.randn(n, w.shape[1]).to(args.dtype) for w in linears], max(1, 256 // n)
        ways = {name: partial(timed, partial(multiply_packed, w, inputs, calls)) for name, w in packed.items()}
        ways |= {
            f"{name}, as stored": partial(timed, partial(multiply, w, inputs, False, calls))
            for name, w in frozen.items()
        }
        found = in_turns(ways, args.repeats)
        show(f"{calls} x the products of a block, {n} rows", found, BESIDE)
        base = found[BESIDE].cpu / nbytes[BESIDE]
        for name in args.formats:
            equal = found[name].cpu / nbytes[name] / base
            bits = held[name] / nbytes[name]
            print(f"{name:8} CPU time for equal bytes {equal:5.2f}x, packed in {bits:.2f}x the bytes of the file")


def block_of(args: argparse.Namespace) -> list[Tensor]:
    """The weights of the linear layers of a block."""
    base = base_of("veneer", "dense", args.place, args.dtype)
    return [layer.weight.detach() for layer in base.model.layers[0].modules() if isinstance(layer, nn.Linear)]


def bound(name: str, weight: Tensor) -> Any:
    spec, parts = FORMATS[name](weight)
    return spec.bind(parts)


def served(name: str, weight: Any, dtype: torch.dtype) -> Any:
    """A weight packed as it is served. SystemExit if its values or its products are not the format's."""
    packed = packed_codes(weight, dtype)
    if packed is None or not torch.equal(packed.dense(torch.float32), weight.dense(torch.float32)):
        raise SystemExit(f"{name}: its values are not packed: nothing to time")
    exact = weight.dense(torch.float32).double()
    for n in CHECKED:
        x = torch.randn(n, weight.shape[1]).to(dtype)
        require_product(name, packed.matmul(x), x.double() @ exact.T)
    return packed


def multiply_packed(weights: list[Any], inputs: list[Tensor], calls: int) -> None:
    for _ in range(calls):
        for weight, x in zip(weights, inputs, strict=True):
            weight.matmul(x)


def multiply(weights: list[Any], inputs: list[Tensor], transposed: bool, calls: int) -> None:
    for _ in range(calls):
        for weight, x in zip(weights, inputs, strict=True):
            weight.multiply(x, transposed)


def check_products(name: str, weights: list[Any], dtype: torch.dtype) -> None:
    """SystemExit if a product is not that with the decoded weight."""
    for weight in weights:
        exact = weight.dense(torch.float32).double()
        for n in CHECKED:
            for transposed in (False, True):
                x = torch.randn(n, weight.shape[0 if transposed else 1]).to(dtype)
                right = x.double() @ (exact if transposed else exact.T)
                require_product(name, weight.multiply(x, transposed), right)


def require_product(name: str, found: Tensor, right: Tensor) -> None:
    error = float((found.double() - right).norm() / right.norm())
    if not error <= (1e-5 if found.dtype == torch.float32 else 8e-3):
        raise SystemExit(f"{name}: a product is off by {error:.1e}: nothing to time")


# Steps.


def steps(args: argparse.Namespace) -> None:
    ways: dict[str, Callable[[], Timing]] = {}
    for name in args.formats:
        model, kinds = stored(name, args)
        require_fused(model)
        ids = tokens(model, args)
        same_on_decoded(name, model, ids[:1, :64], args)
        print(f"{name}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}", flush=True)
        optimizer = optimizer_of(model)
        ways[name] = partial(timed, partial(step, "veneer", model, optimizer, ids))
    goals = {name: Goal(BESIDE, LIMIT.get(name, 1.15)) for name in args.formats if name != BESIDE}
    show(f"a step of {args.rows} x {args.tokens} tokens", in_turns(ways, args.repeats), BESIDE, goals)


def stored(name: str, args: argparse.Namespace, *, decoded: bool = False) -> tuple[Any, Counter[str]]:
    """The model with its linear layers in a format, or decoded from it, adapted; how many are in which kind of it."""
    base, kinds = base_of("veneer", "dense", args.place, args.dtype), Counter[str]()
    for path, layer in list(base.model.named_modules()):
        if isinstance(layer, nn.Linear):
            spec, parts = FORMATS[name](layer.weight.detach())
            coded = QuantLinear(spec, layer.bias)
            coded.fill(spec, parts)
            base.model.set_submodule(path, coded.to_dense(args.dtype) if decoded else coded)
            kinds[getattr(spec, "kind", None) if isinstance(spec, GgmlSpec) else type(spec).__name__] += 1
    torch.manual_seed(1)
    return stir(adapted("veneer", base)), kinds


def tokens(model: Any, args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (args.rows, args.tokens), generator=generator)


def same_on_decoded(name: str, model: Any, ids: Tensor, args: argparse.Namespace) -> None:
    """SystemExit if the model computes something else than on the decoded dense weights."""
    own, exact = (course("veneer", each, ids) for each in (model, stored(name, args, decoded=True)[0]))
    require_same(name, exact, own)
    if not abs(own.losses[0] - exact.losses[0]) <= (1e-5 if model.dtype == torch.float32 else 5e-3) * exact.losses[0]:
        raise SystemExit("the losses part: nothing to time")


if __name__ == "__main__":
    main()
