"""A rollout as a conversation: the model calls tools, reads their answers and goes on, each at its own pace.

Messages, masks, counts and ends are the same as in TRL's loop of tool calls, which asks all conversations of a batch
turn by turn. Here each conversation is a coroutine that waits only for its own tools.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from veneer.errors import TrainingError
from veneer.learn.journal import Line, hash_of, mask_of, packed, runs_of, unpacked
from veneer.learn.limited import EndedError, awaited, begun, left
from veneer.learn.rollouts import DrawnAnswer

Message = dict[str, Any]
Tool = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RolloutLimits:
    """Limits of a conversation.

    ``turns``: answers of the model after its first. ``tokens``: all tokens after the prompt. ``context``: all tokens
    with the prompt. ``seconds``: the time of the whole conversation; no limit if None. ``tool_seconds``: the time of
    one call of a tool. ``response``: characters of one call's result.
    """

    turns: int
    tokens: int
    context: int
    seconds: float | None
    tool_seconds: float
    response: int


@dataclass(slots=True)
class Rollout:
    """A conversation after its prompt. Each list has an entry for each token, except ``kept``.

    ``mask`` is 1 for tokens that the model generated and 0 for tokens of tools' messages, whose ``logprobs`` are 0.
    ``kept`` has an entry for each generated token only (see `DrawnAnswer`). ``observation`` is the first message of an
    environment.
    """

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    mask: list[int]
    kept: list[float]
    messages: list[Message]
    adapter: str | None
    finish: Any
    n_calls: int = 0
    n_failures: int = 0
    timed_out: bool = False
    observation: Any = None

    @classmethod
    def of(cls, prompt_ids: Sequence[int], answer: DrawnAnswer, message: Message) -> Rollout:
        """Return the rollout that consists of one answer, before any tool is called."""
        n = len(answer.token_ids)
        return cls(
            [*prompt_ids], [*answer.token_ids], [*answer.logprobs], [1] * n, [*answer.kept], [message],
            answer.adapter, answer.finish_reason,
        )  # fmt: skip

    def extend(self, suffix: Sequence[int], answer: DrawnAnswer | None) -> None:
        """Add the tokens ``suffix`` of tools' messages, and the model's answer to them. ``answer`` is None if there is
        no room for an answer.
        """
        self.ids += suffix
        self.mask += [0] * len(suffix)
        self.logprobs += [0.0] * len(suffix)
        if answer is None:
            self.finish = "length"
            return
        self.ids += answer.token_ids
        self.mask += [1] * len(answer.token_ids)
        self.logprobs += answer.logprobs
        self.kept += answer.kept
        self.finish = answer.finish_reason

    @classmethod
    def recalled(cls, line: Line, prompt_ids: Sequence[int]) -> Rollout:
        """Return the rollout that a line of a journal holds."""
        kept = unpacked(line["kept"]) if "kept" in line else [0.0] * sum(mask_of(line["mask"]))
        completion = line["completion"] if isinstance(line["completion"], list) else []
        return cls(
            [*prompt_ids], line["ids"], unpacked(line["logprobs"]), mask_of(line["mask"]), kept, completion,
            line["adapter"], line["finish"], line["calls"], line["failures"], line.get("timed_out", False),
            line.get("observation"),
        )  # fmt: skip

    def line(self) -> Line:
        """Return the rollout's tokens as a line of a journal."""
        found = {
            "adapter": self.adapter, "prompt_hash": hash_of(self.prompt_ids), "ids": self.ids,
            "logprobs": packed(self.logprobs), "mask": runs_of(self.mask), "finish": self.finish,
            "calls": self.n_calls, "failures": self.n_failures, "timed_out": self.timed_out,
        }  # fmt: skip
        return found | ({"kept": packed(self.kept)} if any(self.kept) else {})

    @property
    def first_answer(self) -> DrawnAnswer:
        """The tokens before the first tool's response, as an answer."""
        n = next((place for place, own in enumerate(self.mask) if not own), len(self.ids))
        return DrawnAnswer(
            tuple(self.ids[:n]), tuple(self.logprobs[:n]), tuple(self.kept[:n]), self.adapter, self.finish
        )

    @property
    def answer(self) -> DrawnAnswer:
        """All tokens as one answer. Tokens that the model did not generate have log-probability 0."""
        return DrawnAnswer(tuple(self.ids), tuple(self.logprobs), tuple(self.kept), self.adapter, self.finish)


@dataclass(frozen=True, slots=True)
class Turn:
    """Request for an answer of at most ``n_tokens`` tokens to the tokens ``ids``.

    ``number`` counts the conversation's answers from 0.
    """

    ids: list[int]
    n_tokens: int
    number: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Request to wait for a tool's result until the time ``until`` of `time.monotonic`."""

    told: Future[Any]
    until: float


@dataclass(frozen=True, slots=True)
class Speech:
    """Translation of a chat's messages into tokens and back.

    ``suffix_of`` returns the tokens of tools' messages and of the header of the next answer. ``message_of(before,
    ids)`` parses an answer's tokens, given the tokens before it.
    """

    suffix_of: Callable[[list[Message]], list[int]]
    message_of: Callable[[list[int], list[int]], Message]


@dataclass(frozen=True, slots=True)
class RolloutTools:
    """Tools of one conversation by name: plain functions and asynchronous ones. ``run`` starts an asynchronous tool's
    coroutine.
    """

    plain: Mapping[str, Tool]
    asynchronous: Mapping[str, Tool]
    run: Callable[[Any], Future[Any]] | None


class OutOfTimeError(Exception):
    """Error for a conversation whose time ends while a tool runs."""


@dataclass(slots=True)
class Conversation:
    """Conversation between a model and its tools, which extends ``rollout`` in place.

    ``name`` is the conversation's name in error messages.
    """

    rollout: Rollout
    tools: RolloutTools
    speech: Speech
    limits: RolloutLimits
    name: str
    _end: float | None = None

    def run(self) -> Generator[Turn | Wait, Any, None]:
        """Continue after the first answer until an answer calls no tool, or a limit is reached.

        Yields a `Turn` for each answer that the conversation needs, and a `Wait` for each tool's result. If there is no
        room for a tool's response, the response is dropped, and the conversation ends with the answer that called the
        tool. A call that takes too long is abandoned, and a message tells the model so. Raises TrainingError for a tool
        that raises something other than an Exception.
        """
        rollout, limits = self.rollout, self.limits
        self._end = None if limits.seconds is None else time.monotonic() + limits.seconds
        calls, number = rollout.messages[-1].get("tool_calls"), 0
        while calls and number < limits.turns:
            try:
                responses = yield from self._responses(calls)
            except OutOfTimeError:
                rollout.timed_out = True
                return
            suffix = self.speech.suffix_of(responses)
            room = limits.tokens - len(rollout.ids) - len(suffix)
            prefix = [*rollout.prompt_ids, *rollout.ids, *suffix]
            if room < 0 or len(prefix) >= limits.context:
                return
            number += 1
            answer = (yield Turn(prefix, room, number)) if room else None
            rollout.messages += responses
            rollout.extend(suffix, answer)
            if answer is None or not answer.token_ids:
                return
            message = self.speech.message_of([*answer.token_ids], prefix)
            rollout.messages.append(message)
            calls = message.get("tool_calls")

    def _responses(self, calls: Sequence[Any]) -> Generator[Wait, Any, list[Message]]:
        """Run the calls, and return the tools' messages in TRL's order. Asynchronous tools run together, and their
        messages come last.
        """
        found: list[tuple[str, Any]] = []
        together: list[tuple[str, Future[Any]]] = []
        for call in calls:
            self.rollout.n_calls += 1
            if call["type"] != "function":
                name, error = call.get("name", "unknown"), f"Unsupported tool call type: {call['type']}"
                found.append((name, self._failed(error)))
                continue
            name, given = call["function"]["name"], call["function"]["arguments"]
            if name in self.tools.plain:
                found.append((name, (yield from self._result(name, begun(self.tools.plain[name], given)))))
            elif name in self.tools.asynchronous and self.tools.run is not None:
                together.append((name, self.tools.run(awaited(self.tools.asynchronous[name], given))))
            else:
                found.append((name, self._failed(f"Tool {name} not found.")))
        for name, told in together:
            found.append((name, (yield from self._result(name, told))))
        return [{"role": "tool", "name": n, "content": _content(told, self.limits.response)} for n, told in found]

    def _result(self, name: str, told: Future[Any]) -> Generator[Wait, Any, Any]:
        """Wait for a tool's result and return it, or a message to the model if the tool fails or is too slow.

        ``name`` is the tool's name, and ``told`` the future of its result. Raises OutOfTimeError if the conversation's
        time ends first, and TrainingError if the tool raises an exception that ends a program.
        """
        until = time.monotonic() + self.limits.tool_seconds
        yield Wait(told, until if self._end is None else min(until, self._end))
        if not told.done():
            told.cancel()
            if self._end is not None and self._end <= until:
                raise OutOfTimeError
            return self._failed(f"timed out after {self.limits.tool_seconds:g} seconds")
        error = told.exception()
        if error is None:
            return told.result()
        if isinstance(error, Exception):
            return self._failed(str(error))
        kind = type(error.__cause__ if isinstance(error, EndedError) else error).__name__
        raise TrainingError(
            f"the tool {name}, called in {self.name}, raised {kind}, which ends a program: raise an "
            "Exception to tell the model of an error"
        ) from error

    def _failed(self, error: str) -> dict[str, str]:
        self.rollout.n_failures += 1
        return {"error": error}


def _content(result: Any, most: int) -> Any:
    if isinstance(result, list):
        return result
    text = str(result)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters, cut to {most:,})"


def converse(
    conversations: Sequence[Conversation],
    ask: Callable[[int, Turn], None],
    step: Callable[[], Sequence[tuple[int, DrawnAnswer]]],
) -> None:
    """Run conversations to their ends in this thread, so that answers are generated while tools work.

    ``ask(number, turn)`` requests an answer for a conversation, given by its number. ``step()`` computes one batch of
    all requested answers and returns those that are complete, with their conversations' numbers. Raises the errors of
    `Conversation.run`.
    """
    running = [each.run() for each in conversations]
    waits: dict[int, Wait] = {}
    n_turns = 0

    def go_on(number: int, value: Any) -> None:
        nonlocal n_turns
        try:
            asked = running[number].send(value)
        except StopIteration:
            return
        if isinstance(asked, Turn):
            n_turns += 1
            ask(number, asked)
        else:
            waits[number] = asked

    for number in range(len(running)):
        go_on(number, None)
    while n_turns or waits:
        if n_turns:
            for number, answer in step():
                n_turns -= 1
                go_on(number, answer)
        else:
            soonest = min(each.until for each in waits.values())
            wait([each.told for each in waits.values()], timeout=left(soonest), return_when=FIRST_COMPLETED)
        now = time.monotonic()
        for number, each in [*waits.items()]:
            if each.told.done() or now >= each.until:
                del waits[number]
                go_on(number, None)
