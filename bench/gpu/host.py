"""Host time of a training step and of decode steps of 32 tiny layers: what a GPU would wait for. It needs no GPU.

    python -m bench.gpu.host [--turns 5]

One thread's CPU seconds, medians of turns. Products of such widths take microseconds, so that nearly all is Python and
torch's dispatch. A decode step runs instruction by instruction, as on a GPU, not in C++. What a launch of CUDA or of
Triton costs is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.tiny_model import write_tokenizer
from veneer import LLM, LoraConfig, LoRARequest, SamplingParams, get_peft_model
from veneer.model.fused.decoder import fuse

N_LAYERS, N_TOKENS, N_ROWS, RANK, CLASSES = 32, 48, 32, 8, 211
DECODED = {"bare": (0, False), "32 LoRA": (32, False), "32 DoRA": (32, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    steps = {"veneer": training_step(by_peft=False), "PEFT": training_step(by_peft=True)}
    for name, seconds in in_turns(steps, turns).items():
        print(f"a micro-batch, LoRA on all linear layers, {name}: {seconds * 1e3:.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        waits = {name: decode_step(Path(folder) / name, *how) for name, how in DECODED.items()}
        for name, seconds in in_turns(waits, turns).items():
            print(f"a decode step of {N_ROWS} rows, {name}: {seconds * 1e3:.1f} ms")


def in_turns(ways: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Return the median of what each way tells of itself, the ways taking turns; the first turn warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            seconds = way()
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(each) for name, each in found.items()}


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CLASSES, hidden_size=64, intermediate_size=96, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def training_step(*, by_peft: bool) -> Callable[[], float]:
    """Return a function that runs a forward and a backward pass, and returns its CPU seconds."""
    shape = {"r": RANK, "lora_alpha": 16, "target_modules": "all-linear"}
    model: Any = tiny_llama()
    if by_peft:
        model = peft.get_peft_model(model, peft.LoraConfig(**shape, task_type="CAUSAL_LM")).train()
    else:
        get_peft_model(model, LoraConfig(**shape))
        assert fuse(model.train())
    model.enable_input_require_grads()
    ids = torch.randint(CLASSES, (2, N_TOKENS // 2))
    mask = torch.ones_like(ids)

    def step() -> float:
        begin = time.process_time_ns()
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return (time.process_time_ns() - begin) / 1e9

    return step


def decode_step(folder: Path, n_adapters: int, dora: bool) -> Callable[[], float]:
    """Return a function that decodes some tokens in each of `N_ROWS` rows, and returns the CPU seconds of a step."""
    tiny_llama().save_pretrained(folder / "model")
    write_tokenizer(folder / "model", CLASSES)
    llm = LLM(
        str(folder / "model"), dtype="bfloat16", enable_prefix_caching=False, enable_lora=bool(n_adapters),
        max_loras=max(1, n_adapters), max_num_seqs=N_ROWS, kv_cache_memory_bytes=1 << 26,
    )  # fmt: skip
    runner = llm.engine.runner
    runner.interpreter.native = None
    for linears in runner.interpreter._linears:  # adapters are packed as for a GPU; values are not looked at
        linears.device = torch.device("cuda")
    adapters: list[LoRARequest | None] = [saved_adapter(folder, n, dora) for n in range(1, n_adapters + 1)]
    rows = adapters or [None] * N_ROWS
    prompts = [{"prompt_token_ids": [1 + (7 * n + i) % 200 for i in range(5)]} for n in range(N_ROWS)]
    run, seconds = runner.run, list[float]()

    def watched(plan: Any) -> Any:
        begin = time.process_time_ns()
        sampled = run(plan)
        if [len(each.tokens) for each in plan.sequences] == [1] * N_ROWS:
            seconds.append((time.process_time_ns() - begin) / 1e9)
        return sampled

    runner.run = watched

    def decode() -> float:
        seconds.clear()
        asked = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        llm.generate(prompts, asked, lora_request=rows, use_tqdm=False)
        assert len(seconds) >= 10
        return statistics.median(seconds)

    return decode


def saved_adapter(folder: Path, number: int, dora: bool) -> LoRARequest:
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / f"adapter{number}")
    return LoRARequest(f"adapter{number}", number, str(folder / f"adapter{number}"))


if __name__ == "__main__":
    main()
