"""Requests of all settings in one step: each has the answer that it has alone, and that of the specification."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer import LLM, SamplingParams, StructuredOutputsParams
from veneer.errors import ConfigError, NonFiniteError
from veneer.model.program import logits
from veneer.ops.sample import draw
from veneer.serve.requests import structured
from veneer.serve.runners import sampler

from .conftest import VOCAB, byte_tokenizer, make_model

PROMPTS = [list(b"the cat sat"), list(b"on"), list(b"a mat, and the cat")]
slowly = settings(max_examples=20)


@pytest.fixture(scope="module")
def llm(base_folder: Any) -> LLM:
    return LLM(base_folder)


@st.composite
def params(draw_from: st.DrawFn) -> SamplingParams:
    ids = st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=40, unique=True)
    some = lambda *values: draw_from(st.sampled_from(values))  # noqa: E731
    form = {"structured_outputs": StructuredOutputsParams(regex="[a-z ]{30}")}
    allowed = {"allowed_token_ids": draw_from(ids)}
    return SamplingParams(
        max_tokens=6,
        temperature=some(0.0, 0.0, 0.7, 1.0, 1.7),
        top_p=some(1.0, 0.8),
        top_k=some(0, 1, 20),
        min_p=some(0.0, 0.1),
        repetition_penalty=some(1.0, 1.05, 0.7),
        frequency_penalty=some(0.0, 1.5),
        presence_penalty=some(0.0, -0.4),
        logit_bias=some(None, {7: 5.0, 97: -100.0}),
        min_tokens=some(0, 4),
        bad_words=some(None, ["a", "th"]),
        logprobs=some(None, 0, 3),
        prompt_logprobs=some(None, None, 2),
        seed=some(None, 3, 2**63, -1),
        **some({}, {}, form, allowed),
    )


def generated(llm: LLM, prompts: list[Any], asked: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    return [(o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs]


@slowly
@given(asked=st.lists(params(), min_size=1, max_size=7))
def test_answers_are_the_specifications_and_those_alone(llm, asked):
    prompts = [PROMPTS[i % 3] for i in range(len(asked))]
    seeded = [each if each.seed is not None else with_seed(each, i) for i, each in enumerate(asked)]
    together = generated(llm, prompts, seeded)
    for prompt, each, found in zip(prompts, seeded, together, strict=True):
        assert generated(llm, [prompt], [each]) == [found]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "draw", partial(draw, backend="reference"))
        patch.setattr(logits, "LOGIT_BYTES", 2 * VOCAB * 4)  # two rows at a time
        for found, expected in zip(together, generated(llm, prompts, seeded), strict=True):
            assert found[:2] == expected[:2]
            assert [list(each) for each in found[2] or ()] == [list(each) for each in expected[2] or ()]


def with_seed(asked: SamplingParams, seed: int) -> SamplingParams:
    asked.seed = seed
    return asked


def test_logits_are_made_some_rows_at_a_time(llm, monkeypatch):
    """Of 3 answers and the 29 tokens of their prompts."""
    made = []
    monkeypatch.setattr(logits, "LOGIT_BYTES", 5 * VOCAB * 4)
    monkeypatch.setattr(sampler, "draw", lambda logits, rules: made.append(len(logits)) or draw(logits, rules))
    asked = SamplingParams(max_tokens=1, prompt_logprobs=1, seed=3)
    several = generated(llm, PROMPTS, [asked] * 3)
    assert max(made) == 5
    assert sum(made) == 3 + sum(len(prompt) - 1 for prompt in PROMPTS)
    monkeypatch.undo()
    assert generated(llm, PROMPTS, [asked] * 3) == several


def test_all_logprobs(llm):
    [output] = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=1, temperature=0, logprobs=-1), use_tqdm=False)
    [found] = output.outputs[0].logprobs
    with torch.no_grad():
        expected = torch.log_softmax(make_model()(torch.tensor([PROMPTS[0]])).logits[0, -1], dim=-1)
    assert len(found) == VOCAB
    torch.testing.assert_close(torch.tensor([found[i].logprob for i in range(VOCAB)]), expected, rtol=0, atol=1e-4)
    assert [found[i].rank for i in expected.argsort(descending=True).tolist()] == list(range(1, VOCAB + 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_own_request(tokenizer, temperature):
    """The row of one token is no number; a request without it goes on."""
    llm = LLM(make_model(), tokenizer=tokenizer)
    with torch.no_grad():
        llm.engine.runner.model.model.embed_tokens.weight[200] = float("nan")
    asked = SamplingParams(max_tokens=3, temperature=temperature, seed=1, allowed_token_ids=[*range(97, 123)])
    [alone] = generated(llm, [PROMPTS[0]], [asked])
    ids = llm.enqueue([PROMPTS[0], [97, 200]], asked)
    good, bad = llm.wait_for_completion(use_tqdm=False)
    assert isinstance(bad.error, NonFiniteError)
    assert f"logits of request {ids[1]} are not finite" in str(bad.error)
    assert good.outputs[0].token_ids == alone[0]


class Counted:
    """llguidance's matcher, whose compilations are counted, with their threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        made = structured.LLMatcher

        class Matcher:
            grammar_from_regex = staticmethod(made.grammar_from_regex)

            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                self.threads.append(threading.current_thread().name)
                return made(*args, **kwargs)

        monkeypatch.setattr(structured, "LLMatcher", Matcher)


def test_a_grammar_is_compiled_once_by_whoever_asks(llm, monkeypatch):
    counted = Counted(monkeypatch)
    asked = SamplingParams(
        n=3, seed=5, max_tokens=8, bad_words=["x"], structured_outputs=StructuredOutputsParams(regex="[a-x]{5}!")
    )
    request = []
    thread = threading.Thread(target=lambda: request.append(llm.engine.asked(None, PROMPTS[0], asked)), name="asks")
    thread.start()
    thread.join()
    assert counted.threads == ["asks"]
    monkeypatch.setattr("veneer.serve.requests.checked._word_ids", None)  # words have been tokenized by then
    llm.engine.submit(request[0])
    while llm.engine.has_work:
        outputs = llm.engine.step()
    texts = [answer.text for answer in outputs[0].outputs]
    assert len(set(texts)) == 3
    assert all(len(text) == 6 and text.endswith("!") and "x" not in text for text in texts)
    monkeypatch.undo()
    assert [a.text for a in llm.generate([PROMPTS[0]], asked, use_tqdm=False)[0].outputs] == texts
    assert counted.threads == ["asks"]


def test_kept_grammars_are_bounded(monkeypatch):
    counted = Counted(monkeypatch)
    monkeypatch.setattr(structured, "_KEPT", 3)
    forms = structured.Forms(byte_tokenizer(), VOCAB, [256])
    asked = [StructuredOutputsParams(regex=f"{letter}+") for letter in "abcd"]
    for each in (*asked, asked[3], asked[1], asked[0], asked[1]):
        forms.form(each)
    assert (len(forms._grammars), len(counted.threads)) == (3, 5)
    monkeypatch.setattr(structured, "_KEPT_TEXT", 1)
    forms.form(asked[2])
    assert not forms._grammars
    with pytest.raises(ConfigError, match="cannot be compiled"):
        forms.form(StructuredOutputsParams(regex="("))
