"""Implementation of ``veneer chat``."""

from __future__ import annotations

import re

from rich.console import Console

from veneer.adapters.chosen import ModelParts
from veneer.answer.answerer import Drawing
from veneer.answer.prompts import Message, encode_chat
from veneer.cli import loading
from veneer.cli.pages.chat import ChatArguments
from veneer.errors import ConfigError

_NEW, _HELP, _EXIT = "/new", "/help", "/exit"
_COMMANDS = f"{_NEW} forgets the conversation, {_EXIT} or Ctrl-D leaves, Ctrl-C stops an answer"
_REPLIES = {_NEW: "a new conversation", _HELP: _COMMANDS}


def chat(args: ChatArguments) -> None:
    """Answer each input until the end of the conversation."""
    parts = loading.load_parts(args.model, args.adapter, four_bit=args.load_in_4bit, dtype=args.dtype)
    start: list[Message] = [] if args.system is None else [{"role": "system", "content": args.system}]
    encode_chat(parts.tokenizer, [*start, {"role": "user", "content": "?"}])  # what cannot chat says so at once
    answerer = loading.answerer_of(
        parts, Drawing(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed)
    )
    console = Console(highlight=False)
    _open(parts, args.system)
    messages = list(start)
    while (line := _ask(console)) is not None:
        if _is_command(line):
            if line == _NEW:
                messages = list(start)
            _say(_REPLIES.get(line, f"no command {line.split()[0]}: {_COMMANDS}. To send it, put a space before it."))
            continue
        messages.append({"role": "user", "content": line.strip()})
        prompt = encode_chat(answerer.tokenizer, messages)
        try:
            messages.append({"role": "assistant", "content": answerer.stream(prompt, args.max_new_tokens)})
        except KeyboardInterrupt:
            messages.pop()
            console.print("\n(stopped; the question is forgotten)", style="dim")
        except ConfigError as error:  # the context is full
            messages.pop()
            console.print(f"{error}, or /new forgets the conversation (the question is forgotten)", style="yellow")


def _open(parts: ModelParts, system: str | None) -> None:
    """Print the first lines to stderr: the model that answers, and the commands."""
    adapter = "" if parts.adapter is None else f" with {parts.adapter}"
    _say(f"{parts.source}{adapter}{'' if system is None else f', told: {system}'}")
    _say(_COMMANDS)


def _say(line: str) -> None:
    """Print a line other than an answer to stderr, so that stdout holds the answers alone."""
    Console(stderr=True, highlight=False).print(line, style="dim", soft_wrap=True, markup=False)


def _is_command(line: str) -> bool:
    """Return True for ``/word``, with or without more words, but not for a path such as ``/etc/hosts``."""
    return re.fullmatch(r"/\w*", line.partition(" ")[0]) is not None


def _ask(console: Console) -> str | None:
    """Read the next line that is not empty; return None at the end of input or at the command that ends the chat. A
    line that starts with a space is never a command.
    """
    while True:
        try:
            line = console.input("[bold cyan]>[/] ").rstrip()
        except EOFError:
            console.print()
            return None
        if line == _EXIT:
            return None
        if line.strip():
            return line
