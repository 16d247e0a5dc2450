"""Greedy answers of the engine are those of transformers' generate, token for token, whoever shares the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from veneer import LLM, AdaptionPromptConfig, LoRARequest, PeftModel, SamplingParams, get_peft_model
from veneer.serve.runners.general_runner import GeneralRunner
from veneer.serve.runners.program_runner import ProgramRunner

from .conftest import END, FAMILIES, METHODS, make_model

LENGTH = 7
PROMPTS = [[7 * i * i % 251 + 1 for i in range(1, n + 1)] for n in (1, 5, 13, 2, 23, 9)]


def generated(model: Any, prompt: list[int], **how: Any) -> list[int]:
    """The answers of `generate`."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, **how)
    return out[0, len(prompt) :].tolist()


def answers(llm: LLM, prompts: Any, adapters: list[LoRARequest | None] | None = None, n: int = LENGTH) -> Any:
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=n), lora_request=adapters, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "wide"])  # that is a Llama
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"max_num_batched_tokens": 3, "block_size": 4},
        {"max_num_seqs": 2, "max_num_batched_tokens": 7, "block_size": 1},
        {"general_runner": True, "max_num_batched_tokens": 5, "block_size": 4},
    ],
)
def test_greedy_is_generate(family, how, tokenizer):
    model = make_model(family)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert len({len(set(answer)) for answer in expected}) > 1  # not all alike
    llm = LLM(make_model(family), tokenizer=tokenizer, **how)
    assert isinstance(llm.engine.runner, GeneralRunner if "general_runner" in how else ProgramRunner)
    assert answers(llm, PROMPTS) == expected
    assert answers(llm, PROMPTS[::-1]) == expected[::-1]


@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize(("family", "general"), [("llama", False), ("llama", True), ("gemma3", False), ("gpt2", False)])
def test_preempted_or_not(family, general, caches, tokenizer):
    """Pages for little more than one request: the newest is put back and computed again, with the same answer."""
    heads = {"llama": 1, "gemma3": 1, "gpt2": 3}[family]
    position_bytes = 2 * 2 * heads * 8 * 4  # keys and values, layers, heads, their width, bytes
    llm = LLM(
        make_model(family),
        tokenizer=tokenizer,
        block_size=3,
        max_model_len=36,
        general_runner=general,
        kv_cache_memory_bytes=39 * position_bytes,
        enable_prefix_caching=caches,
    )
    requests = []
    add = llm.engine.scheduler.add
    llm.engine.scheduler.add = lambda request: (requests.append(request), add(request))[1]  # type: ignore[func-returns-value]
    expected = [generated(make_model(family), prompt) for prompt in PROMPTS]
    assert answers(llm, PROMPTS) == expected
    assert sum(request.n_preempted for request in requests) > (0 if caches else 2)
    assert llm.engine.scheduler.pages.n_held == 0


@pytest.fixture(scope="module")
def peft_model(adapters) -> PeftModel:
    model: Any = make_model()
    for name, request in adapters.items():
        model = PeftModel.from_pretrained(model, request.path, adapter_name=name)
    return model


@pytest.mark.parametrize("general", [False, True])
def test_every_method_in_one_batch(adapters, peft_model, tokenizer, general):
    """Base, and one request for each method, in chunks of three tokens: each is what `generate` answers for it."""
    llm = LLM(make_model(), tokenizer=tokenizer, max_num_batched_tokens=17, general_runner=general)
    names = ["__base__", *METHODS, "lora", "__base__"]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(names))]
    expected = [generated(peft_model, p, adapter_names=[name]) for p, name in zip(prompts, names, strict=True)]
    assert len({tuple(answer) for answer in expected}) > 10
    asked = [adapters.get(name) for name in names]
    together = answers(llm, prompts, asked)
    assert together == expected
    for i in range(0, len(names), 3):
        assert answers(llm, [prompts[i]], [asked[i]]) == [expected[i]]
    assert general or llm.engine.runner.general is None  # the program has a place for all of them


@pytest.mark.parametrize("general", [False, True])
def test_prompts_beside_attention_run_on_the_general_runner(tokenizer, tmp_path, general):
    adapted, folder = get_peft_model(make_model(), AdaptionPromptConfig(adapter_len=3, adapter_layers=2)), tmp_path
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("adaption_gate"):
                parameter += 3
    adapted.eval().save_pretrained(folder)
    expected = [generated(model, PROMPTS[2]) for model in (adapted, make_model())]
    assert expected[0] != expected[1]
    llm = LLM(make_model(), tokenizer=tokenizer, max_num_batched_tokens=7, general_runner=general)
    asked = [LoRARequest("attended", 1, str(folder)), None]
    assert answers(llm, [PROMPTS[2]] * 2, asked) == expected


def test_with_fewer_places_than_adapters(adapters, peft_model, tokenizer):
    """Two adapters at once on the model: the others are loaded in turn, and the answers stay."""
    llm = LLM(make_model(), tokenizer=tokenizer, max_loras=2, max_num_batched_tokens=17)
    names = [*METHODS, *list(METHODS)[:4]]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(names))]
    asked: list[LoRARequest | None] = [adapters[name] for name in names]
    expected = [generated(peft_model, p, adapter_names=[name]) for p, name in zip(prompts, names, strict=True)]
    assert answers(llm, prompts, asked) == expected
    assert len(llm.engine.pool.resident) == 2
    assert len(llm.engine.runner.loaded) == 2


def test_four_bit_base(adapters, base_folder):
    """Rows on an NF4 base are what they are alone."""
    llm = LLM(base_folder, quantization="bitsandbytes", dtype="float32")
    asked = [None, *(adapters[name] for name in ("lora", "dora", "ia3", "bottleneck", "prefix", "prompt"))]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(asked))]
    together = answers(llm, prompts, asked, n=4)
    assert [answers(llm, [p], [a], n=4)[0] for p, a in zip(prompts, asked, strict=True)] == together
    assert together[0] != answers(LLM(base_folder), prompts[:1], n=4)[0]


def test_the_end_token_ends(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[END] = model.lm_head.weight[generated(model, PROMPTS[2])[4]] * 1.5
    expected = generated(model, PROMPTS[2])
    assert len(expected) < LENGTH
    llm = LLM(model, tokenizer=tokenizer)
    [output] = llm.generate([PROMPTS[2]], SamplingParams(temperature=0, max_tokens=LENGTH), use_tqdm=False)
    assert output.outputs[0].token_ids == expected
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    longer = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    [on] = llm.generate([PROMPTS[2]], longer, use_tqdm=False)
    assert (len(on.outputs[0].token_ids), on.outputs[0].finish_reason) == (LENGTH, "length")
