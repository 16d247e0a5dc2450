"""Routes beside completions: models by name, tokens, and what the OpenAPI says of all of them."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.unit.serve.conftest import END, byte_tokenizer

from veneer import LLM, SamplingParams
from veneer.cli.pages.serve import ServeArguments
from veneer.errors import ConfigError
from veneer.serve.requests import prompts

from .test_server import PROMPT, Server

SHOUTS = "{% for m in messages %}<end>{{ m['content'] | upper }}{% endfor %}"
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
LONG = "a header that several requests share, longer than two pages"


@pytest.fixture(scope="module")
def served(base_folder, adapters, tmp_path_factory) -> Iterator[tuple[Server, Path]]:
    """A base whose name has a slash, an adapter without a tokenizer, and one that brings its own chat template."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("lora", "loud"):
        shutil.copytree(adapters["lora"].path, folder / name)
    own = byte_tokenizer()
    own.chat_template = SHOUTS
    own.save_pretrained(folder / "loud")
    running = Server(base_folder, folder, names=("org/tiny", "alias"))
    yield running, folder
    running.stop()


@pytest.fixture(scope="module")
def server(served) -> Server:
    return served[0]


def get(server: Server, route: str) -> Any:
    with urllib.request.urlopen(f"{server.url}{route}") as answer:
        return json.load(answer)


def test_a_model_by_its_name(served):
    server, folder = served
    one = server.client.models.retrieve
    assert (one("org/tiny").id, one("org/tiny").parent, one("org/tiny").max_model_len) == ("org/tiny", None, 127)
    assert (one("lora").parent, one("lora").root) == ("org/tiny", str(folder / "lora"))
    assert [card.model_dump() for card in server.client.models.list()] == [
        one(name).model_dump() for name in ("org/tiny", "alias", "lora", "loud")
    ]
    for name in ("org/other", "org", "../served/lora", "a/b/c"):
        with pytest.raises(openai.NotFoundError, match=r"no model .*org/tiny"):
            one(name)
    assert get(server, "/v1/models/") == get(server, "/v1/models")


def test_tokens_of_a_prompt(server):
    status, told = server.post("/tokenize", {"model": "alias", "prompt": "aé<end>", "return_token_strs": True})
    assert (status, told["count"], told["max_model_len"], told["tokens"]) == (200, 4, 127, [97, 195, 169, END])
    assert told["token_strs"] == ["a", "Ã", "©", "<end>"]
    assert server.post("/tokenize", {"prompt": "b"})[1]["token_strs"] is None
    assert server.post("/detokenize", {"tokens": [97, 195, 169, END]}) == (200, {"prompt": "aé<end>"})


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ({"messages": TURNS}, "user: hi\nassistant: yo\nassistant: "),
        ({"messages": TURNS, "add_generation_prompt": False}, "user: hi\nassistant: yo\n"),
        (
            {"messages": TURNS, "add_generation_prompt": False, "continue_final_message": True},
            "user: hi\nassistant: yo",
        ),
        ({"messages": TURNS, "model": "lora"}, "user: hi\nassistant: yo\nassistant: "),
        ({"messages": TURNS, "model": "loud"}, "<end>HI<end>YO"),
    ],
)
def test_tokens_of_a_conversation_by_the_models_own_template(server, body, right):
    tokens = server.post("/tokenize", body)[1]["tokens"]
    assert server.post("/detokenize", {"tokens": tokens, "model": body.get("model")})[1]["prompt"] == right
    read = server.post("/v1/chat/completions", {**body, "max_tokens": 1})[1]["usage"]["prompt_tokens"]
    assert read == len(tokens)


def test_special_tokens_are_added_or_not(server, monkeypatch):
    asked, own = list[bool](), prompts.PromptReader._ids
    monkeypatch.setattr(
        prompts.PromptReader,
        "_ids",
        lambda self, text, **how: asked.append(how["add_special_tokens"]) or own(self, text, **how),
    )
    for body in ({"prompt": "x"}, {"messages": TURNS}):
        for given in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            server.post("/tokenize", body | given)
    assert asked == [True, True, False, False, False, True, False]


@pytest.mark.parametrize(
    ("route", "body", "status", "said"),
    [
        ("tokenize", {}, 400, "the body: give either prompt or messages"),
        ("tokenize", {"prompt": "x", "messages": TURNS}, 400, "give either prompt or messages"),
        ("tokenize", {"prompt": "x", "chat_template": "x"}, 400, "chat_template: these fields belong to messages"),
        ("tokenize", {"prompt": "x", "promt": "y"}, 400, "unknown field 'promt'; did you mean 'prompt'"),
        ("tokenize", {"prompt": "x" * 700}, 400, "tokens of at most 5 characters, and the prompt has 700"),
        ("tokenize", {"messages": TURNS, "chat_template": SHOUTS}, 400, "--trust-request-templates"),
        ("tokenize", {"messages": TURNS, "chat_template_kwargs": {"tokenize": True}}, 400, "holds tokenize"),
        ("tokenize", {"prompt": "\ud800"}, 400, "half of a surrogate pair"),
        ("tokenize", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half of a surrogate pair"),
        ("tokenize", {"prompt": "x", "model": "other"}, 404, "no model 'other'"),
        ("detokenize", {"tokens": [97, -1, 999]}, 400, "tokens holds [-1, 999], which are no token ids: those are 0"),
        ("detokenize", {"tokens": [97] * 128}, 400, "tokens holds 128 ids, and at most 127 are taken"),
        ("detokenize", {"tokens": ["x"]}, 400, "tokens.0: must be a whole number"),
        ("detokenize", {}, 400, "tokens: is missing"),
        ("detokenize", {"tokens": [97], "model": "other"}, 404, "no model 'other'"),
    ],
)
def test_what_is_wrong_is_told(server, route, body, status, said):
    found, told = server.post(f"/{route}", body)
    assert found == status
    assert said in told["error"]["message"]


def test_offsets_of_a_stream_are_those_of_the_whole_answer(server):
    asked = {"model": "alias", "prompt": PROMPT, "logprobs": 0, "max_tokens": 7, "n": 2, "temperature": 0.9, "seed": 4}
    whole = server.client.completions.create(**asked)
    parts = list(server.client.completions.create(**asked, stream=True))
    for index, choice in enumerate(whole.choices):
        told = [part.choices[0].logprobs for part in parts if part.choices[0].index == index]
        assert [at for each in told for at in each.text_offset] == choice.logprobs.text_offset
        assert choice.logprobs.text_offset[-1] >= 6
        assert len(told) > 3


def test_the_openapi_tells_routes_answers_and_errors(server):
    told = get(server, "/openapi.json")
    posts = {path: each["post"]["responses"] for path, each in told["paths"].items() if "post" in each}
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"} <= posts.keys()
    for responses in posts.values():
        assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= responses.keys()
        assert "422" not in responses
    assert "text/event-stream" in posts["/v1/completions"]["200"]["content"]
    answer = posts["/tokenize"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/TokenizeAnswer"}
    error = posts["/tokenize"]["404"]["content"]["application/json"]["schema"]
    assert error == {"$ref": "#/components/schemas/ErrorBody"}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert list(posts[path]["200"]["content"]) == ["text/plain"]
        assert list(posts[path]["400"]["content"]) == ["application/json"]
    assert "content" not in told["paths"]["/health"]["get"]["responses"]["200"]


def test_the_openapi_is_written_once(server, monkeypatch):
    first = get(server, "/openapi.json")
    monkeypatch.setattr(server.app, "openapi", None)
    assert get(server, "/openapi.json") == first


def test_conversations_share_pages_by_their_salt(base_folder):
    llm = LLM(base_folder)
    talk = [{"role": "user", "content": LONG}]
    counts = []
    for salt in (None, "a", None, "a", ["b", "a"]):
        many = [talk, talk] if isinstance(salt, list) else talk
        counts += [
            each.num_cached_tokens
            for each in llm.chat(many, SamplingParams(max_tokens=1), use_tqdm=False, cache_salt=salt)
        ]
    there = len(f"user: {LONG}\nassistant: ") - 1
    assert counts == [0, 0, there, there, 0, there]


@pytest.mark.parametrize("options", [{"kv_gib": float("nan")}, {"max_body_mib": float("nan")}, {"kv_gib": 0.0}])
def test_an_option_that_is_no_size_is_told(options):
    [(name, value)] = options.items()
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value} is no size: give a number of [MG]iB"):
        ServeArguments(model="smollm2-135m-instruct", **options)
