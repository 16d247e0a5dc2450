"""Log-probabilities of drawn answers, by the engine that drew them and by the training pass, in float32.

    python -m bench.training.policy_difference --gguf FILE --into FILE.jsonl [--model smollm2-135m-instruct]

Twelve methods, whose adapters change the logits, on a dense, an NF4, an int8 and a GGUF base. Each pair answers 33
prompts of 1 to 33 tokens with 64 tokens at temperature 1: 101,376 tokens in all. Each finished pair is a line of the
file, and a second start goes on behind it. Goals: at most 1e-3 nats a token, and 1e-4 in the mean.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import add_keep, keep, quiet_libraries, working
from bench.same import stir
from bench.training.methods import METHODS, SEVEN

BASES = ("dense", "nf4", "int8", "gguf")
N_ROWS, N_TOKENS = 33, 64
MORE = {
    "loha": ("LoHaConfig", {"r": 8, "alpha": 16, "target_modules": list(SEVEN)}),
    "oft": ("OFTConfig", {"oft_block_size": 32, "target_modules": list(SEVEN)}),
}
LARGEST, LARGEST_MEAN = 1e-3, 1e-4
TEXT = (
    "Each morning the keeper of the light climbs the stairs, reads the glass and the wind, writes both into a book, "
    "and waits for the boat that brings letters and bread."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--gguf", type=Path, required=True, help="the same model, by `veneer export gguf`")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    add_keep(parser)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(options.threads)
    lines = options.into.read_text().splitlines() if options.into.exists() else []
    found = [json.loads(line) for line in lines]
    known = {(each["base"], each["method"]) for each in found}
    methods = {**METHODS, **MORE}
    for method, (config, values) in methods.items():
        for base in BASES:
            if (base, method) in known:
                continue
            working(f"{method} on {base}")
            began = time.process_time()
            told = {"base": base, "method": method, **differences(options, base, config, values)}
            told["cpu"] = time.process_time() - began
            found.append(told)
            with options.into.open("a") as file:
                file.write(json.dumps(told) + "\n")
    tell(found, options)


def differences(options: argparse.Namespace, base: str, config: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the number of tokens, and the largest and the summed difference of their log-probabilities."""
    import veneer
    from veneer.adapters.token_scores import PreferenceScoring, token_scores
    from veneer.model.fused.decoder import fused
    from veneer.recipe.parts import ModelPart
    from veneer.store.source import load_tokenizer
    from veneer.train.base_model import load_base

    quantization = base if base in ("nf4", "int8") else "none"
    source = str(options.gguf) if base == "gguf" else options.model
    model = load_base(ModelPart(source=source, dtype="float32", quantization=quantization)).requires_grad_(False)
    tokenizer = load_tokenizer(options.model)
    own = getattr(veneer, config)(**values)
    memory = "beside" if base == "gguf" else "one"  # as recipes choose
    rollouts = veneer.Rollouts(model, tokenizer, memory=memory)
    torch.manual_seed(3)
    with torch.no_grad():
        model = stir(veneer.get_peft_model(model, own))
    text = tokenizer(TEXT)["input_ids"]
    prompts = [text[: 1 + n % len(text)] for n in range(N_ROWS)]
    params = veneer.SamplingParams(temperature=1.0, max_tokens=N_TOKENS, ignore_eos=True)
    drawn = [each.answers[0] for each in rollouts.draw(prompts, params, key=(1,))]
    width = max(map(len, prompts)) + N_TOKENS
    ids, mask = torch.zeros(2, N_ROWS, width, dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, drawn, strict=True)):
        told = [*prompt, *answer.token_ids]
        ids[row, width - len(told) :], mask[row, width - len(told) :] = torch.tensor(told), 1
    labels = ids.clone()
    labels[:, :-N_TOKENS] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad(), fused(model.eval()):
        scored = token_scores(model, inputs, PreferenceScoring(details=False)).log_probs[:, -N_TOKENS:]
    parted = (scored - torch.tensor([each.logprobs for each in drawn])).double().abs()
    return {"tokens": parted.numel(), "largest": float(parted.max()), "sum": float(parted.sum())}


def tell(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the differences of each pair, and of all."""
    n = sum(each["tokens"] for each in found)
    largest, mean = max(each["largest"] for each in found), sum(each["sum"] for each in found) / n
    for each in sorted(found, key=lambda own: (own["method"], own["base"])):
        own_mean = each["sum"] / each["tokens"]
        print(f"{each['method']:12} {each['base']:6} largest {each['largest']:.1e}, mean {own_mean:.1e}")
    beyond = sum(each["largest"] > LARGEST for each in found)
    print(f"{len(found)} pairs, {n:,} tokens: largest {largest:.1e} (goal {LARGEST}), mean {mean:.1e} ({LARGEST_MEAN})")
    print(f"{beyond} pairs have a token beyond the goal")
    keep(options.keep, {"largest": largest, "mean": mean})


if __name__ == "__main__":
    main()
