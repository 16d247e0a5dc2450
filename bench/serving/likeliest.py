"""The checks that an engine computes what the model does, which fail if it ignores an adapter or multiplies wrongly.

Each token of a greedy answer must be the likeliest one behind those before it, by transformers and PEFT in float32, or
as good as that: within what 16 bits turn round. Of scores, what an adapter adds must be what it adds there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor

import veneer
from bench.lora_step import base_of
from bench.same import SHARE, PartedError, require_small

NEAR = 0.02  # of the largest logit: what bfloat16 can turn round


class Answered(NamedTuple):
    """A prompt, the greedy answer to it, and the folder of the adapter that gave it; None: the base."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    adapter: str | None = None


def require_likeliest(what: str, place: str, answers: Iterable[Answered], base: str = "dense") -> None:
    """Print how far tokens are from the likeliest. PartedError where one is further than rounding takes it.

    It may be `NEAR`, or as far as transformers' own bfloat16 moves the two logits at that place. ``base``: as of
    `base_of`.
    """
    worst = 0.0
    for answer in answers:
        exact = logits(place, answer, torch.float32, base)
        best, token = exact.argmax(-1, keepdim=True), torch.tensor(answer.tokens)[:, None]
        short = _between(exact, best, token)
        allowed = (NEAR if base == "dense" else 2 * NEAR) * exact.abs().amax(-1)  # decoded weights are rounded too
        if (short > allowed).any():
            moved = short - _between(logits(place, answer, torch.bfloat16, base), best, token)
            allowed = torch.maximum(allowed, moved.abs())
        if (short > allowed).any():
            at = int((short - allowed).argmax())
            raise PartedError(
                f"{what}: token {at + 1} of an answer lies {short[at]:.2f} below the likeliest one, and rounding moves "
                f"it by {allowed[at]:.2f}: they part by more, so that no times are given"
            )
        worst = max(worst, float(short.max()))
    print(f"{what}: tokens are the model's; at logits {worst:.2f} below the likeliest at most", flush=True)


def require_scores(what: str, place: str, prompt: Sequence[int], scores: Sequence[float], adapter: str) -> None:
    """PartedError where log-probabilities of a prompt's tokens but the first are not the model's under an adapter."""
    answer, token = Answered(prompt[:1], prompt[1:], adapter), torch.tensor(prompt[1:])[:, None]
    exact, base = (
        logits(place, each, torch.float32).log_softmax(-1).gather(-1, token)[:, 0]
        for each in (answer, answer._replace(adapter=None))
    )
    apart = (torch.tensor(scores) - exact).norm() / (exact - base).norm()
    require_small(f"{what}: scores, of what the adapter adds", float(apart), SHARE)


def scoring(name: str, prompt: Sequence[int]) -> dict[str, Any]:
    """Return the body of a completion that tells the scores of a prompt; `scores_in` reads its answer."""
    return {"model": name, "prompt": list(prompt), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}


def scores_in(answer: dict[str, Any], prompt: Sequence[int]) -> list[float]:
    scores: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(prompt)]
    return scores


def _between(values: Tensor, best: Tensor, token: Tensor) -> Tensor:
    return (values.gather(-1, best) - values.gather(-1, token))[:, 0]


@torch.no_grad()
def logits(place: str, answer: Answered, dtype: torch.dtype, base: str = "dense") -> Tensor:
    """Logits (tokens, vocabulary) that transformers and PEFT give for each token of an answer, in float32."""
    model = reference(place, dtype, base)
    if answer.adapter is not None:
        kind = json.loads((Path(answer.adapter) / "adapter_config.json").read_text())["peft_type"]
        library: Any = peft if kind in peft.PeftType.__members__ else veneer
        model = library.PeftModel.from_pretrained(model, answer.adapter).eval()
    ids = torch.tensor([[*answer.prompt, *answer.tokens[:-1]]])
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0, -len(answer.tokens) :].float()
    if answer.adapter is not None:
        model.unload()
    return found


@functools.cache
def reference(place: str, dtype: torch.dtype, base: str) -> Any:
    return base_of("peer", base, place, dtype, double_quant=True).eval()
