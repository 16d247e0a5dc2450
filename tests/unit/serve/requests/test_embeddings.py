"""Embeddings are pooled hidden states of transformers' own pass, whoever shares the batch."""

from __future__ import annotations

import base64
import shutil
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
import torch
from tests.unit.serve.conftest import METHODS, make_model
from tests.unit.serve.http.test_server import Server
from tests.unit.serve.program.test_program import OWN, _saved, tied_model
from tests.unit.serve.test_llm_exact import PROMPTS
from torch import Tensor

from veneer import LLM, LoraConfig, LoRARequest, PeftModel, PoolingParams, SamplingParams
from veneer.errors import ConfigError, NonFiniteError
from veneer.model.program.logits import LogitRows

LAST, MEAN = PoolingParams(normalize=False), PoolingParams(pooling="mean", normalize=False)
IN_TORCH = ("oft", "lokr")  # which compute a part of their rows


def states(model: Any, prompt: Sequence[int], **how: Any) -> Tensor:
    """The hidden states of a prompt by transformers."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, **how)
    return out.hidden_states[-1][0, -len(prompt) :]


def embeddings(llm: LLM, prompts: Any, params: Any = LAST, adapters: Any = None) -> list[list[float]]:
    found = llm.embed(prompts, pooling_params=params, lora_request=adapters, use_tqdm=False)
    return [each.outputs.embedding for each in found]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("how", [{"max_num_batched_tokens": 3, "block_size": 4}, {"general_runner": True}])
def test_of_a_base(family, how, tokenizer):
    model, llm = make_model(family), LLM(make_model(family), tokenizer=tokenizer, **how)
    right = [states(model, prompt) for prompt in PROMPTS]
    found = torch.tensor(embeddings(llm, PROMPTS * 2, [LAST] * len(PROMPTS) + [MEAN] * len(PROMPTS)))
    expected = torch.stack([each[-1] for each in right] + [each.mean(dim=0) for each in right])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in found}) >= 2 * len(PROMPTS) - 1  # one prompt has one token
    assert llm.engine.scheduler.pages.n_held == 0


@pytest.mark.parametrize("general", [False, True])
def test_of_every_method_in_one_batch(adapters, tokenizer, general):
    model: Any = make_model()
    methods = ("lora", "oft", "prefix", "prompt", "saved") if general else tuple(METHODS)
    for name in methods:
        model = PeftModel.from_pretrained(model, adapters[name].path, adapter_name=name)
    llm = LLM(make_model(), tokenizer=tokenizer, max_num_batched_tokens=17, general_runner=general)
    names = ["__base__", *methods]
    prompts = [PROMPTS[1 + i % (len(PROMPTS) - 1)] for i in range(len(names))]
    params = [(LAST, MEAN)[i % 2] for i in range(len(names))]
    right = [states(model, p, adapter_names=[name]) for p, name in zip(prompts, names, strict=True)]
    expected = [each[-1] if own is LAST else each.mean(dim=0) for each, own in zip(right, params, strict=True)]
    asked = [adapters.get(name) for name in names]
    found = embeddings(llm, prompts, params, asked)
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected), rtol=1e-3, atol=1e-4)
    for i in () if general else range(len(names)):
        if names[i] not in IN_TORCH:
            assert embeddings(llm, [prompts[i]], params[i], [asked[i]]) == [found[i]]


def test_by_both_runners_in_one_step(tokenizer, tmp_path):
    """An adapter that the program has no place for, beside the base and an answer of its own."""
    config = LoraConfig(r=2, **OWN["kept tied"])
    folder = str(_saved(tmp_path / "x", tied_model(), config, 4))
    model, adapter = PeftModel.from_pretrained(tied_model(), folder), LoRARequest("x", 1, folder)
    llm = LLM(tied_model(), tokenizer=tokenizer, max_num_batched_tokens=11)
    llm.enqueue(PROMPTS[1:3], SamplingParams(temperature=0, max_tokens=9), lora_request=adapter)
    prompts, asked, params = PROMPTS[1:5], [adapter, None, adapter, None], [MEAN, MEAN, LAST, LAST]
    found = embeddings(llm, prompts, params, asked)
    answered = [each.outputs[0].token_ids for each in llm.wait_for_completion(use_tqdm=False)]
    assert llm.engine.runner.general.loaded
    assert answered == [
        model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS[1:3]
    ]
    right = [states(tied_model() if each is None else model, p) for p, each in zip(prompts, asked, strict=True)]
    expected = [each[-1] if own is LAST else each.mean(dim=0) for each, own in zip(right, params, strict=True)]
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_beside_answers_and_in_chunks(adapters, tokenizer):
    """Neither changes the other's bits."""
    llm = LLM(make_model(), tokenizer=tokenizer, enable_prefix_caching=False)
    alone = [embeddings(llm, PROMPTS, params, adapters["lora"]) for params in (LAST, MEAN)]
    greedy = SamplingParams(temperature=0, max_tokens=7)
    text = llm.generate(PROMPTS, greedy, use_tqdm=False)
    small = LLM(make_model(), tokenizer=tokenizer, enable_prefix_caching=False, max_num_batched_tokens=3)
    ids = small.enqueue(PROMPTS, greedy)
    assert [embeddings(small, PROMPTS, params, adapters["lora"]) for params in (LAST, MEAN)] == alone
    answers = small.wait_for_completion(use_tqdm=False)
    assert [each.request_id for each in answers] == ids
    assert [each.outputs[0].token_ids for each in answers] == [each.outputs[0].token_ids for each in text]


def test_preempted(tokenizer):
    """Rows that were added to a mean before a preemption are not added again."""
    position_bytes = 2 * 2 * 8 * 4  # keys and values, layers, their width, bytes
    llm = LLM(
        make_model(), tokenizer=tokenizer, block_size=3, max_model_len=36, max_num_batched_tokens=5,
        kv_cache_memory_bytes=39 * position_bytes,
    )  # fmt: skip
    requests = []
    add = llm.engine.scheduler.add
    llm.engine.scheduler.add = lambda request: (requests.append(request), add(request))[1]  # type: ignore[func-returns-value]
    greedy = SamplingParams(temperature=0, max_tokens=11)
    llm.enqueue(PROMPTS, greedy)
    prompts = [prompt[::-1] for prompt in PROMPTS]
    found = embeddings(llm, prompts, MEAN)
    llm.wait_for_completion(use_tqdm=False)
    assert any(request.n_preempted for request in requests)
    whole = embeddings(LLM(make_model(), tokenizer=tokenizer), prompts, MEAN)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(whole))


def test_the_prefix_cache_changes_nothing(tokenizer):
    llm, prompt = LLM(make_model(), tokenizer=tokenizer), PROMPTS[4]
    counts, found = [], []
    for params in (MEAN, LAST, MEAN, LAST):
        [each] = llm.embed([prompt], pooling_params=params, use_tqdm=False)
        counts.append(each.num_cached_tokens)
        found.append(each.outputs.embedding)
    assert counts == [0, len(prompt) - 1, 0, len(prompt) - 1]
    assert found[:2] == found[2:]
    [answer] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert answer.num_cached_tokens == len(prompt) - 1


def test_one_is_the_default_length(tokenizer):
    llm = LLM(make_model(), tokenizer=tokenizer)
    [one] = llm.embed("ab", use_tqdm=False)
    [[*plain]] = embeddings(llm, "ab")
    assert torch.tensor(one.outputs.embedding).norm() == pytest.approx(1, abs=1e-6)
    assert one.outputs.embedding == pytest.approx((torch.tensor(plain) / torch.tensor(plain).norm()).tolist())
    assert (one.outputs.hidden_size, one.prompt_token_ids, one.finished) == (24, [97, 98], True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pooling": "max"}, "pooling='max' must be one of last, mean"),
        ({"normalize": 1}, "normalize=1 must be True or False"),
        ({"dimensions": 8}, "dimensions is not offered"),
        ({"pooled": "mean"}, "has no field 'pooled'; did you mean 'pooling'"),
    ],
)
def test_what_is_no_pooling_is_told(given, said):
    with pytest.raises(ConfigError, match=said):
        PoolingParams(**given)


def test_states_that_are_not_finite_are_told(tokenizer, monkeypatch):
    llm = LLM(make_model(), tokenizer=tokenizer)
    monkeypatch.setattr(LogitRows, "hidden", lambda self: torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NonFiniteError, match="the hidden states of request 0 are not finite"):
        llm.embed("ab", use_tqdm=False)


@pytest.fixture(scope="module")
def server(base_folder, adapters, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(adapters["prefix"].path, folder / "prefix")
    running = Server(base_folder, folder)
    yield running
    running.stop()


def test_over_http(server, base_folder, adapters):
    llm, create = LLM(base_folder), server.client.embeddings.create
    right = embeddings(llm, ["ab", "cde"], PoolingParams(), adapters["prefix"])
    for given in (["ab", "cde"], [[97, 98], [99, 100, 101]]):
        for how in ({}, {"encoding_format": "float"}):
            answer = create(model="prefix", input=given, **how)
            assert [each.embedding for each in answer.data] == right
            assert [each.index for each in answer.data] == [0, 1]
            assert (answer.model, answer.object) == ("prefix", "list")
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)
    for one in ("ab", [97, 98]):
        assert create(model="prefix", input=one).data[0].embedding == right[0]
    extra = {"pooling": "mean", "normalize": False}
    assert create(model="tiny", input="cde", extra_body=extra).data[0].embedding == embeddings(llm, "cde", MEAN)[0]
    status, told = server.post("/v1/embeddings", {"model": "prefix", "input": "ab", "encoding_format": "base64"})
    assert status == 200
    assert list(struct.unpack("<24f", base64.b64decode(told["data"][0]["embedding"]))) == right[0]
    server.wait(lambda: server.is_idle)


@pytest.mark.parametrize(
    ("body", "status", "said", "param"),
    [
        ({"dimensions": 8}, 400, "dimensions: embeddings have the width of the model", "dimensions"),
        ({"input": []}, 400, "input is empty", "input"),
        ({"input": ""}, 400, "prompt is empty", None),
        ({"input": "x" * 127}, 400, "maximum context length is 127", None),
        ({"input": ["x"] * 129}, 400, "129 choices", "n"),
        ({"encoding_format": "int8"}, 400, "encoding_format: must be 'float' or 'base64'", "encoding_format"),
        ({"pooling": "max"}, 400, "pooling: must be 'last' or 'mean'", "pooling"),
        ({"inputs": "x"}, 400, "unknown field 'inputs'; did you mean 'input'", "inputs"),
        ({"model": "other"}, 404, "no model 'other'", "model"),
    ],
)
def test_what_is_wrong_over_http_is_told(server, body, status, said, param):
    found, told = server.post("/v1/embeddings", {"input": "x", **body})
    assert (found, told["error"]["param"]) == (status, param)
    assert said in told["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        server.client.embeddings.create(model="other", input="x")
