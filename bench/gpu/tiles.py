"""Stage 6: the tiles of attention that are fastest on a card, beside those that the kernels take today.

    python -m bench.gpu.tiles HEAD_DIM [--rehearse]

In bfloat16, causal, 4 sequences of 2048 tokens, 32 query heads of 8 key heads. A tile that does not fit the card's
shared memory is told so.
"""

from __future__ import annotations

import argparse
import os
from itertools import product
from typing import Any

FORWARD = tuple(product((64, 128), (32, 64, 128), (4, 8)))  # queries, keys, warps
BACKWARD = tuple(product((32, 64, 128), (4, 8)))  # queries and keys, warps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head_dim", type=int)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = str(int(args.rehearse))  # read when triton is imported
    import torch

    from bench.gpu.kernel_cases import TIMED, TINY
    from veneer.ops.triton import attention

    device = torch.device("cpu" if args.rehearse else "cuda")
    s = TINY if args.rehearse else TIMED
    shape = [(s.tokens, heads, args.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads)]
    dtype = torch.float32 if args.rehearse else torch.bfloat16
    q, k, v = (torch.randn(each, device=device).to(dtype) for each in shape)
    bounds = torch.arange(0, s.tokens + 1, s.length, device=device)
    options: Any = (bounds, args.head_dim**-0.5, 0, 0.0)
    out, lse = attention.attention_forward(q, k, v, *options)
    forward = lambda: attention.attention_forward(q, k, v, *options)  # noqa: E731
    backward = lambda: attention.attention_backward(out, q, k, v, out, lse, *options)  # noqa: E731
    for name, call, choose, tiles in (
        ("forward", forward, "_forward_tile", FORWARD),
        ("backward", backward, "_backward_tile", BACKWARD),
    ):
        today = getattr(attention, choose)(q)
        for tile in [today, *(each for each in (tiles[:1] if args.rehearse else tiles) if each != today)]:
            setattr(attention, choose, lambda x, tile=tile: tile)
            _show(name, tile, tile == today, call, device)


def _show(name: str, tile: tuple[int, ...], is_today: bool, call: Any, device: Any) -> None:
    from triton.errors import TritonError

    from bench.gpu.runner import figure
    from bench.gpu.timing import seconds_of
    from veneer.errors import BackendError

    label = f"{name}, {' x '.join(map(str, tile))}{', today' if is_today else ''}"
    try:
        figure(label, ms=seconds_of(call, device, 1 if device.type == "cpu" else 15) * 1e3)
    except (BackendError, TritonError) as error:
        figure(label, ms=f"refused: {str(error)[:80]}")


if __name__ == "__main__":
    main()
