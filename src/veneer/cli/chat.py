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
    import torch

    from veneer.cli.answering import Message, encode_chat, stream_answer

    loaded = loading.load(model, adapter, four_bit=load_in_4bit, dtype=dtype)
    if seed is not None:
        torch.manual_seed(seed)
    console = Console(highlight=False)
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    encode_chat(loaded, [*start, {"role": "user", "content": "?"}])  # a model that cannot chat says so at once
    options = loading.sampling(temperature, top_p, top_k, max_new_tokens)
    messages = list(start)
    while (line := _ask(console)) is not None:
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        encoded = encode_chat(loaded, messages)
        try:
            with loading.quiet():
                messages.append({"role": "assistant", "content": stream_answer(loaded, encoded, options)})
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
