"""Makes merges.safetensors with mergekit (run in an environment that has it): ``python make.py merges.safetensors``."""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 1}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=False)
WEIGHTS = (0.7, 0.4)
CASES = {
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "task_arithmetic, normalized": {"merge_method": "task_arithmetic", "normalize": True},
    "ties": {"merge_method": "ties", "density": 0.43},
    "ties, not normalized, scaled": {"merge_method": "ties", "density": 0.43, "normalize": False, "lambda": 1.3},
    "dare_ties, all kept": {"merge_method": "dare_ties", "density": 1.0},
    "dare_linear, all kept": {"merge_method": "dare_linear", "density": 1.0},
}


def save_models(folder: Path) -> list[Path]:
    torch.manual_seed(3)
    base = LlamaForCausalLM(CONFIG)
    paths = [folder / name for name in ("base", "a", "b")]
    state = {name: torch.randn_like(value) for name, value in base.state_dict().items()}
    for path in paths:
        base.load_state_dict(state if path.name == "base" else {n: v + torch.randn_like(v) for n, v in state.items()})
        base.save_pretrained(path)
    return paths


def merge(paths: list[Path], settings: dict[str, object], out: Path) -> dict[str, torch.Tensor]:
    method = {key: settings[key] for key in ("merge_method",)}
    shared = {key: settings[key] for key in ("normalize", "lambda") if key in settings}
    own = {key: settings[key] for key in ("density",) if key in settings}
    models = [{"model": str(p), "parameters": {"weight": w, **own}} for p, w in zip(paths[1:], WEIGHTS, strict=True)]
    config = {"base_model": str(paths[0]), "models": models, "dtype": "float32", "parameters": shared, **method}
    run_merge(
        MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=False, write_model_card=False)
    )
    return load_file(out / "model.safetensors")


def main(output: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        paths = save_models(Path(name))
        sets = {path.name: load_file(path / "model.safetensors") for path in paths}
        sets |= {
            case: merge(paths, settings, Path(name) / f"out{i}") for i, (case, settings) in enumerate(CASES.items())
        }
    facts = {"mergekit": version("mergekit"), "weights": json.dumps(WEIGHTS), "cases": json.dumps(CASES)}
    save_file({f"{s}:{key}": value for s, tensors in sets.items() for key, value in tensors.items()}, output, facts)


if __name__ == "__main__":
    main(sys.argv[1])
