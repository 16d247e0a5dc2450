"""Eight rows of eight methods in one pass, one from each group of methods, beside eight rows of LoRA of rank 16.

training: a step of all eight adapters, each on a row of its own. Losses of two steps and the gradients of the first
    must be those of each adapter alone.
serving: eight greedy requests at once. The tokens must be those of each request alone. Lily is not served; C3A stands
    in its place.

LLaMA-Adapter, attention beside attention, takes whole rows, and aLoRA parts of them: no pass takes both.

    python -m bench.training.eight_methods [--parts training serving] [--model smollm2-135m-instruct] [--tokens 256]
        [--repeats 5] [--without NAME …] [--tiny]

``--without`` puts LoRA in the row of a method, which tells what that method costs. Goal: at most 1.3.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.lora_step import adapted_by, agree, base_of
from bench.report import add_keep, ends_as_interrupted, keep, quiet_libraries
from bench.same import stir
from bench.serving.serve_cold import prompt_of, require_equal
from bench.tiny_model import write_tiny
from bench.training.methods import tokens_of
from bench.training.snippet9 import SEVEN
from bench.training.sweep import Make, alone, same_gradients, together
from bench.turns import Goal, Timing, faster_dtype, in_turns, show, timed
from veneer import LLM, LoRARequest, SamplingParams
from veneer.ops.cpu.module import description
from veneer.store.source import resolve

GOAL = 1.3
CALLED = [11, 7]
"""Token ids that invoke aLoRA; they stand at one place in every row."""

LORA = "LoraConfig", {"r": 16}
LAYERS = {"target_modules": list(SEVEN)}
GROUPS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "miss": ("MissConfig", {"r": 16}),  # a pair
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 256, "vector_length": 32}),  # shared tensors
    "oft": ("OFTConfig", {"oft_block_size": 32}),  # a rotation
    "lokr": ("LoKrConfig", {"r": 8}),  # a change with a product of its own
    "shira": ("ShiraConfig", {"r": 16}),  # a sparse change
    "hira": ("HiraConfig", {"r": 16}),  # a change that follows from the weight
    "lily": ("LilyConfig", {"r": 16}),  # matrices that the tokens choose
    "alora": ("LoraConfig", {"r": 16, "alora_invocation_tokens": CALLED}),  # from some token on
}
SERVED = {name: GROUPS[name] for name in GROUPS if name != "lily"} | {"c3a": ("C3AConfig", {"block_size": 32})}
N_ROWS, N_SERVED = 8, 64


def main() -> None:
    args = arguments()
    ends_as_interrupted()
    quiet_libraries()
    args.dtype = faster_dtype()
    print(f"kernels: {description()}; torch {torch.__version__}; {args.dtype}", flush=True)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        args.place = write_tiny(args.folder / "model") if args.tiny else str(resolve(args.model))
        for part in args.parts:
            figures[part] = PARTS[part](args)
    keep(args.keep, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=256, help="of a row in training")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="+", choices=[*GROUPS, "c3a"], default=[])
    parser.add_argument("--tiny", action="store_true", help="a tiny random model: a run through, no measurement")
    add_keep(parser)
    return parser.parse_args()


def training(args: argparse.Namespace) -> float:
    """Print both steps; return how many times as long the one of eight methods takes."""
    base = base_of("veneer", "dense", args.place, args.dtype)
    ids = tokens_of(base, N_ROWS, args.tokens)
    ids[:, 4 : 4 + len(CALLED)] = torch.tensor(CALLED)
    ways = {}
    for title, makes in kinds(args, GROUPS).items():
        one_by_one, at_once = alone(base, makes), together(base, makes)
        for number in (1, 2):
            check = ids[:, : min(args.tokens, 64)]
            agree(f"{title}: losses of step {number}, alone and together", one_by_one(check), at_once(check))
            if number == 1:
                same_gradients(title, one_by_one, at_once)
        ways[title] = lambda at_once=at_once: timed(lambda: at_once(ids))
    return shown(f"training, {N_ROWS} x {args.tokens} tokens", ways, args)


def serving(args: argparse.Namespace) -> float:
    """Print the times of eight requests; return how many times as long those of eight methods take."""
    llm = LLM(args.place, dtype=str(args.dtype).removeprefix("torch."), enable_prefix_caching=False, max_cpu_loras=16)
    base = base_of("veneer", "dense", args.place, args.dtype)
    params = SamplingParams(temperature=0, max_tokens=N_SERVED, ignore_eos=True)
    prompts = [[*prompt_of(number), *CALLED, *prompt_of(number)] for number in range(N_ROWS)]
    ways: dict[str, Callable[[], Timing]] = {}
    for title, makes in kinds(args, SERVED).items():
        adapters = written(base, makes, args.folder / title)
        require_equal(llm, args.place, adapters)
        ask = lambda adapters=adapters: llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)  # noqa: E731
        ways[title] = lambda ask=ask: timed(ask)
    return shown(f"serving, {N_ROWS} x {len(prompts[0])} tokens in and {N_SERVED} out", ways, args)


def kinds(args: argparse.Namespace, groups: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, list[Make]]:
    chosen = [LORA if name in args.without else config for name, config in groups.items()]
    return {"one method a row": list(map(member, chosen)), "LoRA in every row": [member(LORA)] * N_ROWS}


def member(config: tuple[str, dict[str, Any]]) -> Make:
    """An adapter that changes the logits."""
    name, fields = config

    def make(base: Any) -> Any:
        model = adapted_by("veneer", base, name, {**fields, **LAYERS})
        ids = tokens_of(model, 1, 32)
        ids[:, 4 : 4 + len(CALLED)] = torch.tensor(CALLED)
        return stir(model, ids)

    return make


def written(base: Any, makes: Sequence[Make], folder: Path) -> list[LoRARequest]:
    found = []
    for number, make in enumerate(makes):
        place = folder / str(number)
        model = make(base)
        model.save_pretrained(place)
        model.unload()
        found.append(LoRARequest(f"{folder.name}{number}", len(found) + 1, str(place)))
    return found


def shown(title: str, ways: Mapping[str, Callable[[], Timing]], args: argparse.Namespace) -> float:
    """Print the table."""
    timings = in_turns(ways, args.repeats)
    show(title, timings, "LoRA in every row", {"one method a row": Goal("LoRA in every row", GOAL)})
    mixed, lora = (timings[name].wall for name in ways)
    return mixed / lora


PARTS: dict[str, Callable[[argparse.Namespace], float]] = {"training": training, "serving": serving}


if __name__ == "__main__":
    main()
