"""Every kernel against its peer in one run: 4-bit codec and products against bitsandbytes, training ops against torch.

Both sides are compared before they are timed, A B A B, medians. The bound of an op is the larger of what its bytes take
at the rate of a copy and its products at the rate of torch's matrix product, both measured in the same run.

    python -m bench.kernels.kernel_times [--threads 2] [--rows 1536] [--columns 576] [--repeats 9]
        [--only 4-bit|training]
"""

from __future__ import annotations

import argparse

import torch

from bench.kernels.four_bit import four_bit_pairs
from bench.kernels.op_tables import OpTables, parser_of
from bench.kernels.training_ops import training_pairs


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    w = (torch.randn(args.rows, args.columns) * 0.02).bfloat16()
    tables = OpTables.start(args.repeats, w)
    if args.only != "training":
        title = f"W ({args.rows}, {args.columns}) bf16, NF4, blocks of 64"
        with torch.no_grad():
            tables.show(title, "bitsandbytes", four_bit_pairs(w), calls=10)
    if args.only != "4-bit":
        title = "forward and backward, 4 x 512 tokens of SmolLM2-135M"
        tables.show(title, "torch", training_pairs(), calls=1)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, ("4-bit", "training"), repeats=9)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=576)
    return parser.parse_args()


if __name__ == "__main__":
    main()
