"""Adapters whose values differ, and requests of an engine in this process, for the benchmarks of many adapters."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from veneer import LLM, LoraConfig, LoRARequest, SamplingParams, get_peft_model
from veneer.serve.schedule.sampling_params import RequestOutputKind
from veneer.store.source import load_model


def engine_of(model: str, **options: Any) -> LLM:
    return LLM(model, dtype="bfloat16", enable_prefix_caching=False, **options)


def ask(llm: LLM, prompt: Sequence[int], n_tokens: int, adapter: LoRARequest | None = None, **order: Any) -> str:
    """Submit a request whose answer is read as it grows; its id."""
    params = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    asked = llm.engine.asked(None, prompt, params, adapter, **order)
    llm.engine.submit(asked)
    return asked.id


def prompt_of(number: int, n: int = 32) -> list[int]:
    return [(number * 31 + i * 7) % 200 + 1 for i in range(n)]


def write_adapters(model: str, folder: Path, n: int, config: LoraConfig) -> list[LoRARequest]:
    """Adapters of one config whose values differ; all but the first are written without a model."""
    adapted = get_peft_model(load_model(model, dtype=torch.bfloat16), config)
    adapted.save_pretrained(first := folder / "0")
    tensors = load_file(first / "adapter_model.safetensors")
    made = []
    for number in range(n):
        torch.manual_seed(number)
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        if number:
            shutil.copy(first / "adapter_config.json", place)
        save_file({k: 0.02 * torch.randn_like(x) for k, x in tensors.items()}, place / "adapter_model.safetensors")
        made.append(LoRARequest(f"a{number}", number + 1, str(place)))
    return made


def finish(llm: LLM) -> None:
    """Step until nothing is left."""
    while llm.engine.has_work or llm.engine.scheduler.has_work:
        if not llm.engine.has_work:
            llm.engine.wait()
        llm.engine.step()
