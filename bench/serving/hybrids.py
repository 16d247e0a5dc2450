"""Hybrids of gated delta rule and attention, served: beside `generate`, and a later turn of a conversation.

The model is a Qwen3.5 with random weights, three of four layers with scans. First 32 prompts of equal length are
answered at once, by veneer's engine and by transformers' `generate` on a batch. The likeliest tokens are compared
before anything is timed. Then the first token of a later turn is timed beside that of a prompt as long as what is new
in the turn. Seconds are of the wall and of the CPU, in turns, medians.

    python -m bench.serving.hybrids [--dtype bfloat16] [--rounds 5] [--hidden 512] [--layers 8]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5TextConfig

from bench.report import quiet_libraries
from bench.tiny_model import write_tokenizer
from bench.turns import Timing, in_turns, timed
from veneer import LLM, SamplingParams
from veneer.ops.cpu.module import description
from veneer.serve.runners.program_runner import ProgramRunner

VOCABULARY = 32_003
ROWS, PROMPT, ANSWER = 32, 61, 32  # requests at once, and the tokens of each
HISTORY, NEW = 1021, 67  # tokens of an earlier turn, and of the next message


def main() -> None:
    args = parse()
    quiet_libraries()
    print(f"kernels: {description()}; torch {torch.__version__}; {args.dtype}; {torch.get_num_threads()} threads")
    model = made(args.hidden, args.layers, getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCABULARY)
        llm = LLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), max_model_len=2048)
    assert isinstance(llm.engine.runner, ProgramRunner)
    beside_generate(model, llm, args.rounds)
    later_turn(llm, args.rounds)


def made(hidden: int, layers: int, dtype: torch.dtype) -> Any:
    """Return a model with random weights, whose every fourth layer is attention."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 256, head_dim=128,
        linear_num_key_heads=hidden // 64, linear_num_value_heads=hidden // 64, linear_key_head_dim=128,
        linear_value_head_dim=128, max_position_embeddings=4096, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def beside_generate(model: Any, llm: LLM, rounds: int) -> None:
    """Print the seconds of 32 answers by `generate` and by the engine, and how many tokens agree."""
    salts = iter(range(1 << 20))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (ROWS, PROMPT), generator=generator)

    def by_generate() -> list[list[int]]:
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0)
        return [row[PROMPT:].tolist() for row in out]

    def by_engine() -> list[list[int]]:
        salt = str(next(salts))  # nothing of it is cached
        prompts: list[Any] = [{"prompt_token_ids": row, "cache_salt": salt} for row in ids.tolist()]
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]

    same = [
        a == b for one, other in zip(by_generate(), by_engine(), strict=True) for a, b in zip(one, other, strict=True)
    ]
    print(f"{sum(same)} of {len(same)} greedy tokens agree")
    ways = {"generate": lambda: timed(by_generate), "engine": lambda: timed(by_engine)}
    told(f"{ROWS} answers of {ANSWER} tokens", in_turns(ways, rounds))


def later_turn(llm: LLM, rounds: int) -> None:
    """Print the seconds to the first token of a later turn, and of a prompt as long as what is new."""
    generator = torch.Generator().manual_seed(2)
    draws = iter(lambda: torch.randint(1, VOCABULARY, (HISTORY + NEW,), generator=generator).tolist(), None)
    later: list[list[int]] = []

    def first_token(ids: list[int]) -> Any:
        prompt: Any = {"prompt_token_ids": ids}
        return llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)[0]

    for _ in range(rounds + 1):  # one turn is not counted
        ids = next(draws)
        prompt: Any = {"prompt_token_ids": ids[:HISTORY]}
        sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        [answer] = llm.generate([prompt], sampling, use_tqdm=False)
        later.append([*ids[:HISTORY], *answer.outputs[0].token_ids, *ids[HISTORY:]])
    turns = iter(later)
    cached = set[int]()

    def next_turn() -> None:
        cached.add(first_token(next(turns)).num_cached_tokens)

    def alone() -> None:
        first_token(next(draws)[: NEW + 1])

    times = in_turns({"turn": lambda: timed(next_turn), f"{NEW + 1} tokens": lambda: timed(alone)}, rounds)
    told(f"first token after {HISTORY} tokens, {sorted(cached)} cached", times)


def told(what: str, times: Mapping[str, Timing]) -> None:
    """Print the seconds of two ways, and the ratio of the first to the second."""
    (one, first), (other, second) = times.items()
    for kind, a, b in (("wall", first.wall, second.wall), ("CPU", first.cpu, second.cpu)):
        print(f"{what}: {kind} seconds {one} {a:.3f}, {other} {b:.3f}, {one} / {other} {a / b:.2f}", flush=True)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
