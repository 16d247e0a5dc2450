"""Tiny models in the formats of other libraries, each beside a dense twin that holds what its codes stand for.

The codes are random. What they stand for is computed here by the formula of each library, without veneer's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from models import byte_tokenizer, llama_config

Encoded = tuple[dict[str, Tensor], Tensor]
"""Tensors of a layer by their last names, and the dense weight in float32."""


@dataclass(frozen=True)
class Stored:
    """Format of a folder: its ``quantization_config``, and a layer in it, made of a generator and a shape."""

    config: dict[str, Any]
    encode: Callable[[torch.Generator, tuple[int, int]], Encoded]
    left_out: tuple[str, ...] = field(default=("lm_head",))
    beside: tuple[str, ...] = ()
    """Scales of activations, which no value depends on."""


def e4m3(code: int) -> float:
    """Value of an 8-bit float with four bits of exponent and three of mantissa (OCP OFP8, section 5.3)."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e5m2(code: int) -> float:
    """Value of an 8-bit float with five bits of exponent and two of mantissa; infinity counts as NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 2) & 0x1F, code & 3
    if exponent == 31:
        return float("nan")
    return sign * (mantissa / 4 * 2**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15))


FP8_VALUES = {
    torch.float8_e4m3fn: torch.tensor([e4m3(code) for code in range(256)]),
    torch.float8_e5m2: torch.tensor([e5m2(code) for code in range(256)]),
}


def random_codes(generator: torch.Generator, shape: tuple[int, ...], n: int) -> Tensor:
    return torch.randint(n, shape, generator=generator, dtype=torch.int64)


def random_scales(generator: torch.Generator, shape: tuple[int, ...], size: float = 0.01) -> Tensor:
    return (torch.rand(shape, generator=generator) + 0.5) * size


def fp8_codes(generator: torch.Generator, shape: tuple[int, int], kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random codes of moderate values, and the values."""
    values = FP8_VALUES[kind]
    allowed = (values.abs() <= 8).nonzero()[:, 0]
    codes = allowed[random_codes(generator, shape, len(allowed))]
    return codes.to(torch.uint8).view(kind), values[codes]


def fp8(block: tuple[int, int] | None, kind: torch.dtype = torch.float8_e4m3fn) -> Stored:
    """``quant_method: fp8``. ``block`` None: a scale for the matrix."""

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        codes, values = fp8_codes(generator, shape, kind)
        height, width = block or shape
        grid = (-(-shape[0] // height), -(-shape[1] // width)) if block else ()
        scale = random_scales(generator, grid)
        rows, columns = torch.arange(shape[0]) // height, torch.arange(shape[1]) // width
        wide = scale[rows[:, None], columns] if block else scale
        return {"weight": codes, "weight_scale_inv": scale}, values * wide

    config = {"quant_method": "fp8", "weight_block_size": block and list(block), "activation_scheme": "dynamic"}
    config |= {"fmt": "e4m3" if kind == torch.float8_e4m3fn else "e5m2", "modules_to_not_convert": ["gate_proj"]}
    return Stored(config, encode, ("gate_proj",))


def words(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers packed along the rows of a matrix into words of 32 bits: a stream of bits, the lowest first."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << bits * place for place, code in enumerate(row))
        rows.append([(stream >> 32 * word) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    found = torch.tensor(rows)
    return torch.where(found < 1 << 31, found, found - (1 << 32)).to(torch.int32)


def gptq(bits: int, group: int, layout: str, shuffled: bool) -> Stored:
    """``quant_method: gptq``: ``(q - zero) * scale``; ``shuffled`` puts inputs into groups at random."""

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        o, i = shape
        size = i if group == -1 else group
        g_idx = torch.arange(i) // size
        g_idx = g_idx[torch.randperm(i, generator=generator)] if shuffled else g_idx
        codes = random_codes(generator, (i, o), 1 << bits)
        zeros = random_codes(generator, (i // size, o), 1 << bits)
        scales = random_scales(generator, (i // size, o), 0.08 / (1 << bits)).half()
        stored = zeros - 1 & (1 << bits) - 1 if layout == "gptq" else zeros
        parts = {
            "qweight": words(codes.T, bits).T,
            "qzeros": words(stored, bits),
            "scales": scales,
            "g_idx": g_idx.to(torch.int32),
        }
        return parts, ((codes - zeros[g_idx]).half() * scales[g_idx]).T.float()

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": False}
    config |= {"checkpoint_format": layout, "damp_percent": 0.1, "dynamic": {r"-:.*\.1\.self_attn\.k_proj": {}}}
    return Stored(config, encode, ("lm_head", ".1.self_attn.k_proj"))


def awq(group: int) -> Stored:
    """``quant_method: awq``: eight outputs a word, whose nibbles hold outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    outputs = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def placed(codes: Tensor) -> Tensor:
        return words(codes.view(len(codes), -1, 8)[:, :, outputs].reshape(len(codes), -1), 4)

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        o, i = shape
        codes, zeros = random_codes(generator, (i, o), 16), random_codes(generator, (i // group, o), 16)
        scales = random_scales(generator, (i // group, o), 0.005).half()
        weight = (codes - zeros.repeat_interleave(group, 0)).half() * scales.repeat_interleave(group, 0)
        return {"qweight": placed(codes), "qzeros": placed(zeros), "scales": scales}, weight.T.float()

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Stored(config | {"modules_to_not_convert": ["o_proj"]}, encode, ("lm_head", "o_proj"))


def compressed(layout: str, encode: Callable[..., Encoded], activations: bool = False, **weights: Any) -> Stored:
    """``quant_method: compressed-tensors`` with one group of settings; a pattern and a name are ignored."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "observer": "minmax", **weights}}
    group["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True} if activations else None
    ignore = ["lm_head", "re:.*gate_proj"]
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
    return Stored(config | {"ignore": ignore, "quantization_status": "compressed"}, encode, ("lm_head", "gate_proj"))


def pack_quantized(bits: int, group: int) -> Stored:
    """Zeros, and groups in any order: ``(q - zero) * scale`` in bfloat16, signed numbers with an offset in the file."""
    offset = 1 << bits - 1

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        o, i = shape
        g_idx = (torch.arange(i) // group)[torch.randperm(i, generator=generator)]
        codes, zeros = (random_codes(generator, size, 1 << bits) - offset for size in ((o, i), (o, i // group)))
        scales = random_scales(generator, (o, i // group), 0.08 / (1 << bits)).bfloat16()
        parts = {
            "weight_packed": words(codes + offset, bits),
            "weight_zero_point": words((zeros + offset).T, bits).T,
            "weight_scale": scales,
            "weight_g_idx": g_idx.to(torch.int32),
            "weight_shape": torch.tensor(shape),
        }
        return parts, ((codes - zeros[:, g_idx]).bfloat16() * scales[:, g_idx]).float()

    return compressed(
        "pack-quantized", encode,
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group, actorder="group",
    )  # fmt: skip


def int_quantized(layout: str = "int-quantized") -> Stored:
    """Eight bits and a scale a row, as bytes with a sign."""

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        codes = random_codes(generator, shape, 256) - 128
        scales = random_scales(generator, (shape[0], 1), 0.0004).bfloat16()
        return {"weight": codes.to(torch.int8), "weight_scale": scales}, (codes.bfloat16() * scales).float()

    return compressed(layout, encode, activations=True, num_bits=8, type="int", symmetric=True, strategy="channel")


def float_quantized(strategy: str = "channel", layout: str = "float-quantized") -> Stored:
    """FP8 and a scale a row, matrix or block of 20 by 36; the product is rounded to the scale's bfloat16."""

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        codes, values = fp8_codes(generator, shape, torch.float8_e4m3fn)
        height, width = {"channel": (1, shape[1]), "tensor": shape, "block": (20, 36)}[strategy]
        scales = random_scales(generator, (-(-shape[0] // height), -(-shape[1] // width))).bfloat16()
        wide = scales[torch.arange(shape[0])[:, None] // height, torch.arange(shape[1]) // width]
        held = scales.view(1) if strategy == "tensor" else scales
        return {"weight": codes, "weight_scale": held}, (values.bfloat16() * wide).float()

    block = {"block_structure": [20, 36]} if strategy == "block" else {}
    return compressed(
        layout, encode, activations=True, num_bits=8, type="float", symmetric=True, strategy=strategy, **block
    )


def fp8_of_a_matrix(modelopt: bool) -> Stored:
    """FP8 with ``weight_scale``, one number, and a scale of activations: ModelOpt's and AutoFP8's."""

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        codes, values = fp8_codes(generator, shape, torch.float8_e4m3fn)
        scale = random_scales(generator, ())
        return {"weight": codes, "weight_scale": scale}, values * scale

    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    if modelopt:
        config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    return Stored(config, encode, beside=("input_scale",))


def two_groups() -> Stored:
    """Whole numbers, and FP8 in the layers of an MLP, which alone are 160 wide here."""
    whole, floats = pack_quantized(4, 16), float_quantized()
    groups = {"all": whole.config["config_groups"]["group_0"] | {"format": "pack-quantized"}}
    groups["mlp"] = floats.config["config_groups"]["group_0"] | {"format": "float-quantized"}
    groups["mlp"]["targets"] = [r"re:.*\.mlp\..*"]

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        return (floats if 160 in shape else whole).encode(generator, shape)

    config = whole.config | {"format": "mixed-precision", "config_groups": groups}
    return Stored(config, encode, whole.left_out)


FP4_VALUES = torch.tensor([sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])


def nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low half."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def mxfp4() -> Stored:
    """Blocks of 32, whose scale is a power of two: ``2 ** (byte - 127)``."""

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        o, i = shape
        codes, powers = random_codes(generator, shape, 16), 117 + random_codes(generator, (o, i // 32), 5)
        weight = FP4_VALUES[codes] * (2.0 ** (powers - 127)).repeat_interleave(32, 1)
        return {"weight_packed": nibbles(codes), "weight_scale": powers.to(torch.uint8)}, weight

    return compressed(
        "mxfp4-pack-quantized", encode, num_bits=4, type="float", symmetric=True, strategy="group", group_size=32
    )


def nvfp4(modelopt: bool) -> Stored:
    """Blocks of 16 with a scale in E4M3. compressed-tensors divides all by one number, ModelOpt multiplies."""

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        o, i = shape
        codes, scale_codes = random_codes(generator, shape, 16), 64 + random_codes(generator, (o, i // 16), 32)
        overall = 900 * random_scales(generator, (1,), 1.0)
        scales = FP8_VALUES[torch.float8_e4m3fn][scale_codes]
        scales = scales * (1 / overall) if modelopt else scales / overall
        parts = {
            "weight" if modelopt else "weight_packed": nibbles(codes),
            "weight_scale": scale_codes.to(torch.uint8).view(torch.float8_e4m3fn),
            "weight_scale_2" if modelopt else "weight_global_scale": (1 / overall).view(()) if modelopt else overall,
        }
        return parts, FP4_VALUES[codes] * scales.repeat_interleave(16, 1)

    if modelopt:
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.up_*"]}
        return Stored(config, encode, ("lm_head", "up_proj"))
    return compressed(
        "nvfp4-pack-quantized", encode, num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16
    )


def hqq(bits: int, group: int, kind: torch.dtype = torch.float32) -> Stored:
    """``quant_method: hqq``: a row of ``W_q`` is a group; parts of the rows lie above one another in a word."""
    packings = {1: ("1bit_u8", 8, 1), 2: ("2bit_u8", 4, 2), 3: ("3bit_32", 10, 3), 4: ("4bit_u8", 2, 4)}
    name, per_word, step = packings.get(bits, ("8bit_u8", 1, 8))
    dtype = torch.int32 if bits == 3 else torch.uint8

    def encode(generator: torch.Generator, shape: tuple[int, int]) -> Encoded:
        n_rows = shape[0] * shape[1] // group
        codes = random_codes(generator, (n_rows, group), 1 << bits)
        scale = random_scales(generator, (n_rows, 1), 0.08 / (1 << bits)).to(kind)
        zero = (torch.rand((n_rows, 1), generator=generator) * (1 << bits)).to(kind)
        filled = torch.zeros(-(-n_rows // per_word) * per_word, group, dtype=torch.int64)
        filled[:n_rows] = codes
        packed = sum(part << step * (per_word - 1 - at) for at, part in enumerate(filled.chunk(per_word)))
        parts = {"W_q": packed.to(dtype), "scale": scale, "zero": zero, "shape": torch.tensor(shape)}
        numbers = {"nbits": bits, "group_size": group, "axis": 1}
        flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "channel_wise": 1, "optimize": 1}
        flags |= {"round_zero": 0, "offload_meta": 0, "encoded_state_dict": 1, "stores_quant_config": 1}
        texts = {"packing": name, "unpack_view_dtype": str(dtype), "compute_dtype": str(kind)}
        parts |= {key: torch.tensor(value, dtype=torch.int32) for key, value in numbers.items()}
        parts |= {key: torch.tensor(value, dtype=torch.uint8) for key, value in flags.items()}
        parts |= {key: torch.tensor([ord(each) for each in text], dtype=torch.uint8) for key, text in texts.items()}
        return parts, ((codes.to(kind) - zero) * scale).float().view(shape)

    weights = {"nbits": bits, "group_size": group, "channel_wise": True, "optimize": True, "axis": 1}
    settings = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None}
    config = {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head", "v_proj"]}
    return Stored(config, encode, ("lm_head", "v_proj"))


FORMATS: dict[str, Stored] = {
    "fp8 blocks": fp8((20, 36)),
    "fp8 e5m2": replace(fp8(None, torch.float8_e5m2), beside=("activation_scale",)),
    "gptq 4": gptq(4, 32, "gptq", shuffled=True),
    "gptq 3 v2": gptq(3, -1, "gptq_v2", shuffled=False),
    "awq": awq(16),
    "pack-quantized": pack_quantized(4, 16),
    "int-quantized": int_quantized(),
    "float-quantized": float_quantized(),
    "mxfp4": mxfp4(),
    "nvfp4": replace(nvfp4(modelopt=False), beside=("input_global_scale",)),
    "modelopt": replace(nvfp4(modelopt=True), beside=("input_scale", "k_scale")),
    "hqq 4": hqq(4, 32),
    "hqq 3": hqq(3, 16),
}


SELDOM: dict[str, Stored] = {
    "float-quantized by matrices": float_quantized("tensor"),
    "float-quantized by blocks": float_quantized("block"),
    "naive floats": float_quantized(layout="naive-quantized"),
    "naive whole numbers": int_quantized("naive-quantized"),
    "modelopt fp8": fp8_of_a_matrix(modelopt=True),
    "autofp8": fp8_of_a_matrix(modelopt=False),
    "two groups": two_groups(),
}
"""Variants of formats: read, described and saved."""


def base_config() -> PreTrainedConfig:
    """A Llama of two layers, whose widths all formats can hold."""
    return llama_config(
        vocab_size=271, hidden_size=96, intermediate_size=160, num_attention_heads=3, tie_word_embeddings=False
    )


def make_folder(
    stored: Stored, folder: Path, dtype: torch.dtype = torch.float32, config: PreTrainedConfig | None = None
) -> None:
    """Write ``folder/coded``, a model in a format, and ``folder/dense``, its twin."""
    config = config or base_config()
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder / "dense")
    model.save_pretrained(folder / "coded")
    dense = load_file(folder / "dense" / "model.safetensors")
    coded: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(11)
    for name, tensor in dense.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and layer.endswith("_proj") and not layer.endswith(stored.left_out):
            parts, weight = stored.encode(generator, (tensor.shape[0], tensor.shape[1]))
            parts |= {name: random_scales(generator, (1,)) for name in stored.beside}
            coded |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
            dense[name] = weight.to(dtype).contiguous()
        else:
            coded[name] = tensor
    save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    save_file(coded, folder / "coded" / "model.safetensors", {"format": "pt"})
    path = folder / "coded" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored.config}))
    for each in ("dense", "coded"):
        byte_tokenizer().save_pretrained(folder / each)


def qwen3_moe_config(n_layers: int = 1, n_experts: int = 3) -> PreTrainedConfig:
    """Experts that are listed one by one in files, whose widths all formats can hold."""
    return Qwen3MoeConfig(
        vocab_size=67, hidden_size=64, intermediate_size=128, moe_intermediate_size=96, num_hidden_layers=n_layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=n_experts, num_experts_per_tok=2,
    )  # fmt: skip


def deepseek_config() -> PreTrainedConfig:
    """A dense layer, and one of five experts and a shared one; no width is a multiple of a block."""
    return DeepseekV3Config(
        vocab_size=67, hidden_size=52, intermediate_size=70, moe_intermediate_size=30, num_hidden_layers=2,
        first_k_dense_replace=1, n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3, n_shared_experts=1,
        num_attention_heads=3, num_key_value_heads=3, q_lora_rank=26, kv_lora_rank=22, qk_rope_head_dim=6,
        qk_nope_head_dim=10, v_head_dim=14, routed_scaling_factor=1.3, max_position_embeddings=64,
    )  # fmt: skip


def deepseek_fp8() -> Stored:
    """Blocks of 20 by 36 in every projection whose name ends so; gate ends within a block."""
    found = fp8((20, 36))
    config = found.config | {"modules_to_not_convert": ["kv_a_proj_with_mqa", "lm_head"]}
    return replace(found, config=config, left_out=("lm_head",))


def gpt_oss_config(n_layers: int = 2) -> PreTrainedConfig:
    return GptOssConfig(
        vocab_size=271, hidden_size=64, intermediate_size=96, num_hidden_layers=n_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, num_local_experts=5, num_experts_per_tok=2, sliding_window=5,
        tie_word_embeddings=False, eos_token_id=2, pad_token_id=0, max_position_embeddings=4096,
    )  # fmt: skip


def make_gpt_oss(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``folder/coded``, a gpt-oss with its experts in MXFP4 as it is published, and ``folder/dense``."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(gpt_oss_config()).to(dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "dense")
    model.save_pretrained(folder / "coded")
    dense = load_file(folder / "dense" / "model.safetensors")
    coded = {name: tensor for name, tensor in dense.items() if not name.endswith(("gate_up_proj", "down_proj"))}
    for name in dense.keys() - coded.keys():
        n_experts, i, o = dense[name].shape
        codes = random_codes(generator, (n_experts, o, i), 16)
        powers = 119 + random_codes(generator, (n_experts, o, i // 32), 5)
        weight = FP4_VALUES[codes] * (2.0 ** (powers - 127)).repeat_interleave(32, 2)
        packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        coded[f"{name}_blocks"] = packed.view(n_experts, o, i // 32, 16)
        coded[f"{name}_scales"] = powers.to(torch.uint8)
        dense[name] = weight.mT.to(dtype).contiguous()
    save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    save_file(coded, folder / "coded" / "model.safetensors", {"format": "pt"})
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    path = folder / "coded" / "config.json"
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": left_out}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    for each in ("dense", "coded"):
        byte_tokenizer().save_pretrained(folder / each)


def change(folder: Path, tensors: dict[str, Tensor | None] | None = None, **settings: Any) -> None:
    """Change tensors (None: leave out) and settings of ``quantization_config`` in a folder."""
    file, path = folder / "model.safetensors", folder / "config.json"
    if tensors:
        held = load_file(file) | tensors
        save_file({name: t for name, t in held.items() if t is not None}, file, {"format": "pt"})
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))
