"""`SamplingParams`: the values that are allowed, and the message for each wrong one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from veneer.errors import ConfigError
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.sampling_params import SamplingParams, StructuredOutputsParams


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "n": [0, 1.5, True],
        "presence_penalty": [-2.1, 2.1, "0"],
        "frequency_penalty": [-2.1, 2.1],
        "repetition_penalty": [0.0, -1.0],
        "temperature": [-0.1, 2.1, float("nan")],
        "top_p": [0.0, 1.1],
        "top_k": [-2, 0.5],
        "min_p": [-0.1, 1.1],
        "seed": ["7"],
        "stop": ["", ["a", ""], [3]],
        "stop_token_ids": [["a"], 3],
        "min_tokens": [-1, 17],
        "max_tokens": [0, -3],
        "logprobs": [-2, 21],
        "prompt_logprobs": [-2, 21],
        "logit_bias": [{"a": 1.0}, {1: "b"}, [1]],
        "allowed_token_ids": [[]],
        "bad_words": [[""], "word"],
        "structured_outputs": [{"json": {}}],
        "spaces_between_special_tokens": [False],
    }.items(),
)
def test_a_wrong_value_names_its_field(field, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"SamplingParams: .*{field}"):
            SamplingParams(**{field: value})


def test_a_wrong_limit_is_one_problem():
    with pytest.raises(ConfigError, match="max_tokens=-1") as raised:
        SamplingParams(max_tokens=-1)
    assert "min_tokens" not in str(raised.value)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError, match=r"top_p=3.*min_p=-1|min_p=-1.*top_p=3"):
        SamplingParams(top_p=3, min_p=-1)


def test_unknown_fields_name_the_nearest_known_one():
    with pytest.raises(ConfigError, match="no field 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1)
    with pytest.raises(ConfigError, match="no field 'zzz'; known"):
        SamplingParams(zzz=1)
    with pytest.raises(ConfigError, match="thinking_token_budget is not offered"):
        SamplingParams(thinking_token_budget=1)


def test_greedy_answers_are_one():
    with pytest.raises(ConfigError, match=r"all n answers would be equal\. Use n=1"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=2e-5).greedy


def test_stop_strings_need_the_text():
    with pytest.raises(ConfigError, match="leave detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_fields_may_be_set_and_are_checked_when_they_are_used():
    params = SamplingParams()
    params.max_tokens = 64
    assert replace(params).max_tokens == 64
    params.top_p = 7
    with pytest.raises(ConfigError, match="top_p=7"):
        replace(params)


def test_bias_is_clipped():
    assert SamplingParams(logit_bias={3: 250.0, 5: -101.0, 7: 2.5}).logit_bias == {3: 100.0, 5: -100.0, 7: 2.5}


@pytest.mark.parametrize("given", [{}, {"regex": "a", "grammar": "b"}, {"json_object": False}])
def test_exactly_one_form_of_the_answer(given):
    with pytest.raises(ConfigError, match="exactly one"):
        StructuredOutputsParams(**given)


@pytest.mark.parametrize(
    "given", [{"regex": 3}, {"grammar": ["a"]}, {"json": 3}, {"choice": "a"}, {"choice": ["a", ""]}]
)
def test_forms_of_the_wrong_type(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        StructuredOutputsParams(**given)


def test_adapters_are_equal_by_name():
    one, other = LoRARequest("sql", 1, "/a"), LoRARequest("sql", 2, "/b")
    assert one == other
    assert hash(one) == hash(other)
    assert (one.name, one.adapter_id, one.path) == ("sql", 1, "/a")
    assert one != LoRARequest("law", 1, "/a")


@pytest.mark.parametrize("given", [("", 1, "/a"), ("x", 0, "/a"), ("x", "1", "/a"), ("x", 1, ""), ("x", 1, 3)])
def test_adapters_that_say_too_little(given):
    with pytest.raises(ConfigError, match="LoRARequest"):
        LoRARequest(*given)
