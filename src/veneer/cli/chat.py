"""``veneer chat``: a conversation in the terminal."""

from __future__ import annotations

from rich.console import Console

from veneer.cli import loading
from veneer.errors import ConfigError


def chat(
    model: loading.Model,
    adapter: loading.Adapter = None,
    system: loading.System = None,
    max_new_tokens: loading.MaxNewTokens = 512,
    temperature: loading.Temperature = 0.7,
    top_p: loading.TopP = 0.9,
    top_k: loading.TopK = 0,
    seed: loading.Seed = None,
    load_in_4bit: loading.FourBit = False,
    dtype: loading.Dtype = "auto",
) -> None:
    """Talk to a model. /new forgets the conversation; Ctrl-C stops an answer; Ctrl-D or /exit leaves.

    Example: veneer chat smollm2-135m-instruct --adapter runs/first/adapter
    """
    from veneer.cli.answerer import Drawing
    from veneer.cli.answering import Message, answerer_of, encode_chat

    parts = loading.load_parts(model, adapter, four_bit=load_in_4bit, dtype=dtype)
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    encode_chat(parts.tokenizer, [*start, {"role": "user", "content": "?"}])  # what cannot chat says so at once
    answerer = answerer_of(parts, Drawing(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed))
    console = Console(highlight=False)
    messages = list(start)
    while (line := _ask(console)) is not None:
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        prompt = encode_chat(answerer.tokenizer, messages)
        try:
            messages.append({"role": "assistant", "content": answerer.stream(prompt, max_new_tokens)})
        except KeyboardInterrupt:
            messages.pop()
            console.print("\n(stopped; the question is forgotten)", style="dim")
        except ConfigError as error:  # the context is full
            messages.pop()
            console.print(f"{error}, or /new forgets the conversation (the question is forgotten)", style="yellow")


def _ask(console: Console) -> str | None:
    """The next line that is not empty; None at the end."""
    while True:
        try:
            line = console.input("[bold cyan]>[/] ").strip()
        except EOFError:
            console.print()
            return None
        if line == "/exit":
            return None
        if line:
            return line
