"""Makes adapters.safetensors with PEFT: ``python make.py FILE``. A tiny Llama, ten adapters, and their logits."""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 263, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 31, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
LAYERS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CONFIGS: dict[str, Any] = {
    "dora": peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, **LAYERS),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=5, projection_prng_key=11, **LAYERS),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, **LAYERS),
    "road": peft.RoadConfig(variant="road_4", group_size=4, **LAYERS),
    "lokr": peft.LoKrConfig(r=2, alpha=5, **LAYERS),
    "shira": peft.ShiraConfig(r=2, random_seed=3, **LAYERS),
    "c3a": peft.C3AConfig(block_size=4, **LAYERS),
    "hira": peft.HiraConfig(r=3, **LAYERS),
    "vblora": peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, topk=2, **LAYERS),
}
IDS = torch.tensor([[5, 99, 41, 7, 18, 61, 230]])


def base() -> LlamaForCausalLM:
    """Return the base, with weights large enough that an adapter shows."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def main(output: str) -> None:
    found = {"ids": IDS, "plain": base()(IDS).logits[0, -1].detach().clone()}
    found |= {f"base:{name}": value.clone() for name, value in base().state_dict().items()}
    texts = {"peft": version("peft"), "sizes": json.dumps(SIZES)}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = peft.get_peft_model(base(), config).eval()
        torch.manual_seed(seed)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.2 * torch.randn_like(parameter))
            model.save_pretrained(folder)
            found |= {f"{name}:{key}": x for key, x in load_file(Path(folder, "adapter_model.safetensors")).items()}
            texts[name] = Path(folder, "adapter_config.json").read_text()
            found[f"{name}=logits"] = model(IDS).logits[0, -1].clone()
    save_file(found, output, texts)


if __name__ == "__main__":
    main(sys.argv[1])
