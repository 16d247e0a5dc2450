"""Bodies that are no JSON, and values of another type than their field's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .test_random_requests import is_error, posted
from .test_server import TURN, Server


@pytest.fixture(scope="module")
def server(base_folder, tmp_path_factory) -> Iterator[Server]:
    running = Server(base_folder, tmp_path_factory.mktemp("none"))
    yield running
    running.stop()


def refusal(server: Server, route: str, body: Any) -> str:
    """The message of a 400."""
    status, text = posted(server, route, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert status == 400, text
    told = json.loads(text)
    assert is_error(route, 400, told)
    message: str = told["error"]["message"]
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", "3", "a whole number"), ("max_tokens", True, "a whole number"),
        ("max_tokens", 3.0, "a whole number"), ("max_tokens", 3.5, "a whole number"), ("n", "1", "a whole number"),
        ("n", True, "a whole number"), ("seed", "7", "a whole number"), ("seed", True, "a whole number"),
        ("temperature", "0.5", "a number"), ("temperature", True, "a number"), ("top_p", "1", "a number"),
        ("min_p", False, "a number"), ("presence_penalty", "0", "a number"), ("top_k", "5", "a whole number"),
        ("stream", "false", "true or false"), ("stream", 0, "true or false"), ("ignore_eos", 1, "true or false"),
        ("stop", 5, "text"), ("stop_token_ids", ["5"], "a whole number"), ("stop_token_ids", [True], "a whole number"),
        ("allowed_token_ids", [5.0], "a whole number"), ("logit_bias", {"5": "1"}, "a number"),
        ("logit_bias", {"5": True}, "a number"), ("logit_bias", {"x": 1}, "a whole number"),
        ("logit_bias", {" 5": 1}, "a whole number"), ("logit_bias", {"\u0665": 1}, "a whole number"),
        ("bad_words", "ab", "a list"), ("adapter", {"lora": "1"}, "a number"), ("adapter", {"lora": True}, "a number"),
        ("model", 5, "text"), ("cache_salt", 5, "text"), ("prompt_logprobs", "1", "a whole number"),
        ("stream_options", {"include_usage": "yes"}, "true or false"),
    ],
)  # fmt: skip
def test_text_and_truth_values_are_no_numbers(server, name, value, said):
    for route, always in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": [TURN]})):
        assert f"must be {said}" in refusal(server, route, {"max_tokens": 2, **always, name: value}), route


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        ("/v1/completions", {"prompt": [True]}, "prompt"),
        ("/v1/completions", {"prompt": [1.0]}, "prompt"),
        ("/v1/completions", {"prompt": ["x", 5]}, "prompt"),
        ("/v1/completions", {"prompt": {"a": 1}}, "prompt: must be text or a list; given an object"),
        ("/v1/completions", {"prompt": "x", "stop": 7}, "stop: must be text or a list; given 7"),
        ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 'temperature: must be a number; given "hot"'),
        ("/v1/completions", {"prompt": []}, "prompt is empty: give text, token ids, or a list of either"),
        ("/v1/completions", {"prompt": [[]]}, "prompt is empty"),
        ("/v1/completions", {"prompt": ""}, "prompt is empty"),
        ("/v1/completions", {"prompt": ["x", ""]}, "prompt is empty"),
        ("/v1/completions", {"prompt": "x", "logprobs": True}, "logprobs: must be a whole number"),
        ("/v1/chat/completions", {"messages": []}, "messages is empty"),
        ("/v1/chat/completions", {"messages": [TURN], "logprobs": "true"}, "logprobs: must be true or false"),
        ("/v1/embeddings", {"input": []}, "input is empty"),
        ("/v1/embeddings", {"input": "x", "normalize": "no"}, "normalize: must be true or false"),
        ("/v1/messages", {"messages": [TURN], "max_tokens": "5"}, "max_tokens: must be a whole number"),
        ("/v1/messages", {"messages": [], "max_tokens": 5}, "messages"),
        ("/v1/responses", {"input": "x", "max_output_tokens": True}, "max_output_tokens: must be a whole number"),
        ("/v1/responses", {"input": []}, "empty"),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}, "return_token_strs: must be true or false"),
        ("/detokenize", {"tokens": ["5"]}, "tokens.0: must be a whole number"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y", "load_inplace": "y"}, "must be true or false"),
    ],
)  # fmt: skip
def test_each_route_refuses_other_types(server, route, body, said):
    assert said in refusal(server, route, body)


def test_whole_numbers_pass_as_numbers_and_ids_as_keys(server):
    body = {"prompt": "x", "max_tokens": 2, "temperature": 1, "top_p": 1, "min_p": 0, "logit_bias": {"97": 100}}
    status, told = posted(server, "/v1/completions", json.dumps(body).encode())
    assert (status, json.loads(told)["choices"][0]["text"]) == (200, "aa")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"prompt": "x", "temperature": NaN}', "the body is not JSON: NaN is not a JSON number"),
        (b'{"prompt": "x", "temperature": -Infinity}', "the body is not JSON: -Infinity is not a JSON number"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "a number has 5000 digits, and at most 40 are read"),
        (b'{"prompt": "x", "max_tokens": 1' + b"0" * 400 + b"}", "a number has 401 digits"),
        (b'{"prompt": "x", "temperature": 1' + b"0" * 39 + b"}", "must be between 0 and 2"),
        (b'{"prompt": "x", "prompt": "y"}', "an object has the key 'prompt' twice"),
        (b'{"prompt": "x", "adapter": {"a": 1, "a": 0}}', "an object has the key 'a' twice"),
        (b'{"prompt": ' + b"[" * 9000, "its lists and objects are nested too deeply"),
        (b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}", "prompt"),
        (b'{"prompt": "\xff"}', "the body is not JSON: it is not UTF-8"),
        (b'{"prompt": "x"} {}', "the body is not JSON: Extra data, at character 16"),
        (b'{"prompt": "a\nb"}', "the body is not JSON: Invalid control character"),
        (b'{"prompt": "x", "max_tokens": 01}', "the body is not JSON"),
        (b'{"prompt": "x", "max_tokens": -0}', "max_tokens=0"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "bad_words": ["a\\udfff"]}', "none of them empty or half of a surrogate pair"),
        (b"", "the body"), (b"null", "the body"), (b'"x"', "the body"), (b"\xef\xbb\xbf[]", "the body"),
    ],
)  # fmt: skip
def test_what_readers_of_json_understand_in_several_ways_is_refused(server, body, said):
    assert said in refusal(server, "/v1/completions", body)
    assert said in refusal(server, "/v1/completions", body + b" " * 2**16)  # parsed on another thread
