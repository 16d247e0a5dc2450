"""``veneer generate``: one answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from veneer.cli import loading

_Prompt = Annotated[
    str, typer.Option("--prompt", "-p", metavar="TEXT", show_default=False, help="The prompt; - reads stdin.")
]
_Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Continue the prompt as plain text: for a model trained on plain prompts (data.chat: false)."
    ),
]


def generate(
    model: loading.Model,
    prompt: _Prompt,
    adapter: loading.Adapter = None,
    system: loading.System = None,
    raw: _Raw = False,
    max_new_tokens: loading.MaxNewTokens = 256,
    temperature: loading.Temperature = 0.0,
    top_p: loading.TopP = 1.0,
    top_k: loading.TopK = 0,
    seed: loading.Seed = None,
    load_in_4bit: loading.FourBit = False,
    dtype: loading.Dtype = "auto",
) -> None:
    """Answer one prompt, word by word, on stdout. A model with a chat template is asked in a chat turn, see --raw.

    Example: veneer generate smollm2-135m-instruct -p "Why is the sky blue?"
    """
    from veneer.cli.answerer import Drawing
    from veneer.cli.answering import answerer_of, encode_prompt

    text = sys.stdin.read() if prompt == "-" else prompt
    parts = loading.load_parts(model, adapter, four_bit=load_in_4bit, dtype=dtype)
    ids = encode_prompt(parts.tokenizer, text, system=system, raw=raw)
    answerer = answerer_of(parts, Drawing(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed))
    answer = answerer.stream(ids, max_new_tokens)
    if not answer.strip() and not raw and answerer.tokenizer.chat_template is not None:
        typer.echo(
            "the answer is empty; the prompt was asked as a chat turn: for a model trained on plain prompts use --raw",
            err=True,
        )
