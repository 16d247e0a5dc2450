"""Peak memory of `veneer export gguf`: ``python -m bench.files.export_memory FOLDER_WITH_A_TOKENIZER``.

A Llama in bfloat16 with random weights of twenty times its largest tensor, the tied embeddings of 49,152 x 768
(75.5 MB), and two LoRAs of rank 8: on all linear layers, and on the embeddings and down. Every export is a process of
its own; told is the most memory that it had resident (the kernel's own account) beyond what it had once the program was
imported, in all and for the plan alone: the tokenizer, the model without storage and the adapter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers

from bench.report import ends_as_interrupted

MEASURE = """
import sys
from pathlib import Path
from bench.resident import forget_high_water, high_water_mb
from veneer.export.gguf.model import GgufExport, GgufOptions
from veneer.ops.cpu.module import kernels

base, adapter, target, kind = sys.argv[1:]
kernels()
forget_high_water()
before = high_water_mb()
export = GgufExport(base, Path(adapter) if adapter else None, GgufOptions(type=kind, overwrite=True))
planned = high_water_mb()
export.write(Path(target))
print(planned - before, high_water_mb() - before)
"""
SIZES = {"vocab_size": 49152, "hidden_size": 768, "intermediate_size": 8192, "num_hidden_layers": 35}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True}
ADAPTERS = {"all linear layers": "all-linear", "embeddings and down": ["embed_tokens", "down_proj"]}


def make(tokenizer: Path, folder: Path) -> float:
    """Write the model and its adapters; returns the MiB of the largest tensor."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, bos_token_id=1, eos_token_id=2, max_position_embeddings=2048)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size="400MB")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "base")
    largest: int = max(parameter.nbytes for parameter in model.parameters())
    print(f"{sum(p.nbytes for p in model.parameters()) / largest:.1f} times the largest tensor, {largest / 1e6:.1f} MB")
    for name, targets in ADAPTERS.items():
        lora = peft.LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, target_modules=targets)
        adapted = peft.get_peft_model(model, lora)
        adapted.save_pretrained(str(folder / name))
        adapted.unload()
    return largest / 2**20


def main() -> None:
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "F32"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = make(given.tokenizer, folder)
        for kind in given.types:
            for adapter in ("", *ADAPTERS):
                order = [str(folder / "base"), str(folder / adapter) if adapter else "", str(folder / "x.gguf"), kind]
                program = [sys.executable, "-c", MEASURE, *order]
                done = subprocess.run(program, check=True, capture_output=True, text=True)
                plan, whole = (float(number) / largest for number in done.stdout.split())
                print(
                    f"{kind}, {adapter or 'no adapter'}: {whole:.2f}x the largest tensor (plan {plan:.2f}x)", flush=True
                )


if __name__ == "__main__":
    main()
