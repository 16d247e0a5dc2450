"""Environments of OpenEnv, on a stand-in for its client: sessions, tools with their schemas, rewards, ends."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import get_json_schema

from veneer.errors import ConfigError
from veneer.recipe.openenv import OVER, environment
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
