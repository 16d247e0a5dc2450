"""Requests as they come to a server: at random times, for adapters of all methods of which a few are asked for most."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from veneer import (
    LLM,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    LoRARequest,
    PrefixTuningConfig,
    PromptTuningConfig,
    SamplingParams,
    VeraConfig,
)
from veneer.serve.schedule.outputs import CompletionOutput

from ..model.blueprint.families import model_of
from .conftest import make_model, save_adapter

N_ADAPTERS, N_REQUESTS, PER_STEP, HOT = 64, 150, 0.9, 1.1
PROMPTS = [[7 * i * i % 251 + 1 for i in range(1, n + 1)] for n in (3, 19, 7, 11)]
RANKS = (1, 2, 3, 5, 7, 11)


def config_of(number: int) -> Any:
    """Methods and ranks in turn, so that the ones asked for most are of all kinds."""
    rank, every = RANKS[number % len(RANKS)], ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    targets = every[number % 3 :: 1 + number % 2]
    match number % 8:
        case 0 | 1:
            return LoraConfig(r=rank, lora_alpha=rank + 3, target_modules=targets, use_rslora=number % 3 == 1)
        case 2:
            return LoraConfig(r=rank, lora_alpha=5, use_dora=True, target_modules=targets)
        case 3:
            return IA3Config(target_modules=targets, feedforward_modules=[t for t in targets if t == "down_proj"])
        case 4:
            return VeraConfig(r=rank + 1, target_modules=["q_proj", "v_proj"])
        case 5:
            return BottleneckConfig(reduction_factor=3 + number % 5)
        case 6:
            return PrefixTuningConfig(num_virtual_tokens=1 + number % 5)
    return PromptTuningConfig(num_virtual_tokens=1 + number % 7)


def asked_for(draw: random.Random) -> int:
    """An adapter by Zipf's law, or the base."""
    weights = [1 / (1 + number) ** HOT for number in range(N_ADAPTERS)]
    return draw.choices([-1, *range(N_ADAPTERS)], [0.5, *weights])[0]


def arrivals(draw: random.Random) -> int:
    """Requests that come before the next step, Poisson's law."""
    n, left = 0, draw.expovariate(PER_STEP)
    while left < 1:
        n, left = n + 1, left + draw.expovariate(PER_STEP)
    return n


def told(output: CompletionOutput) -> Any:
    return output.token_ids, output.logprobs, output.finish_reason


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[LoRARequest]:
    folder = tmp_path_factory.mktemp("traffic")
    saved = [save_adapter(folder / str(n), config_of(n), seed=n) for n in range(N_ADAPTERS)]
    return [LoRARequest(f"a{n}", n + 1, str(each)) for n, each in enumerate(saved)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_answer_is_that_of_the_request_alone(dtype, made, tokenizer):
    """To the bit, base rows among them; places for nine adapters, so that they come and go, and prompts in chunks."""
    draw = random.Random(11)
    model = make_model().to(dtype)
    llm = LLM(
        model, tokenizer=tokenizer, max_loras=6, max_cpu_loras=9, max_num_seqs=11, max_num_batched_tokens=23,
        max_model_len=40,
    )  # fmt: skip
    waiting = [
        (
            asked_for(draw),
            draw.choice(PROMPTS),
            SamplingParams(temperature=0, max_tokens=draw.randint(1, 9), logprobs=1),
        )
        for _ in range(N_REQUESTS)
    ]
    asked, answers = dict[str, Any](), dict[str, Any]()
    while waiting or len(answers) < N_REQUESTS:
        for adapter, prompt, params in [waiting.pop() for _ in range(min(arrivals(draw), len(waiting)))]:
            one = llm.engine.asked(None, prompt, params, made[adapter] if adapter >= 0 else None)
            asked[one.id] = (adapter, prompt, params)
            llm.engine.submit(one)
        if not llm.engine.has_work:
            llm.engine.wait(0.01)
        answers |= {output.request_id: told(output.outputs[0]) for output in llm.engine.step() if output.finished}
    alone = LLM(model, tokenizer=tokenizer)
    known = dict[Any, Any]()
    for id, (adapter, prompt, params) in asked.items():
        key = adapter, len(prompt), params.max_tokens
        if key not in known:
            lora = made[adapter] if adapter >= 0 else None
            [output] = alone.generate([prompt], params, lora_request=lora, use_tqdm=False)
            known[key] = told(output.outputs[0])
        assert answers[id] == known[key], config_of(adapter)
    assert len({adapter for adapter, *_ in asked.values()}) > 30
    assert len(llm.engine.pool.resident) <= 9
    assert llm.engine.scheduler.pages.n_held == 0


@pytest.mark.parametrize("family", ["olmo2", "granite", "cohere2", "glm4", "starcoder2"])
def test_families_that_other_tests_of_serving_do_not_use(family, tokenizer):
    """Greedy in float32, in chunks and together: token for token what transformers' generate gives."""
    model = model_of(family, torch.float32)
    prompts = [[(5 * i * i + n) % 96 + 1 for i in range(n)] for n in (1, 13, 6)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=17, do_sample=False)
        expected.append(found[0, len(prompt) :].tolist())
    llm = LLM(model, tokenizer=tokenizer, max_num_batched_tokens=5, block_size=4)
    assert not llm.engine.settings.why_general
    params = SamplingParams(temperature=0, max_tokens=17, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert len({tuple(answer) for answer in expected}) == 3


def test_a_name_with_other_weights_is_another_adapter(tokenizer, tmp_path):
    """In one batch too: each request has the weights that its name meant when it came."""
    folders = [save_adapter(tmp_path / str(n), LoraConfig(r=3, target_modules=["v_proj"]), seed=n) for n in range(3)]
    requests = [LoRARequest("same", n + 1, str(folder)) for n, folder in enumerate(folders)]
    params = SamplingParams(temperature=0, max_tokens=7)
    llm, expected = LLM(make_model(), tokenizer=tokenizer), []
    for request in requests:
        [output] = LLM(make_model(), tokenizer=tokenizer).generate(
            [PROMPTS[1]], params, lora_request=request, use_tqdm=False
        )
        expected.append(output.outputs[0].token_ids)
    assert len({tuple(each) for each in expected}) == 3
    for _ in range(2):  # what was asked before changes nothing
        outputs = llm.generate([PROMPTS[1]] * 3, params, lora_request=requests, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
