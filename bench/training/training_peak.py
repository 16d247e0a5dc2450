"""The peak of a process's memory in training, above the weights, with each optimizer; `optim.py` prints it.

    python -m bench.training.training_peak SIDE [--layers 6] [--hidden 576] [--rank 144]

trains a small Llama for some steps in this process and prints the peak in bytes. Each side has a process of its own,
because an allocator keeps its memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from bench.resident import forget_high_water, high_water_mb
from veneer.optim import AdamW8bit, GaLoreAdamW, LayerwiseGaLoreAdamW
from veneer.optim.galore import GaLoreProjection

STEPS, TOKENS, VOCAB = 3, 128, 2048


def sides(rank: int) -> dict[str, Callable[[LlamaForCausalLM], Optimizer]]:
    galore = {"lr": 1e-3, "projection": GaLoreProjection(rank=rank)}
    return {
        "torch AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        "AdamW8bit": lambda model: AdamW8bit(model.parameters(), lr=1e-3),
        "GaLore": lambda model: GaLoreAdamW(groups(model), **galore),
        "GaLore, in backward": lambda model: LayerwiseGaLoreAdamW(groups(model), **galore),
        "GaLore, 8-bit, in backward": lambda model: LayerwiseGaLoreAdamW(groups(model), **galore, eight_bit=True),
    }


def groups(model: LlamaForCausalLM) -> list[dict[str, object]]:
    """The matrices of the layers are projected, embedding and norms are not, as in the paper."""
    inside = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": inside}, {"params": rest, "projected": False}]


def peaks(layers: int, hidden: int, rank: int) -> dict[str, int]:
    """Bytes above the weights of each side, each trained in a process of its own."""
    sizes = ["--layers", str(layers), "--hidden", str(hidden), "--rank", str(rank)]
    # Large tensors get mappings of their own, so that what is freed leaves the process.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = {}
    for name in sides(rank):
        command = [sys.executable, "-m", "bench.training.training_peak", name, *sizes]
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[name] = int(result.stdout.split()[-1])
    return found


def measure(side: str, layers: int, hidden: int, rank: int) -> int:
    """The high-water mark of resident memory over some steps, above what the built model took."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 192, 1),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = sides(rank)[side](model)
    ids = torch.randint(0, VOCAB, (1, TOKENS))
    forget_high_water()
    before = high_water_mb()
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return int((high_water_mb() - before) * 2**20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rank", type=int, default=144)
    args = parser.parse_args()
    print(measure(args.side, args.layers, args.hidden, args.rank))
