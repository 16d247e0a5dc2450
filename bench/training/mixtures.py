"""Training steps of mixtures with LoRA, beside a dense model of equal active size, and beside transformers and PEFT.

The model is a Qwen3-MoE: with LoRA on attention alone, on experts alone (PEFT's `target_parameters`), and on both. Of
nearly equal scores rounding in 16 bits may choose another expert, so that a few tokens differ. `bench.training.beside`
says how a step is timed; weights are random.

    python -m bench.training.mixtures [--dtype bfloat16] [--tokens 4x256] [--rounds 5] [--sizes 512,2048]
"""

from __future__ import annotations

from bench.report import Rows
from bench.serving.mixtures import Size, config_of
from bench.training.beside import COLUMNS, arguments, by_peft, compared, ours
from veneer import LoraConfig

SIZES = (Size(512, 256, 32, 4, 4), Size(512, 128, 128, 8, 4), Size(2048, 512, 32, 4, 1), Size(2048, 256, 128, 8, 1))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
RANK = 16
TARGETS = {"attention": (ATTENTION, None), "experts": (None, EXPERTS), "both": (ATTENTION, EXPERTS)}


def main() -> None:
    args = arguments(__doc__, "512,2048")
    sizes = [size for size in SIZES if size.hidden in args.sizes]
    table = Rows([f"{size}, {what}" for size in sizes for what in TARGETS], COLUMNS)
    for size in sizes:
        dense = ours(config_of(size, dense=True), args.dtype, LoraConfig(r=RANK, target_modules="all-linear"))
        for what, (modules, parameters) in TARGETS.items():
            lora = LoraConfig(r=RANK, target_modules=modules, target_parameters=parameters)
            model = ours(config_of(size), args.dtype, lora)
            theirs = by_peft(model, config_of(size), args.dtype)
            table.add(f"{size}, {what}", *compared(theirs, model, dense, args.ids, args.rounds))


if __name__ == "__main__":
    main()
