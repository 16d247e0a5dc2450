"""Stage 5: tokens a second of the engine on a GPU, of the base and of many adapters, and what its time goes to.

    python -m bench.gpu.serving COUNT lora|dora [--rehearse]

A Llama of a billion random weights in bfloat16, with COUNT adapters of rank 16 on all linear layers. Prefill is counted
over prompts of 1024 tokens, decoding as the difference of two lengths of the answer, for 1 and for 32 rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.gpu.runner import figure
from bench.gpu.steps import SHAPES, random_llama
from bench.tiny_model import write_tokenizer
from veneer import LLM, LoraConfig, LoRARequest, SamplingParams, get_peft_model

SHORT, LONG = 8, 72  # tokens of an answer
TOP = 10  # operations of the profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("method", choices=("lora", "dora"))
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    size, length = ("tiny", 16) if args.rehearse else ("1b", 1024)
    device = torch.device("cpu" if args.rehearse else "cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_llama(folder / "model", size, device)
        write_tokenizer(folder / "model", SHAPES[size][-1])
        adapters = _adapters(folder, args.count, args.method)
        llm = LLM(
            str(folder / "model"), dtype="bfloat16", enable_prefix_caching=False, enable_lora=bool(adapters),
            max_loras=max(args.count, 1), max_lora_rank=16,
        )  # fmt: skip
        for rows in (1, 32):
            asked = _Asked(llm, rows, length, SHAPES[size][-1], adapters)
            asked.answer(SHORT)  # compiles
            prefill = asked.answer(1)
            decode = (asked.answer(LONG) - asked.answer(SHORT)) / (LONG - SHORT)
            figure(
                f"{rows} rows", prefill_tokens_per_s=rows * length / prefill, decode_ms=decode * 1e3,
                decode_tokens_per_s=rows / decode,
            )  # fmt: skip
        _profile(asked, device)


class _Asked:
    """Prompts of some rows, each with the next adapter."""

    def __init__(self, llm: LLM, rows: int, length: int, classes: int, adapters: list[LoRARequest]) -> None:
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(1, classes, (rows, length), generator=generator).tolist()
        self.llm, self.prompts = llm, [{"prompt_token_ids": each} for each in ids]
        self.adapters = [adapters[n % len(adapters)] if adapters else None for n in range(rows)]

    def answer(self, n_tokens: int) -> float:
        """Return the seconds of answers of so many tokens."""
        begin = time.perf_counter()
        asked: Any = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True)
        self.llm.generate(self.prompts, asked, lora_request=self.adapters, use_tqdm=False)
        return time.perf_counter() - begin


def _adapters(folder: Path, count: int, method: str) -> list[LoRARequest]:
    """Adapters with random factors. One skeleton of the model serves to write all of them."""
    if not count:
        return []
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    found = []
    for number in range(1, count + 1):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / f"adapter{number}")
        found.append(LoRARequest(f"adapter{number}", number, str(folder / f"adapter{number}")))
    return found


def _profile(asked: _Asked, device: torch.device) -> None:
    """The operations that take most time of decoding."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profile:
        asked.answer(SHORT)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events) or 1
    for event in events[:TOP]:
        figure(event.key[:60], calls=event.count, own_ms=getattr(event, own) / 1e3, share=getattr(event, own) / total)


if __name__ == "__main__":
    sys.exit(main())
