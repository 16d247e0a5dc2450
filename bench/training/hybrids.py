"""Training steps of hybrids of gated delta rule and attention, beside a dense model and beside transformers and PEFT.

The model is a Qwen3.5 with LoRA on all linear layers; three of four layers have scans. The dense model is a Qwen3 with
as many parameters in its layers. transformers runs its own torch code for the scan: the library that it calls on GPUs
has none for a CPU. `bench.training.beside` says how a step is timed; weights are random.

    python -m bench.training.hybrids [--dtype bfloat16] [--tokens 4x256] [--rounds 5] [--sizes 128,512,2048]
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, Qwen3_5TextConfig, Qwen3Config

from bench.report import Rows
from bench.training.beside import COLUMNS, VOCABULARY, arguments, by_peft, compared, ours
from veneer import LoraConfig

LORA = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")


@dataclass(frozen=True, slots=True)
class Size:
    """Width of the stream, number of layers, number and width of the heads of scans."""

    hidden: int
    layers: int
    heads: int
    head_width: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.layers} layers, {self.heads} heads of {self.head_width}"


SIZES = (Size(128, 4, 4, 32), Size(512, 8, 8, 128), Size(2048, 4, 16, 128))


def main() -> None:
    args = arguments(__doc__, "128,512,2048")
    sizes = [size for size in SIZES if size.hidden in args.sizes]
    table = Rows(list(map(str, sizes)), COLUMNS)
    for size in sizes:
        config = hybrid_config(size)
        model = ours(config, args.dtype, LORA)
        theirs = by_peft(model, config, args.dtype)
        frozen = sum(p.numel() for p in theirs.parameters() if not p.requires_grad)
        dense = ours(dense_config(size, frozen), args.dtype, LORA)
        table.add(str(size), *compared(theirs, model, dense, args.ids, args.rounds))


def hybrid_config(size: Size) -> PretrainedConfig:
    heads = max(2, size.hidden // 128)
    return Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=size.hidden, intermediate_size=size.hidden * 7 // 2,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        head_dim=size.hidden // heads, linear_num_key_heads=size.heads, linear_num_value_heads=size.heads,
        linear_key_head_dim=size.head_width, linear_value_head_dim=size.head_width, tie_word_embeddings=True,
    )  # fmt: skip


def dense_config(size: Size, n_parameters: int) -> PretrainedConfig:
    """Return a Qwen3 with about ``n_parameters``, and the hybrid's attention in every layer."""
    heads, own = max(2, size.hidden // 128), size.hidden
    in_feed_forward = (n_parameters - VOCABULARY * own) / size.layers - 3 * own * own
    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=own, intermediate_size=round(in_feed_forward / (3 * own) / 16) * 16,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        head_dim=own // heads, tie_word_embeddings=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
