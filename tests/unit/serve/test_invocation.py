"""Adapters that act from their invocation tokens on, served: the answers are those of ``generate``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from veneer import LLM, LoraConfig, LoRARequest, PeftModel, SamplingParams
from veneer.errors import CompositionError
from veneer.serve.adapters.versions import Versions
from veneer.serve.program.effects import UnsaidError

from .conftest import byte_tokenizer, make_model, save_adapter

TOKENS = (7, 3)
FIRST = [5, 7, 3, *range(20, 60)]


def test_the_engine_answers_as_generate(tmp_path: Path):
    """Prompts begin alike and are acted on from different places; one has the tokens nowhere."""
    prompts = [FIRST, [*FIRST, 7, 3, 9], [*FIRST[3:], 9]]
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"], alora_invocation_tokens=TOKENS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    request = LoRARequest("alora", 1, str(save_adapter(tmp_path / "alora", config)))
    llm = LLM(make_model(), tokenizer=byte_tokenizer())
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    model = PeftModel.from_pretrained(make_model(), tmp_path / "alora")
    for _ in range(2):  # the second time from pages
        for prompt in prompts:
            found = llm.generate([{"prompt_token_ids": prompt}], params, lora_request=request)[0].outputs[0].token_ids
            ids = torch.tensor([prompt])
            expected = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
            assert list(found) == expected[0, len(prompt) :].tolist()


def test_pages_before_the_invocation_are_those_of_the_base(tmp_path: Path):
    """Read by either, found by the other; behind the tokens nothing is shared, though all tokens are equal."""
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=TOKENS)
    request = LoRARequest("alora", 1, str(save_adapter(tmp_path / "alora", config)))
    prompt = {"prompt_token_ids": [i % 50 + 10 for i in range(75)] + [7, 3, 9, 5, 7]}
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3)
    told = {}
    for order in ((None, request), (request, None)):
        llm = LLM(make_model(), tokenizer=byte_tokenizer(), block_size=16)
        for first in order:
            [answer] = llm.generate([prompt], params, lora_request=first)
            expected = told.setdefault(first, answer.outputs[0].logprobs)
            assert answer.outputs[0].logprobs == expected
            assert answer.num_cached_tokens == (0 if first is order[0] else 64)
    assert told[None] != told[request]


def test_it_is_no_part_of_a_mix(tmp_path: Path):
    config = LoraConfig(r=3, target_modules=["q_proj"], alora_invocation_tokens=TOKENS)
    part = LoRARequest("alora", 1, str(save_adapter(tmp_path / "alora", config)))
    with pytest.raises(CompositionError, match=r"/alora acts from its invocation tokens on, .* this adapter by itself"):
        Versions().of(LoRARequest.mix("mix", 2, [(part, 0.7)]))


def test_one_that_the_program_has_no_place_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unsaid(*given: object) -> None:
        raise UnsaidError("an update of q_proj")

    monkeypatch.setattr("veneer.serve.program.effects._put", unsaid)
    config = LoraConfig(r=3, target_modules=["q_proj"], alora_invocation_tokens=TOKENS)
    request = LoRARequest("alora", 1, str(save_adapter(tmp_path / "alora", config)))
    llm = LLM(make_model(), tokenizer=byte_tokenizer())
    with pytest.raises(
        CompositionError, match=r"acts from its invocation tokens on, and has an update of q_proj, which"
    ):
        llm.generate([{"prompt_token_ids": FIRST}], lora_request=request)
