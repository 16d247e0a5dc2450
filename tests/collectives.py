"""The messages that a process of a run sends to the others, counted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch import forkserver


class Sent(TorchDispatchMode):
    """Lists each collective: its name, and the bytes of its tensors of each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [tensor for given in args for tensor in (given if isinstance(given, list) else [given])]
            n_bytes: Counter[str] = Counter()
            for tensor in (each for each in tensors if isinstance(each, torch.Tensor)):
                n_bytes[str(tensor.dtype)] += tensor.nbytes
            self.found.append((func._schema.name.removeprefix("c10d::"), dict(n_bytes)))
        return func(*args, **(kwargs or {}))


def quantized_run(base: Path, output: Path, sent: Path, environment: Mapping[str, str], **settings: Any) -> BaseProcess:
    """A process of a run on a base in NF4. It writes what it has sent, and the bytes of codes and adapter, as JSON."""
    process = forkserver().Process(target=_run, args=(base, output, sent, dict(environment), settings))
    process.start()
    return process


def _run(base: Path, output: Path, sent: Path, environment: dict[str, str], settings: dict[str, Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veneer import BitsAndBytesConfig, LoraConfig, SFTConfig, SFTTrainer

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    rows = Dataset.from_list([{"input_ids": [(i + 3 * j) % 43 + 2 for j in range(9)]} for i in range(24)])
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4),
        SFTConfig(
            str(output), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, bf16=False,
            save_strategy="no", report_to="none", disable_tqdm=True, **settings,
        ),
        train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=3, target_modules="all-linear"),
    )  # fmt: skip
    codes = sum(buffer.nbytes for buffer in trainer.model.buffers() if buffer.dtype == torch.uint8)
    adapter = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    with Sent() as mode:
        trainer.train()
    sent.write_text(json.dumps({"sent": mode.found, "codes": codes, "adapter": adapter}))
