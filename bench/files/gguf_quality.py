"""Quality of GGUF types: ``python -m bench.files.gguf_quality MODEL_FOLDER --text TEXT --task TRAIN EVAL``.

First table: every type's size, bits a weight, perplexity of a text and KL divergence from the float32 model, by the
weights that the file decodes to, computed in float32; and, where cyllama is installed, llama.cpp's own perplexity: it
rounds what goes into the products too. Second table: LoRAs are trained on a task (prompt and completion) by a recipe,
one a seed, and each goes two ways into Q4_K_M and Q8_0: merged and then quantized, or as an adapter beside the
quantized base. Both are compared with the float32 model under the adapter on held-out completions; the difference is
told with its 95% interval over the adapters; both must be nearer to it than the base alone is. Where xllamacpp is
installed, llama.cpp makes the second table again, with the file of `veneer export lora`, from its probabilities of the
first token of every completion.

Give it a model whose weights have never been in 4 bits: one that `bench/files/scratch_model.py` makes, or a real one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from bench.files.llama_cpp_logits import all_logits, has_cyllama, has_xllamacpp, next_log_probs
from bench.same import PartedError
from veneer.adapters.peft_model import PeftModel
from veneer.export.gguf.adapter import export_lora
from veneer.export.gguf.model import GgufOptions, GgufReport, export_gguf
from veneer.recipe.recipe import load_recipe
from veneer.store.bars import quiet
from veneer.store.source import load_model
from veneer.train.run import run_recipe

TYPES = (
    *(
        "F16",
        "Q8_0",
        "Q6_K",
        "Q5_K_M",
        "Q5_K_S",
        "Q5_1",
        "Q5_0",
        "Q4_K_M",
        "Q4_K_S",
        "Q4_1",
        "Q4_0",
        "IQ4_NL",
        "IQ4_XS",
    ),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)
COMPARED = ("Q8_0", "Q4_K_M")
WAYS = ("merged, then quantized", "quantized, adapter beside")
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
RECIPE = """
model: {{source: {model}, dtype: float32, quantization: {quantization}}}
adapter: {{method: lora, r: 16, lora_alpha: 32, target_modules: all-linear}}
data: {{train: {data}, train_on: answers}}
training:
  max_steps: {steps}
  per_device_train_batch_size: 16
  learning_rate: 2.0e-3
  lr_scheduler_type: cosine
  warmup_steps: 0.1
  max_length: 256
  bf16: false
  save_steps: 100000
output: {output}
seed: {seed}
"""


@dataclass(frozen=True)
class Passage:
    """Token ids (n,), of which those from ``first`` on are predicted and scored."""

    ids: Tensor
    first: int


@dataclass(frozen=True)
class Cost:
    """Perplexity, and KL divergence from the reference in nats a token."""

    perplexity: float
    divergence: float


def windows(text: str, tokenizer: transformers.PreTrainedTokenizerBase, number: int, size: int = 256) -> list[Passage]:
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False)[: number * size])
    return [Passage(piece, 1) for piece in ids.split(size)]


def completions(path: Path, tokenizer: transformers.PreTrainedTokenizerBase, number: int) -> list[Passage]:
    passages = []
    for line in path.read_text().splitlines()[:number]:
        row = json.loads(line)
        prompt, answer = (tokenizer.encode(row[part], add_special_tokens=False) for part in ("prompt", "completion"))
        passages.append(Passage(torch.tensor([*prompt, *answer, tokenizer.eos_token_id]), len(prompt)))
    return passages


@torch.no_grad()
def log_probs(model: nn.Module, passage: Passage) -> Tensor:
    """Return log-probabilities at every scored token's place (scored, vocabulary)."""
    logits = model(input_ids=passage.ids[None]).logits[0, passage.first - 1 : -1]
    return logits.float().log_softmax(-1)


def cost(found: Iterable[Tensor], references: Sequence[Tensor], passages: Sequence[Passage]) -> Cost:
    """Return the cost of distributions (scored, vocabulary), one tensor a passage, beside the reference's."""
    surprise = divergence = n_tokens = 0.0
    for ours, reference, passage in zip(found, references, passages, strict=True):
        targets = passage.ids[passage.first : passage.first + len(ours)]
        surprise -= float(ours.gather(1, targets[:, None]).sum())
        divergence += float((reference.exp() * (reference - ours)).sum())
        n_tokens += len(ours)
    return Cost(math.exp(surprise / n_tokens), divergence / n_tokens)


def export(model: Path, target: Path, kind: str, adapter: Path | None = None) -> GgufReport:
    return export_gguf(model, target, GgufOptions(type=kind, dtype="float32", overwrite=True), adapter=adapter)


def write(model: Path, target: Path, kind: str, adapter: Path | None = None) -> Path:
    return export(model, target, kind, adapter).paths[0]


def decoded(file: Path) -> nn.Module:
    """The model with the weights that a file decodes to, in float32."""
    return load_model(str(file), dtype="float32").eval()


def types(model: Path, passages: Sequence[Passage], scratch: Path) -> None:
    whole = load_model(str(model), dtype="float32").eval()
    references = [log_probs(whole, passage) for passage in passages]
    n_weights = sum(parameter.numel() for parameter in whole.parameters())  # tied ones once
    print("| type | MB | bits | perplexity | KL, nats a token | perplexity in llama.cpp |\n| --- |" + " --- |" * 5)
    exact = cost(references, references, passages)
    print(f"| float32 | {n_weights * 4 / 1e6:.2f} | 32.00 | {exact.perplexity:.3f} | 0 | |", flush=True)
    for kind in TYPES:
        report = export(model, scratch / "x.gguf", kind)
        file = report.paths[0]
        quantized = decoded(file)
        found = cost((log_probs(quantized, passage) for passage in passages), references, passages)
        theirs = ""
        if has_cyllama:
            there = all_logits(file, [passage.ids for passage in passages])
            theirs = f"{cost((each[:-1].log_softmax(-1) for each in there), references, passages).perplexity:.3f}"
        bits = 8 * sum(spec.nbytes for spec in report.plan.specs) / n_weights
        print(
            f"| {kind} | {report.n_bytes / 1e6:.2f} | {bits:.2f} | {found.perplexity:.3f} "
            f"| {found.divergence:.2g} | {theirs} |",
            flush=True,
        )


def train(model: Path, data: Path, steps: int, seed: int, folder: Path, quantization: str = "none") -> Path:
    """The folder of a LoRA trained on a task."""
    output, recipe = folder / f"run{seed}", folder / f"{seed}.yaml"
    places = {"model": model.resolve(), "data": data.resolve(), "output": output}
    recipe.write_text(RECIPE.format(**places, quantization=quantization, steps=steps, seed=seed))
    with quiet():
        run_recipe(load_recipe(recipe))
    return output / "adapter"


def two_ways(
    model: Path, adapter: Path, kind: str, passages: Sequence[Passage], references: Sequence[Tensor], scratch: Path
) -> tuple[Cost, Cost]:
    """Merged and then quantized; quantized with the adapter beside it."""
    merged = decoded(write(model, scratch / "merged.gguf", kind, adapter))
    beside = PeftModel.from_pretrained(decoded(write(model, scratch / "base.gguf", kind)), adapter).eval()
    first, second = (
        cost((log_probs(side, passage) for passage in passages), references, passages) for side in (merged, beside)
    )
    return first, second


def two_ways_in_llama_cpp(
    model: Path, adapter: Path, kind: str, passages: Sequence[Passage], references: Sequence[Tensor], scratch: Path
) -> tuple[Cost, Cost]:
    """The same of the first token of every completion, by llama.cpp and the adapter's own file."""
    prompts = [passage.ids[: passage.first].tolist() for passage in passages]
    export_lora(adapter, scratch / "lora.gguf", base=str(model), overwrite=True)
    merged = next_log_probs(write(model, scratch / "merged.gguf", kind, adapter), prompts, references[0].shape[1])
    base = write(model, scratch / "base.gguf", kind)
    beside = next_log_probs(base, prompts, references[0].shape[1], scratch / "lora.gguf")
    firsts = [reference[:1] for reference in references]
    return cost(merged, firsts, passages), cost(beside, firsts, passages)


def require_heard(what: str, pairs: Sequence[tuple[Cost, Cost]], moved: float) -> None:
    """PartedError where a way is as far from the adapted model as the base alone, whose divergence is ``moved``."""
    for way, costs in zip(WAYS, zip(*pairs, strict=True), strict=True):
        divergence = statistics.mean(each.divergence for each in costs)
        if not divergence < moved / 2:
            raise PartedError(f"{what}, {way}: KL {divergence:.3g}, and the base's is {moved:.3g}: no adapter is heard")


def show(title: str, kind: str, pairs: Sequence[tuple[Cost, Cost]]) -> None:
    for way, costs in zip(WAYS, zip(*pairs, strict=True), strict=True):
        perplexity = statistics.mean(each.perplexity for each in costs)
        divergence = statistics.mean(each.divergence for each in costs)
        print(f"| {title} | {kind} | {way} | {perplexity:.4f} | {divergence:.3g} |")
    for name in ("perplexity", "divergence"):
        differences = [getattr(beside, name) - getattr(merged, name) for merged, beside in pairs]
        half = STUDENT[len(pairs)] * statistics.stdev(differences) / math.sqrt(len(pairs))
        print(f"  {name}, beside less merged: {statistics.mean(differences):+.3g} ± {half:.2g}", flush=True)


def adapters(model: Path, trained: Sequence[Path], passages: Sequence[Passage], scratch: Path) -> None:
    base = load_model(str(model), dtype="float32").eval()
    before = [log_probs(base, passage) for passage in passages]
    references = []
    for adapter in trained:
        adapted = PeftModel.from_pretrained(load_model(str(model), dtype="float32"), adapter).eval()
        references.append([log_probs(adapted, passage) for passage in passages])
    exact = [cost(each, each, passages).perplexity for each in references]
    moved = [cost(before, each, passages).divergence for each in references]
    print(f"\nbase: perplexity {cost(before, before, passages).perplexity:.3f}; with the adapters in float32: ", end="")
    print(f"{statistics.mean(exact):.4f}; KL of the base from them {statistics.mean(moved):.3g}")
    print("| by | type | way | perplexity | KL, nats a token |\n| --- |" + " --- |" * 4, flush=True)
    sides: list[tuple[str, Callable[..., tuple[Cost, Cost]]]] = [("decoded weights", two_ways)]
    if has_xllamacpp:
        sides.append(("llama.cpp, first token", two_ways_in_llama_cpp))
    for title, side in sides:
        for kind in COMPARED:
            pairs = [
                side(model, adapter, kind, passages, reference, scratch)
                for adapter, reference in zip(trained, references, strict=True)
            ]
            require_heard(f"{title}, {kind}", pairs, statistics.mean(moved))
            show(title, kind, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="plain text; the first table")
    parser.add_argument("--windows", type=int, default=32, help="of 256 tokens of the text")
    parser.add_argument("--task", type=Path, nargs=2, metavar=("TRAIN", "EVAL"), help="JSONL; the second table")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows")
    parser.add_argument("--steps", type=int, default=60, help="of 16 rows")
    parser.add_argument("--adapters", type=int, default=5, choices=STUDENT)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if given.text:
            types(given.model, windows(given.text.read_text(), tokenizer, given.windows), scratch)
        if given.task:
            data, held_out = given.task
            trained = [train(given.model, data, given.steps, seed, scratch) for seed in range(given.adapters)]
            adapters(given.model, trained, completions(held_out, tokenizer, given.rows), scratch)


if __name__ == "__main__":
    main()
