"""Adapters of every kind of term, served in one batch: each row has the probabilities of its adapter on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.serve.conftest import make_model, save_adapter

from veneer import (
    LLM,
    ArrowConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    CartridgeConfig,
    DeloraConfig,
    GloraConfig,
    HiraConfig,
    LilyConfig,
    LoKrConfig,
    LoRARequest,
    MissConfig,
    OFTConfig,
    PeftModel,
    PolyConfig,
    RoadConfig,
    SamplingParams,
    ShiraConfig,
    SupertuningConfig,
)
from veneer.errors import CompositionError

ADAPTERS: dict[str, Any] = {
    "pair": MissConfig(r=7, target_modules=["q_proj", "down_proj"]),
    "pair with a core": DeloraConfig(r=3, target_modules=["q_proj", "up_proj"]),
    "bias": BeftConfig(target_modules=["v_proj", "o_proj"]),
    "circulant change": C3AConfig(block_size=4, target_modules=["q_proj", "down_proj"]),
    "change that reads the weight": HiraConfig(r=9, target_modules=["embed_tokens", "v_proj", "down_proj"]),
    "pair and change that read the weight": GloraConfig(r=9, target_modules=["q_proj", "v_proj", "down_proj"]),
    "prefix with frozen tokens": CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, task_type="CAUSAL_LM"),
    "sparse change": ShiraConfig(r=3, target_modules=["q_proj", "down_proj"]),
    "Kronecker product and pair": LoKrConfig(r=2, target_modules=["v_proj", "gate_proj"]),
    "sparse change and pair": SupertuningConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "rotation of inputs": OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rotation and scale": BOFTConfig(target_modules=["q_proj", "down_proj"]),
    "rotation of outputs": RoadConfig(variant="road_4", group_size=4, target_modules=["q_proj", "gate_proj"]),
    "mixture by token": ArrowConfig(top_k=2, n_experts=3, r=5, target_modules=["q_proj", "down_proj"]),
}
PROMPT = [5, 99, 41, 7, 18, 61]


@pytest.mark.parametrize("general", [False, True])
def test_each_row_is_as_on_the_model(general, tokenizer, tmp_path):
    asked = [
        LoRARequest(name, number, str(save_adapter(tmp_path / str(number), config, seed=number)))
        for number, (name, config) in enumerate(ADAPTERS.items(), start=1)
    ]
    llm = LLM(make_model(), tokenizer=tokenizer, general_runner=general)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    answers = llm.generate([{"prompt_token_ids": PROMPT}] * len(asked), params, lora_request=asked)
    with torch.no_grad():
        plain = make_model()(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        for request, answer in zip(asked, answers, strict=True):
            model = PeftModel.from_pretrained(make_model(), request.lora_path)
            wanted = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
            (token,) = answer.outputs[0].token_ids
            assert token == int(wanted.argmax()), request.lora_name
            assert answer.outputs[0].logprobs[0][token].logprob == pytest.approx(float(wanted[token]), abs=1e-5)
            assert (wanted - plain).abs().max() > 0.1, request.lora_name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LilyConfig(r=3, target_modules=["q_proj"]),
            "depends on the whole of a sequence, which the engine computes in",
        ),
        (PolyConfig(r=3, n_tasks=3, target_modules=["q_proj"]), "has 3 tasks, and a request names none"),
    ],
)
def test_what_a_request_cannot_ask_for(config, message, tokenizer, tmp_path):
    request = LoRARequest("one", 1, str(save_adapter(tmp_path, config)))
    with pytest.raises(CompositionError, match=message):
        LLM(make_model(), tokenizer=tokenizer).generate([{"prompt_token_ids": PROMPT}], lora_request=[request])
