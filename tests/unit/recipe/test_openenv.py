"""Environments of OpenEnv, on a stand-in for its client: sessions, tools with their schemas, rewards, ends."""

from __future__ import annotations

import io
import json
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import get_json_schema

from veneer.errors import ConfigError
from veneer.recipe.openenv import OVER, environment, served
from veneer.recipe.recipe import load_recipe

WORD = {
    "description": "A guess.",
    "properties": {
        "word": {"type": "string", "description": "Five\nletters."},
        "sure": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
        "metadata": {"type": "object"},
    },
    "required": ["word"],
}
CALL = {"properties": {"type": {}, "tool_name": {"type": "string"}, "arguments": {"type": "object"}}}
TOOLS = [
    {
        "name": "add",
        "description": "Add numbers.\n\n    Args:\n        a: first",
        "input_schema": {
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
        },
    },
    {"name": "look", "description": "Look.", "input_schema": {"type": "object"}},
]  # fmt: skip


def result(observation: Any, reward: float | None = None, done: bool = False) -> SimpleNamespace:
    return SimpleNamespace(observation=observation, reward=reward, done=done)


class Words:
    """Client whose word is the row's; the second step ends the episode."""

    def __init__(self) -> None:
        self.is_closed = False

    def reset(self, **options: Any) -> Any:
        self.options, self.actions = options, list[Any]()
        return result({"prompt": "Guess.", "messages": []})

    def step(self, action: dict[str, Any]) -> Any:
        self.actions.append(action)
        return result({"hint": "no", "left": 7}, reward=0.25, done=len(self.actions) == 2)

    def close(self) -> None:
        self.is_closed = True


class Tools(Words):
    def step(self, action: dict[str, Any]) -> Any:
        if action == {"type": "list_tools"}:
            return result({"tools": TOOLS})
        if action["tool_name"] == "look":
            return result({"tool_name": "look", "result": None, "error": {"message": "dark", "error_type": "x"}})
        given = action["arguments"]
        return result({"tool_name": "add", "result": {"data": given["a"] + given["b"]}, "error": None}, reward=1.0)


def test_the_fields_of_an_action_are_a_tool() -> None:
    made = environment(Words, WORD)()
    schema = get_json_schema(made.step)["function"]
    assert schema["description"] == "A guess."
    assert schema["parameters"]["required"] == ["word"]
    assert schema["parameters"]["properties"] == {
        "word": {"type": "string", "description": "Five letters."},
        "sure": {"type": "number", "description": "sure"},
    }


def test_an_episode_has_the_sum_of_its_rewards() -> None:
    made, other = environment(Words, WORD)(), environment(Words, WORD)()
    for _ in range(2):
        assert made.reset(prompt=[], word="crane") == "Guess."
        assert made.get_reward() == 0
        assert made.step(word="slate") == '{"hint": "no", "left": 7}'
        assert made.step(word="crane", sure=0.5) == '{"hint": "no", "left": 7}'
        assert made.step(word="crane") == OVER
        assert made.get_reward() == 0.5
        assert made._client.options == {"word": "crane"}
        assert made._client.actions == [{"word": "slate"}, {"word": "crane", "sure": 0.5}]
    other.reset()
    assert other._client is not made._client


def test_tools_of_mcp_are_methods() -> None:
    clients: list[Tools] = []

    def connect() -> Tools:
        clients.append(Tools())
        return clients[-1]

    made = environment(connect, CALL)()
    assert clients[0].is_closed
    assert get_json_schema(made.add)["function"]["description"] == "Add numbers."
    made.reset()
    assert made.add(a=7, b=11) == "18"
    assert made.get_reward() == 1
    with pytest.raises(RuntimeError, match="dark"):
        made.look()


class Slow(Words):
    """Client whose steps wait for ``answer`` and earn 1."""

    def __init__(self) -> None:
        super().__init__()
        self.is_stepping, self.answer = threading.Event(), threading.Event()

    def step(self, action: dict[str, Any]) -> Any:
        self.is_stepping.set()
        assert self.answer.wait(10)
        return result(f"answer to {action['word']}", reward=1.0)


def begun(made: Any, client: Slow, word: str) -> threading.Thread:
    """Return a thread in which a step of the client has begun."""
    thread = threading.Thread(target=made.step, kwargs={"word": word}, daemon=True)
    thread.start()
    assert client.is_stepping.wait(10)
    return thread


def test_a_late_answer_belongs_to_its_own_call_and_episode() -> None:
    clients: list[Slow] = []

    def connect() -> Slow:
        clients.append(Slow())
        return clients[-1]

    made = environment(connect, WORD)()
    made.reset()
    slow = begun(made, clients[0], "crane")
    assert made.step(word="slate") == OVER  # the session is still busy with the first call
    assert made.reset() == "Guess."
    first, second = clients
    first.answer.set()
    slow.join(10)
    assert (first.is_closed, second.is_closed) == (True, False)
    assert made.get_reward() == 0
    slow = begun(made, second, "adieu")
    second.answer.set()  # late, but in its own episode
    slow.join(10)
    assert made.step(word="slate") == "answer to slate"
    assert made.get_reward() == 2
    made.reset()
    assert len(clients) == 2
    assert not second.is_closed


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (RuntimeError("Server error: bad word (code: EXECUTION_ERROR)"), True),
        (RuntimeError("Server error: full (code: CAPACITY_REACHED)"), False),
        (ConnectionError("closed"), False),
    ],
)
def test_a_session_is_kept_after_an_error_of_its_environment_only(
    error: Exception, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    made = environment(Words, WORD)()
    made.reset()
    first = made._client
    with monkeypatch.context() as patch:
        patch.setattr(Words, "step", fails)
        with pytest.raises(type(error), match=str(error).split(" (")[0]):
            made.step(word="crane")
    assert first.is_closed is not is_kept
    assert (made.step(word="crane") == OVER) is not is_kept
    assert made.reset() == "Guess."
    assert (made._client is first) is is_kept


def test_a_schema_may_have_several_types_and_no_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS[1], "description", None)
    monkeypatch.setitem(TOOLS[1], "input_schema", {"properties": {"at": {"type": ["null", "integer"]}}})
    schema = get_json_schema(environment(Tools, CALL)().look)["function"]
    assert schema["description"] == "look"
    assert schema["parameters"]["properties"]["at"]["type"] == "integer"


def test_a_server_gives_a_class_or_its_own_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[str] = []

    def client(base_url: str) -> Any:
        addresses.append(base_url)
        return SimpleNamespace(sync=Tools)

    def answer(url: str, timeout: float) -> io.BytesIO:
        assert url == "http://host:1/schema"
        return io.BytesIO(json.dumps({"action": CALL}).encode())

    generic: Any = SimpleNamespace(GenericEnvClient=client)
    for name in ("openenv", "openenv.core", "openenv.core.generic_client"):
        monkeypatch.setitem(sys.modules, name, generic)
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    made = served("http://host:1/")()
    for _ in range(2):
        made.reset()
        assert made.add(a=7, b=11) == "18"
        assert made.get_reward() == 1
    assert addresses == ["http://host:1/"] * 2  # one for the tools' list, one for the episodes
    monkeypatch.setitem(TOOLS[0], "name", "reset")
    monkeypatch.setitem(TOOLS[1], "name", "two words")
    with pytest.raises(ConfigError) as told:
        served("http://host:1")
    assert str(told.value) == (
        "tools of the OpenEnv environment cannot be methods: reset, two words. Give each a public name of Python other "
        "than get_reward or reset"
    )


def test_a_tool_that_cannot_be_a_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reset", "get_reward", "_hidden", "two words"):
        monkeypatch.setitem(TOOLS[1], "name", name)
        with pytest.raises(ConfigError, match=f"cannot be methods: '?{name}.* Give each a public name"):
            environment(Tools, CALL)


def test_a_recipe_without_openenv_or_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: grpo\nmodel: {source: m}\ndata: {train: t.jsonl}\noutput: o\nenvironment: openenv:http://127.0.0.1:9\n"
    )
    monkeypatch.setitem(sys.modules, "openenv", None)
    with pytest.raises(ConfigError, match="pip install openenv"):
        load_recipe(path)
    generic: Any = SimpleNamespace(GenericEnvClient=None)
    for name in ("openenv", "openenv.core", "openenv.core.generic_client"):
        monkeypatch.setitem(sys.modules, name, generic)
    with pytest.raises(ConfigError, match=r"does not tell its actions .* Start it"):
        load_recipe(path)
    with pytest.raises(ConfigError, match="is no address of a server: write openenv:http://HOST:PORT"):
        load_recipe(path, ["environment=openenv:localhost"])
