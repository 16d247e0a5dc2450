"""Training steps of hybrids of gated delta rule and attention, beside a dense model and beside transformers and PEFT.

A step is the forward and the backward pass of a Qwen3.5 with LoRA on all linear layers; three of four layers have
scans. The dense model is a Qwen3 with as many parameters in its layers. Both sides of the hybrid have the same weights
and adapter, and their losses agree before they are timed. transformers runs its own torch code for the scan: the
library that it calls on GPUs has none for a CPU. Times are CPU milliseconds of one thread, and milliseconds of the
clock in brackets, in turns, medians; weights are random.

    python -m bench.training.hybrids [--dtype bfloat16] [--tokens 4x256] [--rounds 5] [--sizes 128,512,2048]
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3_5TextConfig, Qwen3Config

from bench.report import Rows, quiet_libraries
from bench.training.mixtures import ALIKE, step, times
from veneer import LoraConfig, get_peft_model
from veneer.model.fused.decoder import fuse
from veneer.ops.cpu.module import description

COLUMNS = ("losses differ by", "PEFT", "veneer", "PEFT / veneer", "dense", "veneer / dense")
LORA = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")


@dataclass(frozen=True, slots=True)
class Size:
    """Width of the stream, number of layers, number and width of the heads of scans, and size of the vocabulary."""

    hidden: int
    layers: int
    heads: int
    head_width: int
    vocabulary: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.layers} layers, {self.heads} heads of {self.head_width}"


SIZES = (Size(128, 4, 4, 32, 512), Size(512, 8, 8, 128, 512), Size(2048, 4, 16, 128, 512))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", default="4x256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="128,512,2048")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    dtype, (n, t) = getattr(torch, args.dtype), map(int, args.tokens.split("x"))
    sizes = [size for size in SIZES if str(size.hidden) in args.sizes.split(",")]
    print(f"kernels: {description()}; torch {torch.__version__}; {args.dtype}; CPU milliseconds of one thread a step")
    table = Rows(list(map(str, sizes)), COLUMNS)
    ids = torch.randint(0, 512, (n, t), generator=torch.Generator().manual_seed(1))
    for size in sizes:
        table.add(str(size), *row(size, dtype, ids, args.rounds))


def hybrid_config(size: Size) -> PretrainedConfig:
    heads = max(2, size.hidden // 128)
    return Qwen3_5TextConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.hidden * 7 // 2,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        head_dim=size.hidden // heads, linear_num_key_heads=size.heads, linear_num_value_heads=size.heads,
        linear_key_head_dim=size.head_width, linear_value_head_dim=size.head_width, tie_word_embeddings=True,
    )  # fmt: skip


def dense_config(size: Size, n_parameters: int) -> PretrainedConfig:
    """Return a Qwen3 with about ``n_parameters``, and the hybrid's attention in every layer."""
    heads, own = max(2, size.hidden // 128), size.hidden
    in_feed_forward = (n_parameters - size.vocabulary * own) / size.layers - 3 * own * own
    return Qwen3Config(
        vocab_size=size.vocabulary, hidden_size=own, intermediate_size=round(in_feed_forward / (3 * own) / 16) * 16,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        head_dim=own // heads, tie_word_embeddings=True,
    )  # fmt: skip


def base(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.requires_grad_(False)
    return model


def ours(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """A fused model with an adapter, whose B is not zero."""
    model = get_peft_model(base(config, dtype), LORA)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    if not fuse(model):
        raise SystemExit("the model does not fuse, and is not timed")
    return model.train()


def row(size: Size, dtype: torch.dtype, ids: Tensor, rounds: int) -> list[str]:
    model = ours(hybrid_config(size), dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(base(hybrid_config(size), dtype), folder, is_trainable=True)
    with torch.no_grad():
        losses = [float(side.eval()(input_ids=ids, labels=ids, use_cache=False).loss) for side in (model, theirs)]
    apart = abs(losses[0] - losses[1]) / losses[1]
    if not apart <= ALIKE[dtype]:
        raise SystemExit(f"the losses are {losses[0]:.6f} and {losses[1]:.6f}, and the sides are not timed")
    frozen = sum(p.numel() for p in theirs.parameters() if not p.requires_grad)
    dense = ours(dense_config(size, frozen), dtype)
    model.train(), theirs.train()
    gc.collect()
    gc.freeze()  # as `veneer train` does: collections do not walk through the libraries
    own, mine, like = times([lambda: step(theirs, ids), lambda: step(model, ids), lambda: step(dense, ids)], rounds)
    cells = [f"{cpu:.0f} ({wall:.0f})" for cpu, wall in (own, mine, like)]
    return [f"{apart:.0e}", cells[0], cells[1], f"{own[0] / mine[0]:.2f}", cells[2], f"{mine[0] / like[0]:.2f}"]


if __name__ == "__main__":
    main()
