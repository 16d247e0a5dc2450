"""Sizes that tutorials give for parameter-efficient fine-tuning, counted from the shapes that the methods declare.

    python -m bench.training.claims

The models are built from their configs without weights (a 7B is Llama-2-7B, a 70B is Llama-3-70B). Prints one table:
what is said, what it counts to, and whether the two agree. docs/claims.md says what follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from veneer.export.gguf.mix import MixFacts, chosen_types
from veneer.export.gguf.mixes import mix_of
from veneer.export.gguf.plan import family_of
from veneer.methods.bottleneck import BottleneckConfig
from veneer.quant import nf4
from veneer.records.sites import ResidualSite
from veneer.store.gguf.names import places_of

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
GGUF_BITS = {"Q2_K": 2.5, "Q4_K_M": 4.5, "Q5_K_M": 5.5, "Q6_K": 6.5, "Q8_0": 8.0}  # said as the GB of a 7B too
TOLERANCE = 0.05  # a rounded figure counts as right within this share


@dataclass(frozen=True)
class Claim:
    """A claim: the value that is said and the value counted, in the same unit."""

    text: str
    said: float
    counted: float
    unit: str

    @property
    def holds(self) -> bool:
        return abs(self.said - self.counted) <= TOLERANCE * self.counted


def llama_2_7b() -> Any:
    return _empty(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000))


def llama_3_70b() -> Any:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    return _empty(LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8))


def _empty(config: LlamaConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def trained(model: Any, config: Any) -> int:
    """Parameters that a method trains on the model."""
    adapted = veneer.get_peft_model(model, config)
    n = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adapted.unload()
    return n


def lora(rank: int, targets: list[str]) -> veneer.LoraConfig:
    return veneer.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)


def bits_a_parameter(double_quant: bool) -> float:
    """Bytes of a real NF4 weight, in bits a parameter beyond the code itself."""
    weight = nf4.quantize(torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)), double_quant=double_quant)
    return 8 * weight.nbytes / (512 * 4096) - 4


def bytes_in_4_bits(model: Any) -> float:
    """The linear weights in NF4 with double quantization, embeddings and head in 16 bits."""
    kept = {model.get_input_embeddings(), model.get_output_embeddings()}
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in kept)
    rest = sum(p.numel() for p in model.parameters()) - linear
    return linear * (4 + bits_a_parameter(True)) / 8 + rest * 2


def gguf_bits(model: Any, kind: str) -> float:
    """Bits a weight of a GGUF file in llama-quantize's mix of the name, what is no matrix in float32."""
    config, family = model.config, family_of(model.config)
    shapes = {
        target: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        for target, _ in places_of(family, config, name, model.base_model_prefix)
    }
    facts = MixFacts(
        architecture=family.architecture,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
    )
    n_bytes = sum(spec.nbytes for spec in chosen_types(shapes, mix_of(kind), facts))
    return 8 * n_bytes / sum(p.numel() for p in model.parameters())


def claims() -> list[Claim]:
    small, large = llama_2_7b(), llama_3_70b()
    bits = {kind: gguf_bits(small, kind) for kind in GGUF_BITS}
    r16, seven = trained(small, lora(16, ATTENTION)), trained(small, lora(16, ALL_SEVEN))
    ia3 = trained(
        small, veneer.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    qv8, all8 = trained(small, lora(8, ["q_proj", "v_proj"])), trained(small, lora(8, ALL_SEVEN))
    n_small, n_large = (sum(p.numel() for p in m.parameters()) for m in (small, large))
    prefix = veneer.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    site = ResidualSite(name="mlp", layer=0, sublayer="mlp", features=4096)
    shapes = BottleneckConfig(size=64).shapes(site)
    bottleneck = sum(torch.Size(shape).numel() for shape in shapes.values())
    return [
        Claim("LoRA r=4 on q, k, v, o of a 7B", 4e6, trained(small, lora(4, ATTENTION)), "parameters"),
        Claim("LoRA r=16 on q, k, v, o of a 7B", 16.8e6, r16, "parameters"),
        Claim("LoRA r=256 on q, k, v, o of a 7B", 268e6, trained(small, lora(256, ATTENTION)), "parameters"),
        Claim("LoRA r=16, all seven layers of a 7B", 16777216, seven, "parameters"),
        Claim("share trained, LoRA r=16 on q, k, v, o", 0.2484, 100 * r16 / (n_small + r16), "%"),
        Claim("adapter file, r=16 on q, k, v, o, 16 bits", 30, r16 * 2 / 1e6, "MB"),
        Claim("adapter file, r=16 on all seven, 16 bits", 30, seven * 2 / 1e6, "MB"),
        Claim("bottleneck 2dr + r + d, d=4096, r=64", 2 * 4096 * 64 + 64 + 4096, bottleneck, "parameters"),
        Claim("prefix of 20 tokens on a 7B", 5e6, trained(small, prefix), "parameters"),
        Claim("the same on a 70B with 8 of 64 kv heads", 80 * 2 * 20 * 8192, trained(large, prefix), "parameters"),
        Claim("LoRA r=8 on q, v against IA3", 10, qv8 / ia3, "times"),
        Claim("LoRA r=8 on all seven against IA3", 10, all8 / ia3, "times"),
        Claim("absmax of NF4 blocks", 0.5, bits_a_parameter(False), "bits a parameter"),
        Claim("the same, double quantization", 0.127, bits_a_parameter(True), "bits a parameter"),
        Claim("70B in 4 bits", 35, bytes_in_4_bits(large) / 1e9, "GB"),
        Claim("70B, full fine-tuning with 16-bit weights and Adam", 140, 16 * n_large / 1e9, "GB"),
        *(Claim(f"{kind} of a 7B", said, bits[kind], "bits a weight") for kind, said in GGUF_BITS.items()),
        *(Claim(f"{kind} of a 7B", said, bits[kind] * n_small / 8e9, "GB") for kind, said in GGUF_BITS.items()),
        Claim("Q4_K_M of a 70B", 40, gguf_bits(large, "Q4_K_M") * n_large / 8e9, "GB"),
    ]  # fmt: skip


def main() -> None:
    table = Table(title="Sizes that are said, and what they count to")
    for title, side in (("", "left"), ("said", "right"), ("counted", "right"), ("unit", "left"), ("", "left")):
        table.add_column(title, justify=side)
    for claim in claims():
        said, counted = (f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in (claim.said, claim.counted))
        table.add_row(claim.text, said, counted, claim.unit, "holds" if claim.holds else "[bold]does not")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
