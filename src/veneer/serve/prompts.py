"""Prompts in the forms in which they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError

Prompt = str | Sequence[int] | Mapping[str, Any]


def read_prompt(tokenizer: Any, prompt: Prompt) -> tuple[str | None, list[int]]:
    """A prompt's text, where it has one, and its ids. Raises ConfigError for what is no prompt."""
    if isinstance(prompt, Mapping):
        known = {"prompt", "prompt_token_ids"}
        if not prompt or set(prompt) - known:
            raise ConfigError(f"a prompt that is a mapping has {sorted(known)}, not {sorted(prompt)}")
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), read_prompt(tokenizer, prompt["prompt_token_ids"])[1]
        return read_prompt(tokenizer, prompt["prompt"])
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False)["input_ids"]  # no warning: `Engine.asked` refuses what is too long
        return prompt, list(ids)
    if isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt):
        return None, [int(id) for id in prompt]
    raise ConfigError(f"{prompt!r} is no prompt: give text, a list of token ids, or a mapping with one of them")
