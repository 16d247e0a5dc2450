"""Environments of OpenEnv: a client of a running server becomes a class of TRL's ``environment_factory``.

Source: openenv-core 0.3.0, ``openenv.core.generic_client`` and ``openenv.core.env_server``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from veneer.errors import ConfigError

PREFIX = "openenv:"
OVER = "The episode is over."
_OF_ENVIRONMENT = ("EXECUTION_ERROR", "VALIDATION_ERROR")  # codes of a server's errors that leave its session open

_TYPES: Mapping[str, type] = {
    "string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict,
}  # fmt: skip


class Result(Protocol):
    """``StepResult`` of OpenEnv; the observation is a mapping of JSON."""

    observation: Any
    reward: float | None
    done: bool


class EnvClient(Protocol):
    """Synchronous ``GenericEnvClient`` of OpenEnv: one session, in which actions are mappings of JSON."""

    def reset(self, **options: Any) -> Result: ...

    def step(self, action: dict[str, Any]) -> Result: ...

    def close(self) -> None: ...


def served(url: str) -> type:
    """Return the class of the environments that an OpenEnv server at ``url`` runs, each in a session of its own.

    Raises ConfigError if OpenEnv is not installed, the server does not answer, or a tool cannot be a method.
    """
    try:
        generic = importlib.import_module("openenv.core.generic_client")
    except ImportError as error:
        raise ConfigError(f"environment: {PREFIX}{url} needs OpenEnv ({error}): pip install openenv") from error
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"environment: {PREFIX}{url} is no address of a server: write {PREFIX}http://HOST:PORT")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/schema", timeout=30) as answer:
            action = json.load(answer)["action"]
        return environment(lambda: generic.GenericEnvClient(base_url=url).sync(), action)
    except ConfigError:  # a ValueError too, with its own advice
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"environment: the OpenEnv server {url} does not tell its actions ({type(error).__name__}: {error}). "
            "Start it, and give its address"
        ) from error


def environment(connect: Callable[[], EnvClient], action: Mapping[str, Any]) -> type:
    """Return a class of environments whose public methods are the tools of an OpenEnv environment.

    ``action`` is the JSON schema of its actions. If they are calls of tools (MCP), each tool is a method; else one
    method, ``step``, takes an action's fields. ``get_reward`` is the sum of an episode's rewards. Raises ConfigError if
    a tool has a name that cannot be a method's.
    """
    names = {"reset", "get_reward"}
    if {"tool_name", "arguments"} <= set(action.get("properties", {})):
        methods = [_tool(each) for each in _listed_tools(connect)]
    else:
        own = {"description": action.get("description") or "Act in the environment.", "input_schema": action}
        methods = [_method("step", own, dict, lambda observation: _text(observation))]
    bad = [each.__name__ for each in methods if each.__name__ in names or not _is_public(each.__name__)]
    if bad:
        raise ConfigError(
            f"tools of the OpenEnv environment cannot be methods: {', '.join(bad)}. Give each a public name of Python "
            f"other than {' or '.join(sorted(names))}"
        )

    def made(self: OpenEnv) -> None:
        OpenEnv.__init__(self, connect)

    return type("OpenEnv", (OpenEnv,), {"__init__": made, **{each.__name__: each for each in methods}})


class OpenEnv:
    """A session of an OpenEnv environment, with TRL's ``reset`` and ``get_reward``.

    A call takes the session's client, because an abandoned call still waits for its answer, which the next call on the
    client would receive. The client comes back with the answer, if its episode goes on by then; else it is closed.
    """

    def __init__(self, connect: Callable[[], EnvClient]) -> None:
        self._connect, self._lock = connect, threading.Lock()
        self._client: EnvClient | None = None
        self._episode, self._reward, self._is_over = 0, 0.0, True

    def reset(self, **row: Any) -> str:
        """Begin an episode with the row's columns except its prompt, and return the first observation.

        Open a new session if there is none, or if a call still waits in it.
        """
        options = {key: value for key, value in row.items() if key != "prompt"}
        with self._lock:
            client, self._client = self._client, None
            self._episode, self._reward, self._is_over = self._episode + 1, 0.0, False
            episode = self._episode
        client = client or self._connect()
        return _text(self._observed(client, episode, lambda: client.reset(**options)))

    def get_reward(self) -> float:
        """Return the sum of the episode's rewards."""
        return self._reward

    def _act(self, action: dict[str, Any]) -> Any:
        """Take a step with an action, and return the observation. Return None if no episode is open, or if a call still
        waits in its session.
        """
        with self._lock:
            if self._client is None or self._is_over:
                return None
            client, self._client, episode = self._client, None, self._episode
        return self._observed(client, episode, lambda: client.step(action))

    def _observed(self, client: EnvClient, episode: int, call: Callable[[], Result]) -> Any:
        """Return the observation of a client's call, and count its reward if the episode still goes on.

        Keep the client if, besides, the call returned or the environment itself failed.
        """
        is_kept = False
        try:
            result = call()
            with self._lock:
                if is_kept := episode == self._episode:
                    self._reward += float(result.reward or 0.0)
                    self._client, self._is_over = client, bool(result.done)
            return result.observation
        except RuntimeError as error:
            with self._lock:
                if is_kept := episode == self._episode and any(code in str(error) for code in _OF_ENVIRONMENT):
                    self._client = client
            raise
        finally:
            if not is_kept:
                client.close()


def _listed_tools(connect: Callable[[], EnvClient]) -> Sequence[Mapping[str, Any]]:
    client = connect()
    try:
        tools: Sequence[Mapping[str, Any]] = client.step({"type": "list_tools"}).observation["tools"]
        return tools
    finally:
        client.close()


def _tool(tool: Mapping[str, Any]) -> Callable[..., str]:
    name = tool["name"]

    def action(arguments: dict[str, Any]) -> dict[str, Any]:
        return {"type": "call_tool", "tool_name": name, "arguments": arguments}

    def told(observation: Any) -> str:
        if observation.get("error"):  # the model is told, as of a tool that raises
            raise RuntimeError(observation["error"].get("message", f"{name} failed"))
        result = observation.get("result")
        return _text(result["data"] if isinstance(result, dict) and "data" in result else result)

    return _method(name, tool, action, told)


def _method(
    name: str,
    tool: Mapping[str, Any],
    action: Callable[[dict[str, Any]], dict[str, Any]],
    told: Callable[[Any], str],
) -> Callable[..., str]:
    """Return a method that sends one tool's action to the environment and returns the observation as text.

    Its signature and docstring come from the tool's JSON schema, because transformers derives a tool's description from
    them.
    """

    def method(self: OpenEnv, **given: Any) -> str:
        observation = self._act(action(given))
        return OVER if observation is None else told(observation)

    fields = {key: each for key, each in tool["input_schema"].get("properties", {}).items() if key != "metadata"}
    required = set(tool["input_schema"].get("required", ()))
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(key, kind, annotation=_type(each), default=inspect.Parameter.empty)
        if key in required
        else inspect.Parameter(key, kind, annotation=_type(each), default=each.get("default"))
        for key, each in fields.items()
    ]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__name__ = method.__qualname__ = name
    method.__signature__ = inspect.Signature([own, *parameters], return_annotation=str)  # type: ignore[attr-defined]
    method.__annotations__ = {**{each.name: each.annotation for each in parameters}, "return": str}
    lines = [f"    {key}: {_line(each.get('description') or key)}" for key, each in fields.items()]
    about = _line((tool.get("description") or "").partition("Args:")[0]) or name
    method.__doc__ = "\n".join([about, *(["", "Args:", *lines] if lines else [])])
    return method


def _type(schema: Mapping[str, Any]) -> type:
    """Return the Python type of a JSON schema. For a list of types or ``anyOf``, it is the first known type; without
    any, it is str.
    """
    given = [schema.get("type"), *(each.get("type") for each in schema.get("anyOf", ()))]
    names = [name for each in given for name in (each if isinstance(each, list) else [each])]
    return next((_TYPES[name] for name in names if name in _TYPES), str)


def _line(text: str) -> str:
    return " ".join(text.split())


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _text(observation: Any) -> str:
    """Return an observation as text. A string is unchanged; a mapping whose only non-empty field is a string gives that
    string; anything else becomes JSON.
    """
    if isinstance(observation, str):
        return observation
    if isinstance(observation, Mapping):
        left = {key: each for key, each in observation.items() if each not in (None, "", [], {})}
        if len(left) == 1 and isinstance(next(iter(left.values())), str):
            return str(next(iter(left.values())))
        observation = left
    return json.dumps(observation, ensure_ascii=False, default=str)
