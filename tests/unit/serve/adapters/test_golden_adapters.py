"""Ten adapters that PEFT made (tests/golden/peft), served in one batch: each row has PEFT's probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LLM, LoRARequest, SamplingParams

GOLDEN = Path(__file__).parents[3] / "golden" / "peft" / "adapters.safetensors"
TENSORS = load_file(GOLDEN)
with safe_open(GOLDEN, "pt") as file:
    TEXTS = file.metadata()
NAMES = sorted(TEXTS.keys() - {"peft", "sizes"})


def stored(name: str) -> dict[str, torch.Tensor]:
    return {key.partition(":")[2]: value for key, value in TENSORS.items() if key.startswith(f"{name}:")}


def requests(folder: Path) -> list[LoRARequest]:
    """The adapters as folders."""
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(TEXTS[name])
        save_file(stored(name), folder / name / "adapter_model.safetensors", {"format": "pt"})
    return [LoRARequest(name, number, str(folder / name)) for number, name in enumerate(NAMES, start=1)]


@pytest.mark.parametrize("general", [False, True])
def test_ten_adapters_of_peft_in_one_batch(general: bool, tokenizer: Any, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**json.loads(TEXTS["sizes"]))).eval()
    model.load_state_dict(stored("base"))
    ids = TENSORS["ids"]
    llm = LLM(model, tokenizer=tokenizer, general_runner=general)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    asked = requests(tmp_path)
    answers = llm.generate([{"prompt_token_ids": ids[0].tolist()}] * len(asked), params, lora_request=asked)
    assert len(asked) == 10
    plain = TENSORS["plain"].log_softmax(-1)
    for name, answer in zip(NAMES, answers, strict=True):
        wanted = TENSORS[f"{name}=logits"].log_softmax(-1)
        (token,) = answer.outputs[0].token_ids
        assert token == int(wanted.argmax()), name
        assert answer.outputs[0].logprobs[0][token].logprob == pytest.approx(float(wanted[token]), abs=1e-5), name
        assert (wanted - plain).abs().max() > 0.1, name
