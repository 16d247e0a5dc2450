"""Answers that appear word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.cli.loading import Loaded
from veneer.errors import ConfigError

Message = dict[str, str]


def encode_chat(loaded: Loaded, messages: Sequence[Message]) -> Any:
    """The conversation under the chat template, ready for the assistant's turn: input_ids and attention_mask (1, n)."""
    if loaded.tokenizer.chat_template is None:
        raise ConfigError(
            "this model has no chat template, so it cannot chat: use `veneer generate`, which sends plain text"
        )
    return loaded.tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def encode_prompt(loaded: Loaded, prompt: str, *, system: str | None = None, raw: bool = False) -> Any:
    """A prompt as one user turn where the model has a chat template, as plain text otherwise or where ``raw``."""
    if raw or loaded.tokenizer.chat_template is None:
        if system is not None:
            raise ConfigError(
                "--system needs a chat template; with --raw, or a model without one, put it in the prompt"
            )
        return loaded.tokenizer(prompt, return_tensors="pt")
    turns = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(loaded, [*turns, {"role": "user", "content": prompt}])


def stream_answer(loaded: Loaded, encoded: Any, options: dict[str, Any]) -> str:
    """Print the answer to stdout while it is generated, and give it back."""
    import torch
    from transformers import TextStreamer

    ids = encoded["input_ids"]
    room = _room(loaded.model, ids.shape[1])
    if room is not None:
        options = {**options, "max_new_tokens": min(options["max_new_tokens"], room)}
    pad = loaded.tokenizer.pad_token_id
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        output = loaded.model.generate(
            input_ids=ids.to(loaded.model.device),
            attention_mask=encoded["attention_mask"].to(loaded.model.device),
            pad_token_id=loaded.tokenizer.eos_token_id if pad is None else pad,
            streamer=streamer,
            **options,
        )
    return str(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _room(model: Any, n_prompt: int) -> int | None:
    """The number of tokens that fit behind the prompt; None where the model has no limit."""
    from veneer.evaluate.scoring import context_length

    limit = context_length(model)
    if limit is None:
        return None
    if n_prompt == 0:
        raise ConfigError("the prompt is empty: nothing to continue")
    if n_prompt >= limit:
        raise ConfigError(f"the prompt has {n_prompt} tokens and the model's context holds {limit}: shorten it")
    return limit - n_prompt
