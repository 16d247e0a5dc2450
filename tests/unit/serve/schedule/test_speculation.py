"""Drafts change how many tokens a step gives, and never which: answers are those without them, bit for bit.

Most tests guess by the answer itself, which is known, with a wrong token at every few places.
"""

from __future__ import annotations

from collections import Counter as Counts
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.serve.conftest import FAMILIES, METHODS, make_model

from veneer import LLM, LoRARequest, SamplingParams
from veneer.errors import ConfigError
from veneer.serve.metrics import Counter
from veneer.serve.runners.general_runner import GeneralRunner
from veneer.serve.schedule.request import Request
from veneer.serve.schedule.sampling_params import RequestOutputKind, StructuredOutputsParams
from veneer.serve.schedule.speculation import Draft, SpeculativeConfig
from veneer.serve.schedule.step_plan import Sampled, StepPlan
from veneer.serve.schedule.stop_tokens import StopRule

PROMPTS = [[7 * i * i % 251 + 1 for i in range(1, n + 1)] for n in (1, 5, 13, 2, 23, 9)]
N = 19
FORM = StructuredOutputsParams(regex=r"(ab|[c-f]{3})(name: [0-9]{2}; ){1,2}[x-z]+")
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, at least seven": {"temperature": 0, "min_tokens": 7, "stop_token_ids": list(range(0, 263, 5))},
    "drawn": {"temperature": 1.3, "seed": 3},
    "drawn without a seed": {"temperature": 1.3},
    "filtered": {"temperature": 0.9, "top_p": 0.8, "top_k": 29, "min_p": 0.01, "seed": 5},
    "penalties": {
        "temperature": 0.8, "repetition_penalty": 1.7, "frequency_penalty": 0.4, "presence_penalty": 0.3, "seed": 7
    },
    "greedy penalties": {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.9},
    "log-probabilities": {"temperature": 0.7, "seed": 2, "logprobs": 3, "prompt_logprobs": 2},
    "biased": {"temperature": 0, "logit_bias": {11: 1.5, 200: -2.0}, "bad_words": ["ab", "c"]},
    "a few ids": {
        "temperature": 2.0, "seed": 4, "allowed_token_ids": list(range(40, 51)), "logprobs": 0,
        "repetition_penalty": 1.6,
    },
    "stop strings": {"temperature": 2.0, "seed": 4, "allowed_token_ids": [97, 98, 99], "stop": ["ab", "cc", "bcb"]},
    "stop strings, shown": {
        "temperature": 2.0, "seed": 6, "allowed_token_ids": [97, 98, 99], "stop": ["acb", "caab"], "min_tokens": 4,
        "include_stop_str_in_output": True, "logprobs": 1,
    },
    "a form": {"temperature": 0, "structured_outputs": FORM},
    "a form, drawn": {"temperature": 1.5, "seed": 8, "structured_outputs": FORM, "repetition_penalty": 1.2},
    "three answers": {"temperature": 1.1, "seed": 9, "n": 3, "logprobs": 2},
}  # fmt: skip


@dataclass(eq=False)
class Told:
    """A draft that knows the answer: every third of its guesses has a wrong token in its middle."""

    answers: dict[tuple[Any, ...], list[int]]
    lengths: Counts[int] = field(default_factory=Counts)
    n_tried: int = 0
    n_right: int = 0

    def tokens(self, request: Request, most: int, share: float) -> list[int]:
        number = len(request.output)
        known = self.answers[(request.prompt, request.version, request.id.partition("#")[2])]
        guess = known[number : number + min(most, 1 + number % 7)]
        if number % 3 == 1 and guess:
            guess[len(guess) // 2] = (guess[len(guess) // 2] + 1) % 256
        return guess

    def judge(self, request: Request, n_tried: int, n_right: int) -> None:
        self.n_tried += n_tried
        self.n_right += n_right
        self.lengths[n_right] += 1


def generated(llm: LLM, params: Any, prompts: Any = PROMPTS, adapters: Any = None, told: Told | None = None) -> Any:
    """Return the outputs of all answers, and their tokens by request."""
    known: dict[tuple[Any, ...], list[int]] = {}
    rules = llm.engine._rules
    rules.draft = lambda rule: told  # type: ignore[method-assign]
    requests = dict[str, Request]()
    add = llm.engine.scheduler.add
    llm.engine.scheduler.add = lambda request: (requests.update({request.id: request}), add(request))[1]  # type: ignore
    outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    llm.engine.scheduler.add = add  # type: ignore[method-assign]
    for request in requests.values():
        known[(request.prompt, request.version, request.id.partition("#")[2])] = list(request.output)
    return [(output.outputs, output.prompt_logprobs) for output in outputs], known


def plain(answers: Any) -> Any:
    """Answers without log-probabilities."""
    return [[replace(each, logprobs=None, cumulative_logprob=None) for each in outputs] for outputs, _ in answers]


def require_equal(make: Any, params: Any, prompts: Any = PROMPTS, adapters: Any = None, *, n_right: int = 9) -> LLM:
    """Answers with drafts are those without them; so many guesses at least were right.

    Rows of transformers' own code depend on those beside them, in the last bits.
    """
    expected, known = generated(make(), params, prompts, adapters)
    if isinstance(params, SamplingParams) and params.stop:  # guesses go on behind the end
        _, known = generated(make(), replace(params, stop=None), prompts, adapters)
    told, llm = Told(known), make()
    found, _ = generated(llm, params, prompts, adapters, told)
    if isinstance(llm.engine.runner, GeneralRunner):
        found, expected = plain(found), plain(expected)
    assert found == expected
    assert told.n_right >= n_right
    assert told.n_tried > told.n_right or n_right < 9
    assert llm.engine.scheduler.pages.n_held == 0
    return llm


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("general", [False, True])
def test_with_every_setting(setting, general, tokenizer):
    params = SamplingParams(**{"max_tokens": N} | SETTINGS[setting])
    prompts = PROMPTS[: 7 - 2 * params.n]  # of more rows nothing is tried
    made = lambda: LLM(make_model(), tokenizer=tokenizer, general_runner=general)  # noqa: E731
    require_equal(made, params, prompts, n_right=2 if params.stop else 9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how", [{}, {"max_num_batched_tokens": 5, "block_size": 4}, {"max_num_seqs": 2, "block_size": 1}]
)
def test_in_every_family(family, how, tokenizer):
    each = [SamplingParams(temperature=0, max_tokens=N), SamplingParams(temperature=1, seed=2, max_tokens=N)] * 3
    require_equal(lambda: LLM(make_model(family), tokenizer=tokenizer, **how), each)


@pytest.mark.parametrize("general", [False, True])
def test_with_every_method_in_a_crowd(adapters, tokenizer, general):
    mix = LoRARequest.mix("mix", 99, [(adapters["lora"], 0.7), (adapters["rslora"], 0.4)])
    asked = [None, *(adapters[name] for name in METHODS), mix]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(asked))]
    by_torch = {adapters[name] for name in ("oft", "lokr", "fourierft")}  # whose last bits depend on other rows
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=N, logprobs=None if each in by_torch else i % 3)
        for i, each in enumerate(asked)
    ]
    for first in range(0, len(asked), 7):  # more are so many rows that nothing is tried
        part = slice(first, first + 7)
        require_equal(
            lambda: LLM(make_model(), tokenizer=tokenizer, general_runner=general),
            params[part],
            prompts[part],
            asked[part],
        )


@pytest.mark.parametrize(
    "how", [{"dtype": "bfloat16"}, {"quantization": "bitsandbytes", "dtype": "bfloat16", "quantize_head": "int8"}]
)
def test_in_bfloat16_and_on_codes(how, adapters, base_folder):
    params = [
        SamplingParams(temperature=0, max_tokens=N),
        SamplingParams(temperature=0.8, seed=2, max_tokens=N, logprobs=3),
        SamplingParams(temperature=1, seed=5, max_tokens=N, repetition_penalty=1.3),
    ]
    asked = [None, adapters["dora"], adapters["ia3"]]
    require_equal(lambda: LLM(base_folder, **how), params, PROMPTS[1:4], asked)


@pytest.mark.parametrize("caches", [False, True])
def test_preempted(caches, tokenizer):
    """Pages for little more than one request."""
    position_bytes = 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads, their width, bytes
    llm = require_equal(
        lambda: LLM(
            make_model(), tokenizer=tokenizer, block_size=3, max_model_len=48, enable_prefix_caching=caches,
            kv_cache_memory_bytes=57 * position_bytes,
        ),
        [SamplingParams(temperature=1, seed=i, max_tokens=N) for i in range(len(PROMPTS))],
    )  # fmt: skip
    assert llm.engine.scheduler.n_preemptions > 0


def test_pages_of_drafts_are_found_again_by_what_was_drawn(tokenizer):
    """A next turn begins behind the answer, whose pages once held rejected tokens."""
    made = lambda: LLM(make_model(), tokenizer=tokenizer, block_size=4)  # noqa: E731
    params = SamplingParams(temperature=0, max_tokens=N)
    plain = made()
    expected, known = generated(plain, params, PROMPTS[:3])
    turns = [[*prompt, *answers[0].token_ids, 5] for prompt, (answers, _) in zip(PROMPTS, expected, strict=False)]
    after, known_after = generated(plain, params, turns)
    told, llm = Told(known | known_after), made()
    assert generated(llm, params, PROMPTS[:3], told=told)[0] == expected
    outputs = llm.generate(turns, params, use_tqdm=False)
    assert [output.outputs for output in outputs] == [answers for answers, _ in after]
    assert all(output.num_cached_tokens >= len(turn) - 2 for output, turn in zip(outputs, turns, strict=True))


@pytest.mark.parametrize("setting", ["penalties", "a few ids", "a form, drawn", "log-probabilities", "greedy"])
def test_a_step_that_is_interrupted_is_run_again(setting, tokenizer):
    """The same plan gives the same tokens until they are taken."""
    params = SamplingParams(**{"max_tokens": N} | SETTINGS[setting])

    def twice() -> LLM:
        llm = LLM(make_model(), tokenizer=tokenizer)
        run = llm.engine.runner.run

        def both(plan: StepPlan) -> Sampled:
            first, second = run(plan), run(plan)
            assert first == second
            return second

        llm.engine.runner.run = both  # type: ignore[method-assign]
        return llm

    require_equal(twice, params, PROMPTS[:3])


def test_a_stream_gets_several_tokens_at_once_and_all_are_counted(tokenizer):
    params = SamplingParams(temperature=0, max_tokens=N, logprobs=1)
    expected, known = generated(LLM(make_model(), tokenizer=tokenizer), params, PROMPTS[2:3])
    llm, told = LLM(make_model(), tokenizer=tokenizer, disable_log_stats=False), Told(known)
    llm.engine._rules.draft = lambda rule: told  # type: ignore[method-assign, return-value, assignment]
    llm.engine.submit(llm.engine.asked(None, PROMPTS[2], replace(params, output_kind=RequestOutputKind.DELTA)))
    parts, times = [], None
    while llm.engine.has_work:
        for output in llm.engine.step():
            parts += output.outputs
            times = output.metrics
    [[whole]] = [outputs for outputs, _ in expected]
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert [each for part in parts for each in part.logprobs] == whole.logprobs
    assert "".join(part.text for part in parts) == whole.text
    assert max(len(part.token_ids) for part in parts) > 2
    assert times is not None
    assert (times.num_generation_tokens, times.num_draft_tokens) == (N, told.n_tried)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if isinstance(metric, Counter)}
    assert counts["vllm:generation_tokens"] == N
    assert counts["vllm:spec_decode_num_drafts"] == told.lengths.total()
    assert counts["vllm:spec_decode_num_draft_tokens"] == told.n_tried
    assert counts["vllm:spec_decode_num_accepted_tokens"] == told.n_right > 5


def test_tokens_behind_a_stop_string_are_not_counted(tokenizer):
    params = SamplingParams(**{"max_tokens": N} | SETTINGS["stop strings"])
    expected, _ = generated(LLM(make_model(), tokenizer=tokenizer), params)
    _, known = generated(LLM(make_model(), tokenizer=tokenizer), replace(params, stop=None))
    llm = LLM(make_model(), tokenizer=tokenizer, disable_log_stats=False)
    found, _ = generated(llm, params, told=Told(known))
    assert [[each.token_ids for each in outputs] for outputs, _ in found] == [
        [each.token_ids for each in outputs] for outputs, _ in expected
    ]
    n_tokens = sum(len(each.token_ids) for outputs, _ in expected for each in outputs)
    [counted] = [metric for metric in llm.get_metrics() if metric.name == "vllm:generation_tokens"]
    assert isinstance(counted, Counter)
    assert counted.value == n_tokens < N * len(PROMPTS)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.4, "seed": 2, "n": 2, "logprobs": 1}])
def test_tokens_that_a_form_forces_are_tried_without_being_asked(how, tokenizer, monkeypatch):
    monkeypatch.setattr("veneer.serve.requests.structured._SLOW", 60.0)  # on a busy machine any grammar is slow
    form = StructuredOutputsParams(regex=r"(name: [a-f]{2}; ){3}(year: [0-9]; ){2}")
    params = SamplingParams(max_tokens=60, structured_outputs=form, **how)
    expected, _ = generated(LLM(make_model(), tokenizer=tokenizer), params, PROMPTS[:2])
    llm = LLM(make_model(), tokenizer=tokenizer, disable_log_stats=False)
    outputs = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert [output.outputs for output in outputs] == [answers for answers, _ in expected]
    for output in outputs:
        assert all(len(each.token_ids) == 49 for each in output.outputs)  # 48 letters and the end
        assert output.metrics is not None
        assert output.metrics.num_accepted_tokens >= 20 * params.n  # all but the free letters and those before them
        assert output.metrics.num_draft_tokens == output.metrics.num_accepted_tokens


def request_of(prompt: list[int], output: list[int] = [], **rule: Any) -> Request:  # noqa: B006
    return Request(id="r", prompt=tuple(prompt), rule=StopRule(**{"max_tokens": 100} | rule), output=list(output))


def config(k: int = 5, **how: int) -> SpeculativeConfig:
    return SpeculativeConfig(method="ngram", num_speculative_tokens=k, **how)


def test_the_text_after_the_last_equal_ngram_is_tried():
    draft = Draft(config(prompt_lookup_max=3, prompt_lookup_min=2))
    request = request_of([1, 2, 3, 4, 5, 6, 7, 2, 3, 8, 9], [4, 2, 3])
    assert draft.tokens(request, 9, 0.1) == [8, 9, 4, 2]  # two are equal, at two places; four are tried first
    request.output += [4]
    assert draft.tokens(request, 3, 0.1) == [5, 6, 7]  # three are equal, at one place
    request.output += [11, 4]
    assert draft.tokens(request, 9, 0.1) == ()  # one is equal, and that is too few


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=40), least=st.integers(1, 3), more=st.integers(0, 9),
    most=st.integers(1, 12),
)  # fmt: skip
def test_the_longest_ngram_counts_and_the_last_of_equal_ones(text, least, more, most):
    draft = Draft(config(k=7, prompt_lookup_min=least, prompt_lookup_max=least + more))
    found = list(draft.tokens(request_of(text), most, 0.1))
    n = min(4, 7, most)  # four are tried at first
    for window in range(least + more, least - 1, -1):
        for at in range(len(text) - window - 1, -1, -1):
            if text[at : at + window] == text[len(text) - window :]:
                rest = text[at + window :]
                assert found == [rest[i % len(rest)] for i in range(n)]
                return
    assert found == []


def test_text_that_repeats_is_tried_again_and_again():
    draft = Draft(config(prompt_lookup_max=2))
    assert draft.tokens(request_of([9, 1, 2], [1, 2]), 9, 0.1) == [1, 2, 1, 2]


def test_no_draft_goes_beyond_the_end():
    request = request_of([1, 2, 3, 4, 5], [1, 2], stop_ids=frozenset({4}))
    request.draft = Draft(config(prompt_lookup_max=2))
    assert request.drafted(9, 0.1) == (3,)
    longest = request_of([1, 2, 3, 4, 5], [1, 2], max_tokens=4)
    longest.draft = Draft(config(prompt_lookup_max=2))
    assert longest.drafted(9, 0.1) == (3,)  # and the token after it is the last
    assert request_of([1, 2], [1, 2]).drafted(9, 0.1) == ()


def test_drafts_that_fail_pause_and_those_that_hold_grow():
    draft = Draft(config(k=12, prompt_lookup_max=1))
    request = request_of([1] * 9, [1])
    lengths, waits = [], []
    for n_right in (4, 8, 12, 3, 0):
        n = len(draft.tokens(request, 99, 0.1))
        lengths.append(n)
        draft.judge(request, n, n_right)
    assert lengths == [4, 8, 12, 12, 4]
    for _ in range(8):
        n_waited = 0
        while not (guess := draft.tokens(request, 99, 0.1)):
            request.output.append(1)
            n_waited += 1
        waits.append((n_waited, len(guess)))
        draft.judge(request, len(guess), 0)
    assert waits == [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (32, 1), (32, 1)]
    assert (draft.n_tried, draft.n_right) == (4 + 8 + 12 + 12 + 4 + 8, 27)


def test_the_more_streams_the_more_tokens_must_be_right():
    """A right token saves one of them a step. Whatever was right, one is tried once in a while."""
    draft = Draft(config(k=12, prompt_lookup_max=1))
    request = request_of([1] * 9, [1])
    for n_right in (2, 1, 1, 1):  # nearly half of them
        n = len(draft.tokens(request, 99, 0.1))
        draft.judge(request, n, n_right)
    assert len(draft.tokens(request, 99, 0.45)) == 2
    assert draft.tokens(request, 99, 0.6) == ()
    request.output += [1] * 31
    assert draft.tokens(request, 99, 0.6) == ()
    request.output += [1]
    assert len(draft.tokens(request, 99, 0.6)) == 2


def test_forced_tokens_come_first():
    forced: list[list[int]] = [[], [7, 8, 9]]
    draft = Draft(config(prompt_lookup_max=1), lambda: forced[0])
    request = request_of([1, 2, 3], [1])
    assert draft.tokens(request, 2, 0.1) == [2, 3]
    forced.reverse()
    assert draft.tokens(request, 2, 0.1) == [7, 8]
    draft.judge(request, 2, 0)
    assert draft.tokens(request, 2, 0.1) == [2, 3]  # what the model writes otherwise is not tried at once
    request.output.append(1)
    assert draft.tokens(request, 2, 0.1) == [7]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "method=None is not offered: 'ngram' is"),
        ({"method": "eagle", "num_speculative_tokens": 3}, "method='eagle' is not offered: 'ngram' is"),
        ({"method": "ngram"}, "num_speculative_tokens is missing"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens=0 is too small: at least 1"),
        ({"method": "ngram", "num_speculative_tokens": "4"}, "num_speculative_tokens='4' must be a whole number"),
        ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 0}, "prompt_lookup_min=0 is too small"),
        (
            {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            "prompt_lookup_min=4 is more than prompt_lookup_max=3",
        ),
        ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_maxi": 3}, "did you mean 'prompt_lookup_max'"),
        ({"method": "ngram", "num_speculative_tokens": 2, "model": "x"}, "model is not offered"),
        ("ngram", "speculative_config='ngram' must be a mapping"),
    ],
)
def test_what_is_not_offered(asked, said, tokenizer):
    with pytest.raises(ConfigError, match=said):
        LLM(make_model(), tokenizer=tokenizer, speculative_config=asked)


@pytest.mark.parametrize(
    ("asked", "windows"),
    [({}, (5, 5)), ({"prompt_lookup_max": 3}, (3, 3)), ({"prompt_lookup_min": 2}, (2, 2)),
     ({"prompt_lookup_min": 2, "prompt_lookup_max": 4}, (2, 4))],
)  # fmt: skip
def test_windows_are_those_of_vllm(asked, windows):
    assert config(**asked).windows == windows


def test_ngrams_save_steps(tokenizer):
    """A model that repeats itself gives the same answer in fewer steps."""
    asked = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    params = SamplingParams(temperature=0, max_tokens=90)
    steps, found = {}, {}
    for name, speculative in (("plain", None), ("ngram", asked)):
        model = make_model()
        with torch.no_grad():
            model.lm_head.weight[:] = model.model.embed_tokens.weight.roll(1, 0) * 3  # mostly the next id
            model.lm_head.weight[97] = 0
        llm = LLM(model, tokenizer=tokenizer, speculative_config=speculative)
        counted: list[int] = []
        run = llm.engine.runner.run
        llm.engine.runner.run = lambda plan, run=run, counted=counted: (counted.append(plan.n_tokens), run(plan))[1]
        found[name] = llm.generate([PROMPTS[2]], params, use_tqdm=False)[0].outputs[0].token_ids
        steps[name] = len(counted)
    assert found["ngram"] == found["plain"]
    assert steps["plain"] == 90
    assert steps["ngram"] < 90
