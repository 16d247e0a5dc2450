"""Weights that each library quantized itself, and what it decodes them to: one small file a library.

python -m venv golden; golden/bin/pip install torch transformers==5.24.0 gguf==0.19.0 LIBRARY
golden/bin/python tests/golden/quantized/make.py transformers|gguf|hqq|compressed_tensors|autoawq|gptqmodel …

``{case}/{part}`` are tensors of a layer by their last names, ``{case}`` is the decoded weight in the library's dtype.
The metadata of a file hold the library's version, and for each case the ``quantization_config`` and the shape.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHAPE = (32, 64)


def weight(seed, shape=SHAPE):
    """Values of a layer, one of them an outlier, in float32."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    values[..., 5, 7] = 0.9
    return values


def save(library, cases, package=None):
    tensors, told = {}, {}
    for name, (config, shape, parts, decoded) in cases.items():
        tensors |= {f"{name}/{part}": tensor.contiguous().clone() for part, tensor in parts.items()}
        tensors[name] = decoded.detach().contiguous().clone()
        told[name] = {"config": config, "shape": list(shape)}
    metadata = {"version": f"{package or library} {version(package or library)}", "cases": json.dumps(told)}
    save_file(tensors, HERE / f"{library}.safetensors", metadata)


def transformers():
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    cases = {}
    for seed, (name, scale_fmt) in enumerate({"fp8 blocks": "float", "fp8 powers of two": "ue8m0"}.items()):
        config = FineGrainedFP8Config(weight_block_size=(16, 32), scale_fmt=scale_fmt)
        quantizer = SimpleNamespace(quantization_config=config)
        made = Fp8Quantize(quantizer).convert({"x.weight": weight(seed)})
        parts = {key.removeprefix("x."): value for key, value in made.items()}
        decoded = Fp8Dequantize(quantizer)._dequantize_one(*parts.values(), torch.float32)
        told = {"quant_method": "fp8", "weight_block_size": [16, 32], "scale_fmt": scale_fmt}
        cases[name] = told, SHAPE, parts, decoded
    generator = torch.Generator().manual_seed(3)
    shape = (2, 24, 64)
    blocks = torch.randint(256, (2, 24, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 250, (2, 24, 2), generator=generator, dtype=torch.uint8)
    decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT
    parts = {"down_proj_blocks": blocks, "down_proj_scales": scales}
    cases["mxfp4 experts"] = {"quant_method": "mxfp4"}, shape, parts, decoded
    save("transformers", cases)


def gguf():
    import gguf as library

    types = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
    types.append("MXFP4")
    # where float16 scales lie in a block that the package decodes and does not quantize
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}
    halves["IQ4_XS"] = (0,)
    writer, decoded = library.GGUFWriter(HERE / "gguf.gguf", "llama"), {}
    for seed, name in enumerate(types):
        kind = library.GGMLQuantizationType[name]
        if name in halves:
            block, n_bytes = library.GGML_QUANT_SIZES[kind]
            rng = np.random.default_rng(seed)
            packed = rng.integers(0, 256, (2, 256 // block * n_bytes), dtype=np.uint8)
            for at in halves[name]:
                for start in range(at, packed.shape[1], n_bytes):
                    scale = rng.normal(0, 0.01, (2, 1)).astype(np.float16)
                    packed[:, start : start + 2] = scale.view(np.uint8)
        else:
            packed = library.quants.quantize(weight(seed, (8, 64)).numpy(), kind)
        decoded[name] = torch.from_numpy(library.quants.dequantize(packed, kind)).contiguous()
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(decoded, HERE / "gguf.safetensors", {"version": f"gguf {version('gguf')}"})


def hqq():
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    cases = {}
    for bits in (8, 4, 3, 2, 1):
        linear = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
        linear.weight.data = weight(bits)
        settings = BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
        layer = HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
        parts = {key: tensor for key, tensor in layer.state_dict().items() if isinstance(tensor, torch.Tensor)}
        weights = {"nbits": bits, "group_size": 32, "channel_wise": True, "optimize": True, "axis": 1}
        params = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None}
        cases[f"{bits} bits"] = {"quant_method": "hqq", "quant_config": params}, SHAPE, parts, layer.dequantize()
    save("hqq", cases)


def compressed_tensors():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    whole = {"num_bits": 4, "type": "int"}
    floats = {"num_bits": 8, "type": "float", "symmetric": True}
    fp4 = {"num_bits": 4, "type": "float", "symmetric": True}
    formats = {
        "4 bits, groups, zeros": (
            "pack-quantized",
            whole | {"symmetric": False, "strategy": "group", "group_size": 16},
        ),
        "4 bits, rows": ("pack-quantized", whole | {"symmetric": True, "strategy": "channel"}),
        "8 bits, rows": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
        "fp8 rows": ("float-quantized", floats | {"strategy": "channel"}),
        "fp8 matrix": ("float-quantized", floats | {"strategy": "tensor"}),
        "fp8 blocks": ("float-quantized", floats | {"strategy": "block", "block_structure": [16, 32]}),
        "nvfp4": ("nvfp4-pack-quantized", fp4 | {"strategy": "tensor_group", "group_size": 16}),
        "mxfp4": ("mxfp4-pack-quantized", fp4 | {"strategy": "group", "group_size": 32}),
    }
    sizes = {"channel": (1, SHAPE[1]), "tensor": SHAPE, "block": (16, 32)}
    cases = {}
    for seed, (name, (layout, settings)) in enumerate(formats.items()):
        args = QuantizationArgs(**settings)
        if layout == "mxfp4-pack-quantized":
            args.scale_dtype = torch.uint8
        height, width = sizes.get(settings["strategy"], (1, settings.get("group_size")))
        values = weight(seed).bfloat16()
        blocks = values.view(SHAPE[0] // height, height, SHAPE[1] // width, width)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        state = {"weight": values}
        if layout == "nvfp4-pack-quantized":
            state["weight_global_scale"] = generate_gparam(low.amin().float(), high.amax().float())
            args.scale_dtype = torch.float8_e4m3fn
        scales, zeros = calculate_qparams(low, high, args, state.get("weight_global_scale"))
        state |= {"weight_scale": scales} | ({} if args.symmetric else {"weight_zero_point": zeros.to(torch.int8)})
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        parts = compressor.compress(state, scheme)
        decoded = compressor.decompress(parts, scheme)["weight"]
        group = {"targets": ["Linear"], "weights": settings}
        config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
        cases[name] = config, SHAPE, parts, decoded
    save("compressed_tensors", cases, "compressed-tensors")


def autoawq():
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    values, group = weight(1).half(), 16
    blocks = values.view(SHAPE[0], -1, group)
    low, high = blocks.amin(2), blocks.amax(2)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-(low / scales).round()).clamp(0, 15)
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False).half()
    linear.weight.data = values
    layer = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    parts = {name: tensor for name, tensor in layer.state_dict().items() if tensor is not None}
    decoded = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group).T
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    save("autoawq", {"4 bits": (config, SHAPE, parts, decoded)})


def gptqmodel():
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    cases, group = {}, 32
    for bits in (2, 3, 4, 8):
        values, n = weight(bits), SHAPE[1] // group
        g_idx = (torch.arange(SHAPE[1]) // group)[
            torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(bits))
        ]
        by_group = [values[:, g_idx == number] for number in range(n)]
        low, high = (torch.stack([getattr(part, end)(1) for part in by_group], 1) for end in ("amin", "amax"))
        scales = ((high - low) / ((1 << bits) - 1)).half().float()
        zeros = (-(low / scales).round()).clamp(0, (1 << bits) - 1)
        linear = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
        linear.weight.data = values
        layer = TorchLinear(bits, group, False, True, SHAPE[1], SHAPE[0])
        layer.pack_original(linear, scales, zeros, g_idx.int())
        layer.post_init()
        names = ("qweight", "qzeros", "scales", "g_idx")
        parts = {name: getattr(layer, name) for name in names}
        settings = {"bits": bits, "group_size": group, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}
        cases[f"{bits} bits"] = {"quant_method": "gptq"} | settings, SHAPE, parts, layer.dequantize_weight().T
    save("gptqmodel", cases)


if __name__ == "__main__":
    for library in sys.argv[1:]:
        globals()[library]()
