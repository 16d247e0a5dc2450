"""The server over a real socket, asked by the openai client and by httpx."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.unit.serve.conftest import save_adapter

from patience import wait_until
from veneer import LLM, LoraConfig, SamplingParams
from veneer.serve.http import answer_models
from veneer.serve.http import server as http_server
from veneer.serve.http.app import make_app
from veneer.serve.http.key import ANYBODY, NOBODY
from veneer.serve.http.key_file import Keys
from veneer.serve.http.models import Catalogue
from veneer.serve.http.server_limits import ServerLimits
from veneer.serve.start import EngineOptions, start_engine

PROMPT = "the cat sat"
TURN = {"role": "user", "content": "x"}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "x"}}}


class Server:
    """A server on a port of its own, in a thread."""

    def __init__(
        self,
        base: Path,
        adapters: Path,
        limits: ServerLimits | None = None,
        names: Sequence[str] = ("tiny", "alias"),
        keys: Keys | None = None,
        options: EngineOptions | None = None,
        **how: Any,
    ) -> None:
        self.engine = start_engine(base, options or EngineOptions(disable_log_stats=False))
        catalogue = Catalogue(self.engine, names, str(base), adapters, ANYBODY if keys is None else NOBODY)
        app = make_app(self.engine, catalogue, limits, keys=keys, **how)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.app, self.server = app, http_server.Server(app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.wait(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait(self, reached: Callable[[], object]) -> None:
        wait_until(reached)

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the engine take four steps a message: longer answers do not end, however slow the test is."""
        step, allowed = self.engine.step, 0

        def held() -> Any:
            nonlocal allowed
            if self.engine.wait(None if allowed == 0 else 0):
                allowed = 4
            allowed -= 1
            return step()

        monkeypatch.setattr(self.engine, "step", held)

    @property
    def is_idle(self) -> bool:
        pages = self.engine.scheduler.pages
        return not self.engine.has_work and pages.n_held == 0 and not self.engine._groups

    def post(self, route: str, body: Any) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.asked(route, body)) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def documented(self, route: str, body: Any = None) -> Any:
        """The answer of a route, which must be what the application's documentation says."""
        schema = self.app.openapi()["paths"][route]["get" if body is None else "post"]["responses"]["200"]
        kind = schema["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        with urllib.request.urlopen(self.asked(route, body)) as answer:
            found = json.load(answer)
        getattr(answer_models, kind).model_validate(found, strict=True)
        return found

    def asked(self, route: str, body: Any) -> urllib.request.Request:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        return urllib.request.Request(f"{self.url}{route}", data, {"Content-Type": "application/json"})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def folder(adapters, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("served")
    for name in ("lora", "dora", "prefix", "bottleneck"):
        shutil.copytree(adapters[name].path, made / name)
    (made / "no adapter").mkdir()
    (made / "file").write_text("x")
    return made


@pytest.fixture(scope="module")
def server(base_folder, folder) -> Iterator[Server]:
    running = Server(base_folder, folder)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def llm(base_folder) -> LLM:
    return LLM(base_folder)


def expected(llm: LLM, adapter: Any = None, prompt: Any = PROMPT, **params: Any) -> Any:
    asked = SamplingParams(**{"temperature": 0, "max_tokens": 9, **params})
    return llm.generate([prompt], asked, lora_request=adapter, use_tqdm=False)[0].outputs[0]


def test_models(server, folder):
    cards = server.client.models.list().data
    assert [card.id for card in cards] == ["tiny", "alias", "bottleneck", "dora", "lora", "prefix"]
    assert (cards[0].max_model_len, cards[0].parent) == (127, None)
    assert (cards[3].parent, cards[3].root) == ("tiny", str(folder / "dora"))
    assert cards[3].max_model_len == 127


@pytest.mark.parametrize("name", ["tiny", "alias", "lora", "dora", "prefix", "bottleneck"])
def test_the_models_name_is_the_adapter(server, llm, adapters, name):
    answer = server.client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=9)
    right = expected(llm, adapters.get(name))
    assert answer.choices[0].text == right.text
    assert (answer.model, answer.object, answer.choices[0].finish_reason) == (name, "text_completion", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 9, 20)
    chat = server.client.chat.completions.create(model=name, messages=[TURN], temperature=0, max_completion_tokens=9)
    right = expected(llm, adapters.get(name), "user: x\nassistant: ")
    assert chat.choices[0].message.content == right.text
    assert (chat.object, chat.choices[0].message.role) == ("chat.completion", "assistant")


def test_many_at_once(server, llm, adapters):
    names = [None, "lora", "prefix", "dora", "bottleneck"] * 3
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 9} | ({"model": names[i]} if names[i] else {})
        found[i] = server.post("/v1/completions", body)[1]["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(names))]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    right = {name: expected(llm, adapters.get(name)).text for name in dict.fromkeys(names)}
    assert [found[i] for i in range(len(names))] == [right[name] for name in names]
    server.wait(lambda: server.is_idle)


def test_several_prompts_and_answers(server, llm):
    answer = server.client.completions.create(
        model="tiny", prompt=["ab", "cd"], n=2, temperature=0.9, seed=5, max_tokens=4, extra_body={"top_k": 20}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for place, prompt in enumerate(("ab", "cd")):
        right = llm.generate(
            prompt, SamplingParams(n=2, temperature=0.9, seed=5, max_tokens=4, top_k=20), use_tqdm=False
        )[0]
        assert [c.text for c in answer.choices[2 * place : 2 * place + 2]] == [o.text for o in right.outputs]
    ids = server.client.completions.create(model="tiny", prompt=[97, 98], temperature=0, max_tokens=4)
    lists = server.client.completions.create(model="tiny", prompt=[[97, 98]], temperature=0, max_tokens=4)
    assert ids.choices[0].text == lists.choices[0].text == expected(llm, prompt="ab", max_tokens=4).text


def test_echo_and_logprobs(server, llm):
    answer = server.client.completions.create(model="tiny", prompt=PROMPT, echo=True, temperature=0, max_tokens=3)
    assert answer.choices[0].text == PROMPT + expected(llm, max_tokens=3).text
    with_them = server.client.completions.create(
        model="tiny", prompt=PROMPT, logprobs=2, temperature=0, max_tokens=3, extra_body={"prompt_logprobs": 1}
    )
    right = expected(llm, max_tokens=3, logprobs=2)
    found = with_them.choices[0].logprobs
    assert found.token_logprobs == pytest.approx(
        [p[t].logprob for p, t in zip(right.logprobs, right.token_ids, strict=True)]
    )
    assert found.text_offset[0] == 0
    assert len(with_them.choices[0].prompt_logprobs) == len(PROMPT)
    chat = server.client.chat.completions.create(
        model="tiny", messages=[TURN], temperature=0, max_tokens=3, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert [len(each.top_logprobs) for each in content] == [2, 2, 2]
    assert all(each.logprob == each.top_logprobs[0].logprob for each in content)


def test_answers_are_what_is_documented(server):
    scored = {"prompt": ["ab", "cd"], "n": 2, "temperature": 1, "max_tokens": 3, "logprobs": 2, "prompt_logprobs": 1}
    assert len(server.documented("/v1/completions", scored)["choices"]) == 4
    server.documented("/v1/completions", {"prompt": "ab", "max_tokens": 1, "echo": True})
    chat = {"messages": [TURN], "max_tokens": 3, "stop": ["e"]}
    server.documented("/v1/chat/completions", chat | {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 0})
    server.documented("/v1/chat/completions", chat)
    assert len(server.documented("/v1/models")["data"]) == 6


def test_cached_tokens_and_salts(server):
    """OpenAI's count of the tokens that were there, and vLLM's field that parts requests."""
    prompt, counts = "a header that several requests share, longer than two pages", []
    for salt in (None, "a", None, "a", "b"):
        extra = {} if salt is None else {"cache_salt": salt}
        for stream in (False, True):
            answer = server.client.completions.create(
                model="lora", prompt=prompt, max_tokens=1, stream=stream, extra_body=extra,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            )  # fmt: skip
            usage = list(answer)[-1].usage if stream else answer.usage
            counts.append(usage.prompt_tokens_details.cached_tokens)
    there = len(prompt) - 1  # the last token is always read
    assert counts == [0, there, 0, there, there, there, there, there, 0, there]
    status, told = server.post("/v1/completions", {"prompt": "x", "cache_salt": "x" * 2**20})
    assert (status, "cache_salt has 1048576 characters" in told["error"]["message"]) == (400, True)


def test_streams(server, llm):
    parts = list(
        server.client.completions.create(
            model="tiny", prompt=PROMPT, temperature=0, max_tokens=9, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    right = expected(llm)
    assert "".join(part.choices[0].text for part in parts[:-1]) == right.text
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "length"
    assert (parts[-1].choices, parts[-1].usage.completion_tokens) == ([], 9)
    assert len(parts) > 5
    chat = list(
        server.client.chat.completions.create(
            model="lora",
            messages=[TURN],
            n=2,
            temperature=0.8,
            seed=3,
            max_tokens=6,
            stream=True,
        )
    )
    assert [part.choices[0].delta.role for part in chat[:2]] == ["assistant", "assistant"]
    texts = ["".join(p.choices[0].delta.content or "" for p in chat if p.choices[0].index == i) for i in (0, 1)]
    whole = server.client.chat.completions.create(
        model="lora", messages=[TURN], n=2, temperature=0.8, seed=3, max_tokens=6
    )
    assert texts == [choice.message.content for choice in whole.choices]
    assert {part.object for part in chat} == {"chat.completion.chunk"}


def test_a_stop_string_is_held_back_in_streams(server, llm):
    letters = {"allowed_token_ids": list(range(97, 123))}
    free = expected(llm, **letters).text
    stream = server.client.completions.create(
        model="tiny", prompt=PROMPT, temperature=0, max_tokens=9, stop=[free[3:6]], stream=True, extra_body=letters
    )
    assert "".join(part.choices[0].text for part in stream) == free[: free.find(free[3:6])]


def test_structured_answers(server):
    schema = {"type": "object", "properties": {"a": {"enum": [17]}}, "required": ["a"], "additionalProperties": False}
    blank = {str(ord(c)): -100 for c in " \t\n\r"}
    answer = server.client.chat.completions.create(
        model="tiny", messages=[TURN], logit_bias=blank, max_tokens=30,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )  # fmt: skip
    assert answer.choices[0].message.content == '{"a":17}'
    assert answer.choices[0].finish_reason == "stop"
    picked = server.client.completions.create(
        model="tiny", prompt="x", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert picked.choices[0].text in ("yes", "no")


def test_adapters_come_change_and_go(server, folder, tmp_path):
    def text() -> str:
        return (
            server.client.completions.create(model="late", prompt=PROMPT, temperature=0, max_tokens=9).choices[0].text
        )

    with pytest.raises(openai.NotFoundError, match=r"no model 'late'.*lora"):
        text()
    config = LoraConfig(r=3, target_modules="all-linear")
    shutil.copytree(save_adapter(tmp_path / "one", config, seed=21), folder / "late")
    first = text()
    shutil.rmtree(folder / "late")
    shutil.copytree(save_adapter(tmp_path / "two", config, seed=22), folder / "late")
    assert text() != first
    n_loaded = len(server.engine.runner.loaded)
    shutil.rmtree(folder / "late")
    with pytest.raises(openai.NotFoundError):
        text()
    server.client.models.list()
    server.wait(lambda: len(server.engine.runner.loaded) < n_loaded)


def test_an_adapter_that_goes_while_it_is_asked_for_is_not_there(server, folder, tmp_path, monkeypatch):
    config = LoraConfig(r=3, target_modules="all-linear")
    shutil.copytree(save_adapter(tmp_path / "one", config, seed=21), folder / "going")
    find = server.engine.versions.of

    def find_late(request: Any) -> Any:
        shutil.rmtree(folder / "going", ignore_errors=True)
        return find(request)

    monkeypatch.setattr(server.engine.versions, "of", find_late)
    with pytest.raises(openai.NotFoundError, match="no model 'going'"):
        server.client.completions.create(model="going", prompt=PROMPT, max_tokens=3)


def test_a_client_that_goes_away_ends_its_request(server):
    for stream in (True, False):
        body = json.dumps({"prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": stream}).encode()
        fields = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head = "\r\n".join([*fields, f"Content-Length: {len(body)}", "", ""])
        gone = []
        for _ in range(3):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(head.encode() + body)
            gone.append(connection)
        server.wait(lambda: len(server.engine.scheduler.running) == 3)
        lengths = [request.rule.max_tokens for request in server.engine.scheduler.running]
        requests = list(server.engine.scheduler.running)
        [connection.close() for connection in gone]
        server.wait(lambda: server.is_idle)
        assert all(r.finish_reason == "abort" and len(r.output) < n for r, n in zip(requests, lengths, strict=True))


@pytest.mark.parametrize(
    ("route", "body", "said", "param"),
    [
        ("completions", {"prompt": "x", "temprature": 1}, "'temprature'; did you mean 'temperature'", "temprature"),
        ("completions", {"messages": [TURN]}, "'messages'; did you mean 'prompt'", "messages"),
        ("chat/completions", {"prompt": "x"}, "'prompt'; did you mean 'messages'", "prompt"),
        ("chat/completions", {"messages": [TURN], "max_output_tokens": 3}, "mean 'max_completion_tokens'", None),
        ("completions", {}, "prompt: is missing", "prompt"),
        ("completions", [1], "the body: must be an object (keys with values)", None),
        ("chat/completions", {"messages": [TURN], "max_completion_tokens": "x"}, "must be a whole number", None),
        ("completions", b"{bad", "the body is not JSON: Expecting property name", None),
        ("completions", b'{"prompt": ', "at character 11", None),
        ("completions", {"prompt": "x", "temperature": 3}, "temperature=3.0 must be between 0 and 2", "temperature"),
        ("completions", {"prompt": ""}, "prompt is empty", None),
        ("completions", {"prompt": "x" * 127}, "maximum context length is 127", None),
        ("completions", {"prompt": [999]}, "no token ids", None),
        ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens=-1 must be at least 1, or null", "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "returns nothing without echo: set echo=true", "max_tokens"),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs cannot be", None),
        ("completions", {"prompt": "x", "response_format": NO_SCHEMA}, "response_format cannot be compiled", None),
        ("completions", {"prompt": "x", "structured_outputs": {"yaml": "("}}, "no field 'yaml'", None),
        ("completions", {"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type='xml'", None),
        ("completions", {"prompt": "x", "response_format": {"type": "json_schema"}}, "json_schema.schema", None),
        ("completions", {"prompt": "x", "stream_options": {"usage": True}}, "field 'stream_options.usage'", None),
        ("chat/completions", {"messages": []}, "messages is empty", None),
        ("chat/completions", {"messages": [TURN], "top_logprobs": 3}, "needs logprobs", None),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(server, route, body, said, param):
    status, answer = server.post(f"/v1/{route}", body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert (answer["error"]["type"], answer["error"]["code"]) == ("BadRequestError", 400)
    assert param is None or answer["error"]["param"] == param
    assert not isinstance(body, bytes) or answer["error"]["param"] is None


@pytest.mark.parametrize(
    ("route", "code", "kind"),
    [("/v1/completionz", 404, "NotFoundError"), ("/v1/models", 405, "MethodNotAllowedError")],
)
def test_a_route_that_is_not_there_is_told_with_the_next_step(server, route, code, kind):
    status, answer = server.post(route, {"prompt": "x"})
    assert status == code
    assert (answer["error"]["type"], answer["error"]["code"], answer["error"]["param"]) == (kind, code, None)
    step = "did you mean '/v1/completions'?" if code == 404 else "use GET"
    assert answer["error"]["message"] == f"no route 'POST {route}'; {step}"


def test_a_route_that_is_near_to_none_is_told_with_all_of_them(server):
    status, answer = server.post("/nothing/like/it", {"prompt": "x"})
    said, _, routes = answer["error"]["message"].partition("; there are ")
    assert (status, said) == (404, "no route 'POST /nothing/like/it'")
    known = routes.split(", ")
    assert known == sorted(set(known), key=lambda each: each.split()[::-1])
    there = {"GET /", "GET /health", "GET /metrics", "POST /v1/chat/completions", "GET /v1/models/{id}"}
    assert there <= set(known)


@pytest.mark.parametrize("route", ["/v1/chat/completion", "/chat/completions"])
def test_the_nearest_route_is_told(server, route):
    message = server.post(route, {"prompt": "x"})[1]["error"]["message"]
    assert message.startswith(f"no route 'POST {route}'; did you mean '/v1/chat/completions'?")


def test_an_adapter_that_does_not_fit_is_told_to_who_asks_for_it(server, folder, llm):
    other = save_adapter(folder / "gpt2", LoraConfig(r=3, target_modules=["c_attn"]), family="gpt2")
    status, answer = server.post("/v1/completions", {"prompt": "x", "model": "gpt2"})
    assert (status, answer["error"]["type"]) == (400, "BadRequestError")
    stream = server.client.completions.create(model="gpt2", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="c_attn"):
        list(stream)
    shutil.rmtree(other)
    fine = server.client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=9)
    assert fine.choices[0].text == expected(llm).text


def test_a_body_under_another_content_type_is_told(server):
    """curl -d says application/x-www-form-urlencoded where no header is given."""
    asked = urllib.request.Request(f"{server.url}/v1/completions", b'{"prompt": "x"}')
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    assert refused.value.code == 400
    told = json.load(refused.value)["error"]["message"]
    assert "curl needs -H 'Content-Type: application/json'" in told
    assert "given application/x-www-form-urlencoded" in told


HINTS = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "1h"},
}  # fmt: skip
OF_CHAT = {"reasoning_effort": "low", "verbosity": "low", "prediction": {"type": "content", "content": "x"}}
OF_RESPONSES = {"reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"}}
OF_MESSAGES = {
    "metadata": {"user_id": "u"}, "service_tier": "auto", "speed": "fast", "output_config": {"effort": "low"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("route", "asked", "hints"),
    [
        ("completions", {"prompt": "x", "max_tokens": 1}, HINTS),
        ("chat/completions", {"messages": [TURN], "max_tokens": 1}, HINTS | OF_CHAT),
        ("responses", {"input": "x", "max_output_tokens": 1}, HINTS | OF_RESPONSES),
        ("messages", {"messages": [TURN], "max_tokens": 1}, OF_MESSAGES),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_hints_are_taken_and_named_in_a_header(server, route, asked, hints, stream):
    def told(body) -> tuple[str, set[str]]:
        with urllib.request.urlopen(
            server.asked(f"/v1/{route}", body | {"temperature": 0, "stream": stream})
        ) as answer:
            assert answer.read()
            return answer.headers.get("X-Ignored-Fields", "")

    assert told(asked) == ""
    names = set(hints) - ({"user", "metadata"} if route == "responses" else set())
    parts = {"text": "text.verbosity", "output_config": "output_config.effort"}
    assert set(told(asked | hints).split(", ")) == {parts.get(name, name) for name in names}


def test_files_are_not_looked_at_in_the_loop_of_the_server(server, monkeypatch):
    threads, find = [], Catalogue.find

    def watched(self: Catalogue, name: str | None) -> Any:
        threads.append(threading.current_thread())
        return find(self, name)

    monkeypatch.setattr(Catalogue, "find", watched)
    status, _ = server.post("/v1/completions", {"model": "lora", "prompt": PROMPT, "max_tokens": 1})
    assert status == 200
    assert threads
    assert server.thread not in threads
