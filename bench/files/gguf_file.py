"""A GGUF file as a base, in its blocks and as a dense copy: time until the first step, of a step, and peak memory.

    python -m bench.files.gguf_file model.Q4_K_M.gguf [--rows 4] [--tokens 256] [--rounds 3]
    python -m bench.files.gguf_file model.Q4_K_M.gguf --first [--rounds 3]
    python -m bench.files.gguf_file model.Q4_K_M.gguf --enlarge big.gguf

Each side is a process of its own, in turns; medians are printed. Logits, gradients and losses are compared. A step is
LoRA of rank 16 on all linear layers. Memory is the growth of the process's high-water mark of resident memory over what
it was after the imports, without the pages of the file that were mapped. ``--first`` times the opening of a file that
the cache does not know, until its first step can begin: with the file's pages in memory, and on the disk alone, beside
the time that the disk takes to read the file. ``--enlarge`` writes a Llama of 1.5 billion random weights, types and
tokenizer as in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import Rows, done, working

SIDES = ("blocks", "dense")
LARGER = {"embedding_length": 2048, "feed_forward_length": 8192, "block_count": 24, "attention.head_count": 32}
LARGER |= {"attention.head_count_kv": 8, "rope.dimension_count": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--enlarge", type=Path, metavar="OUT")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, behind the first one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dropped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.enlarge:
        enlarge(args.file, args.enlarge)
    elif args.first and not args.side:
        first_openings(args)
    elif args.side:
        measure(args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    same_course(args)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
    for turn in range(args.rounds):
        for side in args.sides:
            working(f"round {turn}, {side}")
            command = [sys.executable, "-m", "bench.files.gguf_file", *sys.argv[1:], "--side", side]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side].append(json.loads(result.stdout.splitlines()[-1]))
    done()
    losses = [runs[0]["loss"] for runs in found.values()]
    if max(losses) - min(losses) > 5e-4 * losses[0]:  # the dense copy holds 16 bits
        sys.exit(f"the sides differ in their first loss, {losses}: nothing to compare")
    rows = Rows(args.sides, ("open s", "step s", "peak MB", "of it kept"))
    for side, runs in found.items():
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.add(
            side, f"{median['opened']:.2f}", f"{median['step']:.3f}", f"{median['peak']:.0f}", f"{median['kept']:.0f}"
        )


def same_course(args: argparse.Namespace) -> None:
    """SystemExit if the model computes something else in its blocks than in a dense copy."""
    import torch

    from bench.lora_step import adapted
    from bench.same import course, require_same, stir
    from veneer.store.source import load_model

    courses = []
    for side in SIDES:
        torch.manual_seed(0)
        model = stir(adapted("veneer", load_model(args.file, gguf=side)))
        ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
        courses.append(course("veneer", model, ids))
    require_same("blocks and a dense copy", courses[1], courses[0])


def first_openings(args: argparse.Namespace) -> None:
    """Open the file in processes whose cache is empty, with its pages in memory and without."""
    places = ("pages in memory", "pages on the disk")
    found: dict[str, list[dict[str, float]]] = {place: [] for place in places}
    reading = []
    command = [sys.executable, "-m", "bench.files.gguf_file", *sys.argv[1:], "--side", "blocks"]
    for turn in range(args.rounds):
        reading.append(seconds_to_read(args.file))
        for place in places:
            working(f"round {turn}, {place}")
            with tempfile.TemporaryDirectory() as cache:
                environment = {**os.environ, "VENEER_CACHE": cache}
                side = command + ["--dropped"] * (place == places[1])
                result = subprocess.run(side, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found[place].append(json.loads(result.stdout.splitlines()[-1]))
    rows = Rows(places, ("open s", "CPU s", "disk s"))
    for place, runs in found.items():
        opened, cpu = (statistics.median(run[name] for run in runs) for name in ("opened", "cpu"))
        rows.add(place, f"{opened:.2f}", f"{cpu:.2f}", f"{statistics.median(reading):.2f}")
    rate = args.file.stat().st_size / 1e6 / statistics.median(reading)
    print(f"the disk gives {rate:.0f} MB/s")


def drop_pages(file: Path) -> None:
    """Take a file's pages out of memory."""
    with file.open("rb") as held:
        os.fsync(held.fileno())
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(file: Path) -> float:
    """The time in which the disk gives a file; its pages are in memory afterwards."""
    drop_pages(file)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as held:
        while held.read(1 << 22):
            pass
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> None:
    """Open the file and take some steps in this process, and print what they took; only open it for ``--first``."""
    import torch

    from bench.lora_step import adapted, optimizer_of, step
    from bench.resident import high_water_mb
    from veneer.store.source import load_model

    torch.manual_seed(0)
    before = high_water_mb()
    if args.dropped:
        drop_pages(args.file)
    start, cpu = time.perf_counter(), time.process_time()
    model = adapted("veneer", load_model(args.file, dtype=torch.float32, gguf=args.side))
    optimizer = optimizer_of(model)
    opened, cpu = time.perf_counter() - start, time.process_time() - cpu
    if args.first:
        print(json.dumps({"opened": opened, "cpu": cpu}))
        return
    kept = sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())
    ids = torch.randint(1000, (args.rows, args.tokens), generator=torch.Generator().manual_seed(1))
    loss = step("veneer", model, optimizer, ids)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step("veneer", model, optimizer, ids)
        seconds.append(time.perf_counter() - start)
    peak = high_water_mb() - before - (mapped_mb(args.file) if args.side == "blocks" else 0)
    kept_mb = kept / 2**20 - (args.file.stat().st_size / 2**20 if args.side == "blocks" else 0)
    told = {"opened": opened, "step": statistics.median(seconds), "peak": peak, "kept": kept_mb, "loss": loss}
    print(json.dumps(told))


def mapped_mb(file: Path) -> float:
    """Resident pages of a mapped file."""
    total, within = 0.0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split(maxsplit=5)
        if "-" in name[0] and not name[0].endswith(":"):
            within = len(name) == 6 and name[5] == str(file.resolve())
        elif within and line.startswith("Rss:"):
            total += int(name[1]) / 1024
    return total


def enlarge(source: Path, out: Path) -> None:
    """Write a Llama of `LARGER` sizes with random blocks: those of one quantized row, over and over."""
    import gguf
    import numpy as np
    import torch

    from veneer.ops.ggml import quantize_ggml

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value: Any = LARGER.get(name.removeprefix("llama."), field.contents())
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub)
    widths = ("embedding_length", "feed_forward_length")
    new = {int(reader.fields[f"llama.{name}"].contents()): LARGER[name] for name in widths}
    heads = [int(reader.fields[f"llama.attention.{name}"].contents()) for name in ("head_count", "head_count_kv")]
    kept = next(iter(new)) // heads[0] * heads[1]  # outputs of k and v
    new[kept] = LARGER["embedding_length"] // LARGER["attention.head_count"] * LARGER["attention.head_count_kv"]
    tensors = {t.name: t for t in reader.tensors}
    blocks = LARGER["block_count"]
    names = [n for n in tensors if not n.startswith("blk.")]
    names += [n.replace("blk.0.", f"blk.{b}.") for b in range(blocks) for n in tensors if n.startswith("blk.0.")]
    for name in names:
        known = tensors.get(name) or tensors["blk.0." + name.split(".", 2)[2]]
        shape = [new.get(int(n), int(n)) for n in reversed(known.shape)]
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        kind = "Q6_K" if name.startswith("token_embd") or "ffn_down" in name else "Q4_K"
        row = quantize_ggml(torch.randn(1, shape[1]) * 0.02, kind).numpy()
        writer.add_tensor(name, np.repeat(row, shape[0], axis=0), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
