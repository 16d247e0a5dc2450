"""Random bodies of every route that takes one: valid ones with wrong values, names, lengths and letters."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from .random_forms import random_form, random_schema

_TURNS = [{"role": "user", "content": "x"}]
_FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
_DRAWN = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "repetition_penalty": 1.1, "seed": 3, "stop": ["q"], "stop_token_ids": [5], "ignore_eos": False, "min_tokens": 1,
    "skip_special_tokens": True, "logit_bias": {"5": 1.0}, "cache_salt": "s", "stream": False,
}  # fmt: skip
_OPENAI = {
    "n": 1, "max_tokens": 2, "include_stop_str_in_output": False, "allowed_token_ids": [3, 4], "bad_words": ["ab"],
    "prompt_logprobs": 1, "stream_options": {"include_usage": True}, "user": "u", "metadata": {"a": "b"},
    "response_format": {"type": "text"}, "structured_outputs": {"choice": ["a", "b"]},
}  # fmt: skip
_CHAT = {
    "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1,
    "tools": [{"type": "function", "function": _FUNCTION}],
    "tool_choice": "required", "parallel_tool_calls": False, "chat_template_kwargs": {"x": 1},
    "continue_final_message": False, "add_generation_prompt": True,
}  # fmt: skip
_RESPONSES = {
    "max_output_tokens": 2, "instructions": "i", "text": {"format": {"type": "text"}}, "top_logprobs": 1, "include": [],
    "tools": [{"type": "function", **_FUNCTION}], "tool_choice": "none", "metadata": {"a": "b"}, "background": False,
}  # fmt: skip
_MESSAGES = {
    "system": [{"type": "text", "text": "s"}], "stop_sequences": ["q"], "thinking": {"type": "disabled"},
    "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "none"}, "metadata": {},
    "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
}  # fmt: skip
_SPOKEN = {"messages": _TURNS, "max_tokens": 2}
ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/completions": ({"prompt": "x", "max_tokens": 2}, _DRAWN | _OPENAI | {"logprobs": 1, "echo": False}),
    "/v1/chat/completions": (_SPOKEN, _DRAWN | _OPENAI | _CHAT),
    "/v1/responses": ({"input": "x", "max_output_tokens": 2}, _DRAWN | _RESPONSES),
    "/v1/messages": (_SPOKEN, _DRAWN | _MESSAGES),
    "/v1/messages/count_tokens": ({"messages": _TURNS}, {k: v for k, v in _MESSAGES.items() if "s_" not in k}),
    "/v1/embeddings": ({"input": "x"}, {"encoding_format": "float", "pooling": "mean", "normalize": True}),
    "/tokenize": ({"prompt": "x"}, {"add_special_tokens": True, "return_token_strs": True}),
    "/detokenize": ({"tokens": [3, 4]}, {}),
    "/v1/load_lora_adapter": (
        {"lora_name": "x", "lora_path": "/nowhere"},
        {"load_inplace": True, "adapter": {"a": 1.0}},
    ),
    "/v1/unload_lora_adapter": ({"lora_name": "x"}, {}),
}
"""Bodies of each route: fields that are sent always, and those that are sent at times."""
_WRONG = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, -0.0, 0.5, 1e308, "", "1", "0.5", "true", "x" * 3000),
    *(
        [],
        {},
        [[]],
        [None],
        [""],
        [[1, "a"]],
        {"": ""},
        {"type": "x"},
        [0.5],
        [True],
        ["\ud800"],
        "\ud800",
        "\0",
        "\u202e",
    ),
    *(
        {"\ud800": 1},
        {"role": "user"},
        [{"role": "user", "content": None}],
        [{"role": "\ud800", "content": "x"}],
        [1] * 300,
    ),
    [{"role": "assistant", "content": [{"type": "text", "text": 5}], "tool_calls": [{"function": {"arguments": "{"}}]}],
]
_MODELS = [
    "tiny",
    "lora",
    "ＬＯＲＡ",
    "lora\0",
    "../lora",
    "lora/",
    " lora",
    "",
    "mix/{}",
    "l\u0131ra",
    "x" * 5000,
    "\ud800",
    "%2e",
]
_TEXTS = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 5000, "1.0", "0x1", "01", '"\\ud83d"', "[" * 3000, "'a'"]


def random_body(draw: random.Random) -> tuple[str, bytes]:
    """A route, and the bytes of a body that is sent there."""
    route = draw.choice(list(ROUTES))
    always, at_times = copy.deepcopy(ROUTES[route])
    body = always | {name: at_times[name] for name in at_times if draw.random() < 0.15}
    for _ in range(draw.randint(0, 2)):
        _change(draw, body, [*always, *at_times])
    text = json.dumps(body)
    match draw.randrange(12):
        case 0:
            return route, text[: draw.randint(0, len(text))].encode()
        case 1:
            name = draw.choice(list(body) or ["x"])
            return route, f'{{"{name}": {draw.choice(_TEXTS)}, {text[1:]}'.encode()
        case 2:
            name = draw.choice([*always, *at_times])
            return route, f'{{"{name}": {draw.choice(_TEXTS)}}}'.encode()
        case 3:
            return route, json.dumps(draw.choice(_WRONG)).encode()
        case 4:
            at = draw.randint(0, len(text))
            return route, text[:at].encode() + bytes(draw.choices(range(256), k=3)) + text[at:].encode()
    return route, text.encode()


def _change(draw: random.Random, body: dict[str, Any], names: list[str]) -> None:
    match draw.randrange(7):
        case 0:
            body.pop(draw.choice(list(body)), None) if body else None
        case 1:
            body["model"] = draw.choice(_MODELS)
        case 2:
            body["structured_outputs"] = random_form(draw)
        case 3:
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": random_schema(draw)}}
        case 4:
            body[draw.choice(["adapter", "x", "\u0440rompt", "n ", "__class__", ""])] = draw.choice(_WRONG)
        case _:
            body[draw.choice(names)] = draw.choice(_WRONG)
