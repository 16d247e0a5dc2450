"""Log-probabilities of prompts in ``/v1/completions``, as OpenAI's clients and lm-evaluation-harness read them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.serve.conftest import byte_tokenizer
from transformers import AutoModelForCausalLM

from veneer.serve.http import answers
from veneer.serve.requests.answer import decoded
from veneer.serve.schedule.outputs import Logprob
from veneer.serve.start import EngineOptions

from .test_server import Server

TEXTS = ("the cat sat on the mat", "na\u00efve \u2014 caf\u00e9", "x")
CHUNK = 5


@pytest.fixture(scope="module")
def model(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["whole", "chunks"])
def server(request, base_folder) -> Iterator[Server]:
    chunks = {} if request.param == "whole" else {"max_num_batched_tokens": CHUNK, "max_num_seqs": CHUNK}
    running = Server(base_folder, base_folder / "none", options=EngineOptions(dtype="float32", **chunks))
    yield running
    running.stop()


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def likelihoods(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (n, vocabulary) of what follows each token."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def scored(server: Server, prompt, **given):
    body = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 1}
    return server.client.completions.create(**body | given)


def check(model, ids: list[int], found, n_answered: int) -> None:
    """The lists are those of a prompt and its answer, by the model itself."""
    lists = [found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset]
    assert {len(each) for each in lists} == {len(ids) + n_answered}
    assert (found.token_logprobs[0], found.top_logprobs[0], found.text_offset[0]) == (None, None, 0)
    right = likelihoods(model, ids)
    own = right[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=2e-4)
    best = right.max(-1).values.tolist()
    assert [max(each.values()) for each in found.top_logprobs[1:]] == pytest.approx(
        best[: len(own) + n_answered], abs=2e-4
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_has_the_log_probabilities_of_the_model(server, model, text, max_tokens):
    server.client.completions.create(model="tiny", prompt=text, max_tokens=1)  # its pages are in the cache now
    ids = ids_of(text)
    of_text, of_ids = (scored(server, prompt, max_tokens=max_tokens) for prompt in (text, ids))
    assert of_text.choices[0].logprobs == of_ids.choices[0].logprobs
    assert of_ids.choices[0].text == of_text.choices[0].text
    assert of_text.choices[0].text.startswith(text)
    assert (of_text.choices[0].text == text) == (max_tokens == 0)
    assert (of_text.usage.completion_tokens, of_text.choices[0].finish_reason) == (max_tokens, "length")
    assert not hasattr(of_text.choices[0], "prompt_logprobs")
    check(model, ids, of_text.choices[0].logprobs, max_tokens)


def test_offsets_are_the_places_of_tokens_in_the_text(server):
    text = TEXTS[1]
    found = scored(server, text, max_tokens=0).choices[0].logprobs
    places = [place for place, letter in enumerate(text) for _ in letter.encode()]
    assert found.text_offset == places
    plain = [(token, place) for token, place in zip(found.tokens, places, strict=True) if token != "\ufffd"]
    assert plain == [(letter, place) for place, letter in enumerate(text) if letter.isascii()]


def test_several_prompts_and_answers_each_have_theirs(server, model):
    prompts = [ids_of(text) for text in TEXTS]
    given = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 3}
    whole = scored(server, prompts, **given).choices
    assert [choice.index for choice in whole] == list(range(6))
    for place, ids in enumerate(prompts):
        for choice in whole[2 * place : 2 * place + 2]:
            ids_read = ids + ids_of(choice.text[len(TEXTS[place]) :])
            assert choice.logprobs.tokens[: len(ids)] == scored(server, ids, max_tokens=0).choices[0].logprobs.tokens
            assert len(choice.logprobs.tokens) == len(ids) + 3
            assert len(ids_read) >= len(ids)
    streamed = {part.choices[0].index: part.choices[0] for part in scored(server, prompts, stream=True, **given)}
    assert [(c.text, c.logprobs, c.finish_reason) for c in whole] == [
        (c.text, c.logprobs, c.finish_reason) for _, c in sorted(streamed.items())
    ]


def test_their_number_is_logprobs_and_prompt_logprobs_come_beside_if_asked_for(server):
    counts = [len(scored(server, "abcdef", logprobs=n).choices[0].logprobs.top_logprobs[3]) for n in (0, 5)]
    assert counts[0] == 1
    assert counts[1] in (5, 6)
    both = scored(server, "abcdef", logprobs=1, extra_body={"prompt_logprobs": 4}).choices[0]
    assert len(both.prompt_logprobs) == 6
    assert len(both.logprobs.top_logprobs[3]) in (4, 5)
    assert server.documented("/v1/completions", {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0})


def test_an_echo_of_ids_is_their_text(server):
    answer = server.client.completions.create(model="tiny", prompt=[97, 98], echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("ab", None)


def test_the_harness_finds_the_likelihoods_of_the_model(server, model, tmp_path):
    for name in ("lm_eval", "tenacity", "aiohttp"):  # lm-eval[api]
        pytest.importorskip(name, reason=f"{name} is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    byte_tokenizer().save_pretrained(tmp_path)
    harness = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer=str(tmp_path),
        tokenizer_backend="huggingface", batch_size=2, max_length=127,
    )  # fmt: skip
    pairs = [(f"question {i}:", answer) for i in range(3) for answer in (" yes", " no")]
    asked = [Instance("loglikelihood", {}, pair, place, metadata=("t", place, 1)) for place, pair in enumerate(pairs)]
    found = harness.loglikelihood(asked, disable_tqdm=True)
    for (context, answer), (told, _) in zip(pairs, found, strict=True):
        ids, n = ids_of(context + answer), len(ids_of(context))
        right = likelihoods(model, ids)
        own = right[n - 1 : -1].gather(1, torch.tensor(ids[n:])[:, None]).sum()
        assert told == pytest.approx(float(own), abs=1e-3)
    assert json.dumps(found)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(ANYTHING, st.integers(0, 6))
def test_pieces_of_json_are_the_json_of_the_whole(value, levels):
    assert "".join(answers._json(value, levels)) == json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("streams", [False, True])
def test_scores_of_prompts_are_written_piece_by_piece_beside_the_loop(streams, server, monkeypatch):
    """One call of the encoder, or the loop's thread, would keep all others waiting."""
    sizes, threads = list[int](), set[str]()

    def encode(value):
        sizes.append(str(value).count("logprob"))
        threads.update({threading.current_thread().name} if sizes[-1] else ())
        return json.dumps(value, ensure_ascii=False)

    monkeypatch.setattr(answers, "_ENCODE", encode)
    prompts = [[7 + i * k % 90 for i in range(41)] for k in (1, 5)]
    found = scored(server, prompts, extra_body={"prompt_logprobs": 3}, stream=streams)
    assert len(list(found) if streams else found.choices) >= 2
    assert sizes
    assert max(sizes) <= 4  # of one token
    assert all(name.startswith("veneer bodies") for name in threads)


def test_the_text_of_a_token_is_decoded_once():
    tokenizer, calls = byte_tokenizer(), list[int]()
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: calls.extend(ids) or decode(ids)
    scores = {id: Logprob(-1.0, 1, None) for id in (70, 71)}
    first, again = (decoded(scores, tokenizer) for _ in range(2))
    assert first == again
    assert [each.decoded_token for each in first.values()] == [decode([70]), decode([71])]
    assert calls == [70, 71]
