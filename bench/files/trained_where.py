"""Losses of adapters for a quantized base, trained on it or on the model in float32.

    python -m bench.files.trained_where MODEL_FOLDER --task TRAIN EVAL

A LoRA is trained on the same rows with the same seed on the model in float32, and on each quantized copy of it. The
loss of held-out completions is measured of four models: the float32 model under its adapter (the reference), and

(a) the quantized base under the adapter of the float32 model;
(b) the quantized base under the adapter that was trained on it;
(c) the base of (b) with its adapter merged in and quantized again.

Where xllamacpp is installed, llama.cpp answers too, on the GGUF file of (b) with the adapter's file of `veneer export
lora`: its probabilities of the first token of each completion beside veneer's.

Formats: Q8_0 and Q4_K_M as GGUF files, NF4, GPTQ's layout (4 bits, groups of 32, each weight rounded to the nearest: no
calibration), MXFP4. Losses are told beside the reference's, with 95% intervals over the seeds.

Give it a model whose weights have never been in 4 bits: one that `bench/files/scratch_model.py` makes, or a real one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.files.gguf_quality import STUDENT, Passage, completions, cost, export, log_probs, train
from bench.files.llama_cpp_logits import has_xllamacpp, next_log_probs
from bench.report import Rows, add_keep, ends_as_interrupted, keep, working
from bench.same import PartedError
from veneer import BitsAndBytesConfig
from veneer.adapters.peft_model import PeftModel
from veneer.export.gguf.adapter import export_lora
from veneer.ops.bits import pack
from veneer.quant.mxfp4 import Mxfp4Spec
from veneer.store.source import load_model

GROUP = 32
WAYS = ("a: trained in float32", "b: trained on it", "c: b, merged and quantized again")


@dataclass(frozen=True)
class Base:
    """A model on disk, and what a recipe says of it."""

    place: Path
    quantization: str = "none"

    def load(self) -> nn.Module:
        """The model, computing in float32."""
        options = {} if self.quantization == "none" else {"quantization": NF4}
        return load_model(str(self.place), dtype="float32", **options).eval()


NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)


def as_gguf(kind: str) -> Callable[[Path, Path], Base]:
    def make(model: Path, folder: Path) -> Base:
        return Base(export(model, folder / f"{kind}.gguf", kind).paths[0])

    return make


def as_nf4(model: Path, folder: Path) -> Base:
    return Base(model, "nf4")


def coded_folder(config: dict[str, object], encode: Callable[[Tensor], dict[str, Tensor]]) -> Callable[..., Base]:
    """Writes a folder whose linear layers, less the head, are encoded."""

    def make(model: Path, folder: Path) -> Base:
        target = folder / "coded"
        shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
        held: dict[str, Tensor] = {}
        for name, value in load_file(model / "model.safetensors").items():
            if name.endswith("_proj.weight"):
                parts = encode(value.float())
                held |= {f"{name.removesuffix('weight')}{part}": each.contiguous() for part, each in parts.items()}
            else:
                held[name] = value
        save_file(held, target / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
        return Base(target)

    return make


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """Weight (o, i) in GPTQ's layout: 4 bits, the range of each 32 inputs divided evenly."""
    o, i = weight.shape
    groups = weight.view(o, -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)  # they are stored less one
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15).view(o, i)
    return {
        "qweight": pack(codes.to(torch.uint8), 4).view(torch.int32).T,
        "qzeros": pack((zeros - 1).T.contiguous().to(torch.uint8), 4).view(torch.int32),
        "scales": scales.T,
        "g_idx": (torch.arange(i) // GROUP).to(torch.int32),
    }


def mxfp4(weight: Tensor) -> dict[str, Tensor]:
    """Weight (o, i) in MXFP4, as compressed-tensors keeps it."""
    spec = Mxfp4Spec((weight.shape[0], weight.shape[1]))
    return spec.to_disk(spec.quantize(weight))


OF_GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
    "checkpoint_format": "gptq",
}  # fmt: skip
OF_MXFP4 = {
    "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head"],
    "quantization_status": "compressed", "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    }}},
}  # fmt: skip
FORMATS: dict[str, Callable[[Path, Path], Base]] = {
    "Q8_0": as_gguf("Q8_0"),
    "Q4_K_M": as_gguf("Q4_K_M"),
    "NF4": as_nf4,
    "GPTQ 4": coded_folder(OF_GPTQ, gptq),
    "MXFP4": coded_folder(OF_MXFP4, mxfp4),
}


def loss(model: nn.Module, passages: Sequence[Passage]) -> float:
    """Mean over all scored tokens, in nats."""
    told, n_tokens = 0.0, 0
    for passage in passages:
        found = log_probs(model, passage)
        told -= float(found.gather(1, passage.ids[passage.first :, None]).sum())
        n_tokens += len(found)
    return told / n_tokens


def adapted(base: Base, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(base.load(), adapter).eval()


def three_ways(
    model: Path, kind: str, of_float32: Path, passages: Sequence[Passage], args: argparse.Namespace, seed: int,
    folder: Path,
) -> tuple[float, float, float]:  # fmt: skip
    base = FORMATS[kind](model, made(folder / "base"))
    own = train(base.place, args.task[0], args.steps, seed, folder, base.quantization)
    merged = PeftModel.from_pretrained(base.load(), own).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder / "merged")
    again = FORMATS[kind](folder / "merged", made(folder / "again"))
    return (
        loss(adapted(base, of_float32), passages),
        loss(adapted(base, own), passages),
        loss(again.load(), passages),
    )


def beside_llama_cpp(base: Path, adapter: Path, passages: Sequence[Passage], folder: Path) -> tuple[float, float]:
    """KL divergence of llama.cpp's first tokens from veneer's, nats a token, and the share of equal likeliest ones."""
    export_lora(adapter, folder / "lora.gguf", base=str(base))
    model = adapted(Base(base), adapter)
    ours = [log_probs(model, passage)[:1] for passage in passages]
    prompts = [passage.ids[: passage.first].tolist() for passage in passages]
    theirs = next_log_probs(base, prompts, ours[0].shape[1], folder / "lora.gguf")
    same = sum(bool(a.argmax() == b.argmax()) for a, b in zip(theirs, ours, strict=True))
    return cost(theirs, ours, passages).divergence, same / len(passages)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def interval(values: Sequence[float]) -> str:
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.4f} ± {half:.4f}"


def main() -> None:
    args = parse()
    ends_as_interrupted()
    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    passages = completions(args.task[1], tokenizer, args.rows)
    references: list[float] = []
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in args.formats}
    there: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(args.seeds):
            folder = made(Path(name) / str(seed))
            working(f"seed {seed + 1} of {args.seeds}: float32")
            of_float32 = train(args.model, args.task[0], args.steps, seed, folder)
            references.append(loss(adapted(Base(args.model), of_float32), passages))
            for kind in args.formats:
                working(f"seed {seed + 1} of {args.seeds}: {kind}")
                place = made(folder / kind.replace(" ", "-"))
                found[kind].append(three_ways(args.model, kind, of_float32, passages, args, seed, place))
                if has_xllamacpp and (file := place / "base" / f"{kind}.gguf").exists():
                    adapter = place / f"run{seed}" / "adapter"
                    there.setdefault(kind, []).append(beside_llama_cpp(file, adapter, passages, place))
    show(args, loss(Base(args.model).load(), passages), references, found)
    for kind, compared in there.items():
        divergence, same = (statistics.mean(values) for values in zip(*compared, strict=True))
        print(f"{kind} in llama.cpp with --lora: KL {divergence:.2g} nats a token, {same:.1%} the same token")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", type=Path, nargs=2, metavar=("TRAIN", "EVAL"), required=True, help="JSONL")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--rows", type=int, default=100, help="held-out rows")
    parser.add_argument("--steps", type=int, default=60, help="of 16 rows")
    parser.add_argument("--seeds", type=int, default=4, choices=STUDENT)
    parser.add_argument("--threads", type=int, default=2)
    add_keep(parser)
    return parser.parse_args()


def show(
    args: argparse.Namespace,
    before: float,
    references: Sequence[float],
    found: dict[str, list[tuple[float, float, float]]],
) -> None:
    """Print losses beyond the reference's, each seed beside its own. PartedError where they are nearer the base's."""
    reference = statistics.mean(references)
    print(f"loss of the base {before:.4f}, in float32 with the adapters {reference:.4f}")
    rows, figures = Rows(found, [*WAYS, "b less a, in nats", "c less b, in nats"]), dict[str, float]()
    for kind, losses in found.items():
        by_way = list(zip(*losses, strict=True))
        for name, way in zip(WAYS, by_way, strict=True):
            if not statistics.mean(way) < (before + reference) / 2:
                raise PartedError(f"{kind}, {name}: loss {statistics.mean(way):.4f}: no adapter is heard")
        beyond = [[value - at for value, at in zip(way, references, strict=True)] for way in by_way]
        a, b, c = by_way
        gains = [[y - x for x, y in zip(*pair, strict=True)] for pair in ((a, b), (b, c))]
        rows.add(kind, *(interval(values) for values in [*beyond, *gains]))
        figures[kind] = statistics.mean(gains[0])
    keep(args.keep, figures)


if __name__ == "__main__":
    main()
