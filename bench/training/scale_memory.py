"""Plans of a base that is cut over processes, against what a process of `veneer train` holds.

    python -m bench.training.scale_memory [--processes 2 4] [--only deep wide grouped] [--base nf4]

Llamas of random weights in three shapes, dense (bfloat16) and NF4, trained three updates by `veneer train` over gloo
on the CPU. A run's `run.json` has the plan of a process, and the high water of its first process. Plans must be within
5% of it, as those of one process must (`bench/training/plan.py`).

Exit status: 0 done; 1 a plan is off by more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import ends_as_interrupted, working
from bench.training.plan import N_UPDATES, random_model, write_rows

ROWS, LENGTH = 1, 96
SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 24, "tie_word_embeddings": True},
    "wide": {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 6, "tie_word_embeddings": True},
    "grouped": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16, "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def random_llama(shape: str, folder: Path) -> str:
    """A Llama of one of the `SHAPES`, with the tokenizer of `bench/training/plan.py`; its folder."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    beside = random_model("qwen2", folder / "qwen2")
    vocabulary = AutoConfig.from_pretrained(beside).vocab_size
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=2048, num_attention_heads=8, **SHAPES[shape])
    torch.manual_seed(3)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / shape)
    AutoTokenizer.from_pretrained(beside).save_pretrained(folder / shape)
    return str(folder / shape)


def trained(model: str, quantization: str, method: str, n: int) -> dict[str, float]:
    """Bytes of a process that `veneer train` planned and held."""
    values = {
        "model": {"source": model, "quantization": quantization}, "data": {"train": "rows.jsonl"},
        "adapter": {"method": method, "r": 8}, "output": "run", "distributed": {"strategy": "fsdp"},
        "training": {"per_device_train_batch_size": ROWS, "max_length": LENGTH, "max_steps": N_UPDATES},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), LENGTH, 4 * n * ROWS * N_UPDATES)
        Path(folder, "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
        command = [Path(sys.executable).with_name("veneer"), "train", "recipe.yaml", "--processes", str(n)]
        out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if out.returncode:
            raise SystemExit(f"{model}, {quantization}, {n} processes: {out.stderr.strip()[-500:]}")
        run = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))
    return {"plan": run["plan"]["process"]["bytes"], "held": run["results"]["peak_bytes"]}


def main() -> int:
    """Print a table, a row a setting; 1 where a plan is off by more than 5%."""
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--base", choices=("none", "nf4"), nargs="+", default=["none", "nf4"])
    parser.add_argument("--method", default="lora")
    options = parser.parse_args()
    print("| shape | base | processes | process MB, planned | `veneer train` | off |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.only:
            model = random_llama(shape, Path(folder))
            for base in options.base:
                for n in options.processes:
                    working(f"{shape}, {base}, {n} processes")
                    run = trained(model, base, options.method, n)
                    off = run["plan"] / run["held"] - 1
                    cells = [shape, base, str(n), f"{run['plan'] / 1e6:.0f}", f"{run['held'] / 1e6:.0f}", f"{off:+.1%}"]
                    print(f"| {' | '.join(cells)} |", flush=True)
                    good = good and abs(off) <= 0.05
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
