"""Plans against what happens: live bytes, high water of `veneer train` and seconds of a step.

Each setting is trained by the command itself (three updates of full rows), whose run.json holds the plan that it made
and the high water of its process, and counted in another process (two steps, every storage). Live bytes must be within
1%, the high water within 5%; the exit code is 1 where one is not.

Where ``--time`` asks for them (on a quiet machine), seconds of seven steps behind the first are judged, and no bytes. A
machine that others share is not as fast in one minute as in another: all settings are gone through several times, each
time with rates measured anew, and medians must be within 15%.

    python -m bench.training.plan [--model NAME|FOLDER|random-FAMILY] [--rows 2] [--length 128] [--only 0 5 7] [--time]
                         [--rounds 3]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bench.report import add_keep, ends_as_interrupted, keep, last_printed

PATHS = ("auto", "off")
CHECKPOINTING: tuple[bool | str, ...] = (False, "selective", True)
FORMATS = ("none", "nf4", "int8")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused")
METHODS = ("lora", "dora", "ia3", "lora")
EVALUATED = "per_device_eval_batch_size"
N_UPDATES = 3


def settings() -> list[dict[str, Any]]:
    """27: every path, form of checkpointing and format, optimizers, methods and packing by turns; four trained whole,
    one of them with GaLore; two whose activations wait on disk; two that sum gradients, and two that evaluate."""
    found = []
    for n, (path, way, kind) in enumerate(itertools.product(PATHS, CHECKPOINTING, FORMATS)):
        found.append({
            "method": METHODS[n % 4], "quantization": kind, "fused": path, "gradient_checkpointing": way,
            "packing": n % 2 == 1, "optim": OPTIMIZERS[n % 4],
        })  # fmt: skip
    base = {"quantization": "none", "fused": "auto", "gradient_checkpointing": False, "packing": False}
    found += [{**base, "method": "full", "optim": optim} for optim in ("adamw_torch", "adamw_8bit", "galore_adamw")]
    found.append({**base, "method": "full", "optim": "adamw_torch_fused", "gradient_checkpointing": True})
    lora = {**base, "method": "lora", "optim": "adamw_torch"}
    found += [{**lora, "quantization": kind, "activation_offloading": "disk"} for kind in ("none", "nf4")]
    found.append({**base, "method": "full", "optim": "adamw_torch", "gradient_accumulation_steps": 4})
    found += [{**lora, "fused": path, "gradient_accumulation_steps": 3, EVALUATED: 8} for path in PATHS]
    return found


def random_model(family: str, folder: Path) -> str:
    """A model of another family with random weights (50 to 65 M) and a tokenizer, written into a folder; its name.

    Raises SystemExit for a family that is not there.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, Qwen2Tokenizer

    shared = {"vocab_size": 32768, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    grouped = {**shared, "max_position_embeddings": 2048, "num_key_value_heads": 2}
    configs: dict[str, Callable[[], Any]] = {
        "qwen2": lambda: transformers.Qwen2Config(  # biases
            hidden_size=512, intermediate_size=1536, num_hidden_layers=14, num_attention_heads=8,
            tie_word_embeddings=True, **grouped,
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(  # windows, norms of heads, embeddings with a multiplier
            hidden_size=448, intermediate_size=1792, num_hidden_layers=12, num_attention_heads=4, head_dim=128,
            sliding_window=64, **grouped,
        ),
        "phi3": lambda: transformers.Phi3Config(  # joined projections, a head of its own
            hidden_size=480, intermediate_size=1300, num_hidden_layers=13, num_attention_heads=6, **grouped,
        ),
        "gpt2": lambda: transformers.GPT2Config(  # transposed weights, learned positions; never fused
            n_embd=504, n_layer=11, n_head=7, n_positions=2048, **shared,
        ),
        "mixtral": lambda: transformers.MixtralConfig(  # experts; never fused
            hidden_size=384, intermediate_size=704, num_hidden_layers=9, num_attention_heads=6, num_local_experts=4,
            **grouped,
        ),
    }  # fmt: skip
    if family not in configs:
        raise SystemExit(f"--model random-{family}: there are {', '.join(f'random-{name}' for name in configs)}")
    config = configs[family]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.islice(itertools.product(alphabet, repeat=2), config.vocab_size - len(alphabet))
    merges = list(pairs)
    words = {word: number for number, word in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    Qwen2Tokenizer(tokenizer_object=tokenizer, vocab=words, merges=merges).save_pretrained(folder)
    return str(folder)


def values_of(setting: dict[str, Any], model: str, rows: int, length: int) -> dict[str, Any]:
    """The recipe of a setting, as YAML has it; files are looked for beside it."""
    training = {key: value for key, value in setting.items() if key not in ("method", "quantization")}
    training |= {"per_device_train_batch_size": rows, "max_length": length, "max_steps": N_UPDATES}
    rank = {"r": 16} if setting["method"] in ("lora", "dora") else {}
    return {
        "model": {"source": whole_path(model), "quantization": setting["quantization"]},
        "data": {"train": "rows.jsonl", **({"eval": "rows.jsonl"} if EVALUATED in setting else {})},
        "adapter": {"method": setting["method"], **rank}, "training": training, "output": "run",
    }  # fmt: skip


def whole_path(model: str) -> str:
    """A folder's whole path, since runs begin elsewhere; another name as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def recipe_of(setting: dict[str, Any], model: str, rows: int, length: int) -> Any:
    """The recipe of a setting."""
    from veneer.recipe.recipe import parse_recipe

    return parse_recipe(values_of(setting, model, rows, length))


def write_rows(folder: Path, length: int, n_rows: int) -> None:
    """A file of rows that are all longer than so many tokens, and are cut off there."""
    text = " ".join(f"{k} sparrows sat on wall {k * 7 % 13}." for k in range(length))
    (folder / "rows.jsonl").write_text(f"{json.dumps({'text': text})}\n" * n_rows, encoding="utf-8")


def trained(number: int, options: argparse.Namespace) -> dict[str, float]:
    """Bytes that `veneer train` planned and held."""
    values = values_of(settings()[number], options.model, options.rows, options.length)
    n_rows = options.rows * N_UPDATES * values["training"].get("gradient_accumulation_steps", 1)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), options.length, max(8, n_rows))
        Path(folder, "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
        command = [Path(sys.executable).with_name("veneer"), "train", "recipe.yaml"]
        out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if out.returncode:
            raise SystemExit(f"setting {number}: {out.stderr.strip()[-500:]}")
        run = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))
    found = run["data"]["train"]
    if found["tokens"] != found["rows"] * options.length:
        raise SystemExit(f"setting {number}: {found['tokens']} tokens in {found['rows']} rows: they are not full")
    live = max(phase["bytes"] for name, phase in run["plan"]["phases"].items() if name != "load")  # steps are counted
    return {"live": live, "process": run["plan"]["process"]["bytes"], "held": run["results"]["peak_bytes"]}


def planned(recipe: Any) -> dict[str, float]:
    """Seconds that the plan says, all rates measured behind it."""
    from veneer.plan.plan import plan_recipe
    from veneer.plan.report import Machine

    return {"seconds": Machine.of(None, timed=True).seconds(plan_recipe(recipe)).step}


def counted(recipe: Any) -> dict[str, float]:
    """Live bytes of the step itself."""
    from bench.training.measured import measured_model
    from veneer.plan.live_bytes import LiveBytes, peaks
    from veneer.plan.memory_trace import FIRST, kind_under, kinds_of, make_optimizer, prepare, run_steps
    from veneer.plan.plan import batch_of, held_out_batch

    model, args, live = measured_model(recipe), recipe.training_config(), LiveBytes()
    prepare(model, args, with_values=True)
    optimizer, batch = make_optimizer(model, args), batch_of(recipe, model.config)
    with live:
        for tensor, kind in kinds_of(model):
            live.hold(tensor, kind)
        run_steps(model, optimizer, batch, args, live, held_out=held_out_batch(recipe.data, recipe.task, args, batch))
    found = peaks(live.events, live.kinds, kind_under)
    return {"live": max(peak.n_bytes for mark, peak in found.items() if FIRST not in mark)}


def carried_out(
    recipe: Any, heap: Callable[[], AbstractContextManager[None]] | None = None, n_steps: int = 8
) -> dict[str, float]:
    """Seconds of a micro-batch in the median step behind the first, with its share of the update, and in the quickest;
    bytes that the system makes anew in the median step; high water. ``heap`` is what steps run within, by default as a
    run's do.
    """
    import resource

    import torch

    from bench.training.measured import measured_model
    from veneer.model.memory.available import high_water
    from veneer.model.memory.heap import freed_memory_kept
    from veneer.model.memory.offload import ActivationOffload
    from veneer.plan.memory_trace import make_optimizer, prepare
    from veneer.plan.plan import batch_of
    from veneer.plan.step import Step, as_accelerate

    model, args = measured_model(recipe), recipe.training_config()
    prepare(model, args, with_values=True)
    inputs = batch_of(recipe, model.config).inputs(model.config.vocab_size)
    offload = ActivationOffload(model, "disk") if args.activation_offloading else nullcontext()
    step = Step(
        model, make_optimizer(model, args), inputs, lambda mark: None,
        max_grad_norm=args.max_grad_norm or 0.0, offload=offload,
    )  # fmt: skip
    seconds, faults = [], []
    with (heap or freed_memory_kept)(), as_accelerate(model, torch.bfloat16 if args.bf16 else None):
        for _ in range(n_steps):
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            step.run(args.gradient_accumulation_steps)
            seconds.append((time.perf_counter() - began) / args.gradient_accumulation_steps)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    fresh = statistics.median(faults[1:]) * resource.getpagesize()
    taken = {"seconds": statistics.median(seconds[1:]), "least": min(seconds[1:])}
    return {"process": high_water() or 0, **taken, "fresh": fresh}


PARTS = {"planned": planned, "counted": counted, "carried out": carried_out}


def apart(part: str, number: int, options: argparse.Namespace) -> dict[str, float]:
    """Run a part of one setting in a process of its own."""
    command = [sys.executable, "-m", "bench.training.plan", "--part", part, "--only", str(number)]
    command += ["--model", options.model, "--rows", str(options.rows), "--length", str(options.length)]
    return last_printed(command, f"setting {number}, {part}")


def row(number: int, options: argparse.Namespace) -> tuple[str, bool, float]:
    """The row of one setting, whether all in it is as near as it must be, and how far the process's memory is off."""
    apart("planned", number, options)  # a run that measured rates first would hold more
    run, count = trained(number, options), apart("counted", number, options)
    live, process = run["live"] / count["live"] - 1, run["process"] / run["held"] - 1
    found = [str(number), name_of(number)]
    found += [f"{run['live'] / 1e6:.1f}", f"{count['live'] / 1e6:.1f}", f"{live:+.2%}"]
    found += [f"{run['process'] / 1e6:.0f}", f"{run['held'] / 1e6:.0f}", f"{process:+.1%}"]
    return f"| {' | '.join(found)} |", abs(live) <= 0.01 and abs(process) <= 0.05, process


def name_of(number: int) -> str:
    """A setting in words."""
    return ", ".join(str(value) for value in settings()[number].values())


def times(options: argparse.Namespace) -> Iterator[tuple[str, bool, float]]:
    """The rows of seconds, whether each is as near as it must be, and how far it is off: medians of several rounds."""
    from veneer.plan.machine import Rates

    plans, runs = defaultdict(list), defaultdict(list)
    for n in range(options.rounds):
        with without(Rates.here().path):
            for number in options.only:
                plans[number].append(apart("planned", number, options)["seconds"])
                runs[number].append(apart("carried out", number, options))
                took = f"{runs[number][-1]['seconds']:.3f}, least {runs[number][-1]['least']:.3f}"
                print(f"round {n}, {number}: {plans[number][-1]:.3f}; {took}", file=sys.stderr, flush=True)
    for number in options.only:
        said = statistics.median(plans[number])
        median = statistics.median(run["seconds"] for run in runs[number])
        least = min(run["least"] for run in runs[number])
        found = [str(number), name_of(number), f"{said:.3f}"]
        found += [text for took in (median, least) for text in (f"{took:.3f}", f"{said / took - 1:+.1%}")]
        yield f"| {' | '.join(found)} |", abs(said / median - 1) <= 0.15, said / median - 1


@contextmanager
def without(path: Path) -> Iterator[None]:
    """A file is away for a while, and what stood in its place meanwhile afterwards."""
    kept = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if kept is not None:
            path.write_bytes(kept)


def main() -> int:
    """Print a table, a row a setting; 1 where something is off by more than it may be."""
    ends_as_interrupted()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(settings())))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--rounds", type=int, choices=range(1, 100), metavar="N", default=3)
    add_keep(parser)
    options = parser.parse_args()
    if options.part is not None:
        recipe = recipe_of(settings()[options.only[0]], options.model, options.rows, options.length)
        print(json.dumps(PARTS[options.part](recipe)))
        return 0
    heads = ("s, planned", "median", "off", "least", "off") if options.time else (
        "live MB, planned", "counted", "off", "process MB, planned", "veneer train", "off",
    )  # fmt: skip
    print(f"| | setting | {' | '.join(heads)} |\n{'| --- ' * (2 + len(heads))}|", flush=True)
    good, most = True, 0.0
    with tempfile.TemporaryDirectory() as folder:
        if options.model.startswith("random-"):
            options.model = random_model(options.model.removeprefix("random-"), Path(folder))
        for told, near, off in times(options) if options.time else (row(number, options) for number in options.only):
            print(told, flush=True)
            good, most = good and near, max(most, abs(off))
    keep(options.keep, {"seconds" if options.time else "memory": most})
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
