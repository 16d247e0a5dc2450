"""Adapters of every method in one batch of the engine: each has the tokens of `generate` on the adapted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models import llama_config, word_tokenizer
from veneer import LLM, LoRARequest, SamplingParams, get_peft_model
from veneer.contract import MethodConfig
from veneer.errors import CompositionError

from .conftest import CONFIGS as LINEAR
from .test_other_methods import CONFIGS as OTHERS

REFUSED = {"LILY": "depends on the whole of a sequence"}
CONFIGS: dict[str, MethodConfig] = LINEAR | OTHERS
SERVED = [name for name in CONFIGS if name not in REFUSED]
PROMPTS = [[5, 61, 2, 33, 17], [8, 8, 40, 1, 66, 12, 3, 21], [9, 50, 27]]
LENGTH = 4


def make_base() -> PreTrainedModel:
    """A float32 model with weights large enough that a leak shows."""
    torch.manual_seed(41)
    config = llama_config(hidden_size=28, num_attention_heads=7, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = 1
    return model


def moved(config: MethodConfig) -> Any:
    """A model with an adapter away from its start."""
    torch.manual_seed(43)
    model = get_peft_model(make_base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def generated(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, pad_token_id=1
        )
    return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LoRARequest, list[list[int]]]]:
    """A request for an adapter of each configuration, and the answers to the prompts on the model that was saved."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for number, (name, config) in enumerate(CONFIGS.items(), start=1):
        model = moved(config)
        model.save_pretrained(folder / name)
        answers = [] if name in REFUSED else [generated(model, prompt) for prompt in PROMPTS]
        found[name] = LoRARequest(name, number, str(folder / name)), answers
    return found


def made(general: bool) -> LLM:
    words = word_tokenizer([f"w{n}" for n in range(65)])
    return LLM(make_base(), tokenizer=words, general_runner=general, max_num_batched_tokens=61)


@pytest.mark.parametrize("general", [False, True], ids=["program", "general"])
def test_each_of_a_crowd_has_the_answer_of_generate(saved: Any, general: bool) -> None:
    asked = [(name, number) for number in range(len(PROMPTS)) for name in SERVED]
    outputs = made(general).generate(
        [{"prompt_token_ids": PROMPTS[number]} for _, number in asked],
        SamplingParams(temperature=0, max_tokens=LENGTH),
        lora_request=[saved[name][0] for name, _ in asked],
        use_tqdm=False,
    )
    found = {key: output.outputs[0].token_ids for key, output in zip(asked, outputs, strict=True)}
    expected = {(name, number): saved[name][1][number] for name, number in asked}
    wrong = {key: (found[key], expected[key]) for key in asked if found[key] != expected[key]}
    assert not wrong
    plain = [generated(make_base(), prompt) for prompt in PROMPTS]
    assert [name for name in SERVED if saved[name][1] == plain] == []  # each adapter shows


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_by_name(saved: Any, name: str) -> None:
    with pytest.raises(CompositionError, match=rf"\({name}\) {REFUSED[name]}"):
        made(False).generate([{"prompt_token_ids": PROMPTS[0]}], lora_request=[saved[name][0]], use_tqdm=False)
