"""Small run, planned and trained: its memory at the end is that of a process of `veneer train` at its start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from veneer.model.memory.available import high_water
from veneer.plan.plan import plan_recipe
from veneer.recipe.recipe import Recipe, parse_recipe
from veneer.train.run import run_recipe

_N_WORDS, _LENGTH, _N_ROWS = 64, 32, 8


def small_run(folder: Path) -> Recipe:
    """Return a recipe of two steps on the CPU, with a model, a tokenizer and rows of its own in a folder."""
    words = {f"w{number}": number for number in range(_N_WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w2").save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=_N_WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    row = json.dumps({"text": " ".join(["w3 w5 w7"] * _LENGTH)})
    (folder / "rows.jsonl").write_text(f"{row}\n" * _N_ROWS, encoding="utf-8")
    return parse_recipe({
        "model": {"source": str(folder / "model")}, "data": {"train": str(folder / "rows.jsonl")},
        "adapter": {"method": "lora", "r": 4}, "output": str(folder / "run"),
        "training": {"max_length": _LENGTH, "per_device_train_batch_size": 2, "max_steps": 2, "use_cpu": True},
    })  # fmt: skip


def main() -> None:
    """Plan and train a small run in a folder, as `veneer train` does, and print the most bytes that the process has
    held.
    """
    recipe = small_run(Path(sys.argv[1]))
    plan_recipe(recipe)
    run_recipe(recipe)
    print(high_water())
