"""Text of an answer while it is generated: stop strings, log-probabilities, and the part to output."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from veneer.serve.requests.detokenizer import Detokenizer
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.outputs import CompletionOutput, Logprob, TokenLogprobs
from veneer.serve.schedule.request import Request, Status
from veneer.serve.schedule.sampling_params import RequestOutputKind, SamplingParams
from veneer.serve.schedule.step_plan import DrawnToken

_TEXTS = WeakKeyDictionary[Any, dict[int, str]]()  # of single tokens, by tokenizer


class Answer:
    """One of the answers to a prompt, computed by ``request``."""

    def __init__(self, request: Request, index: int, params: SamplingParams, tokenizer: Any) -> None:
        self.request, self.index, self.params = request, index, params
        self.text = ""
        self.stop_string: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.policy: list[tuple[float, float]] = []
        self.cumulative_logprob = 0.0
        self._tokenizer = tokenizer
        self._reader = Detokenizer(tokenizer, request.prompt, params.skip_special_tokens) if params.detokenize else None
        self._shown_tokens, self._shown_text, self._shown_end = 0, 0, False
        # Nobody looks at the text before it ends: it is then read at once.
        self._waits = params.output_kind is RequestOutputKind.FINAL_ONLY and not params.stop_strings

    def take(self, drawn: DrawnToken, n: int) -> bool:
        """Add the request's ``n``-th token to the answer. Return True if it completes a stop string."""
        reason = self.request.finish_reason if n == len(self.request.output) else None
        if drawn.logprobs is not None:
            self.logprobs.append(decoded(drawn.logprobs, self._tokenizer))
            self.cumulative_logprob += drawn.logprobs[drawn.token].logprob
        if drawn.policy is not None:
            self.policy.append(drawn.policy)
        if self._reader is None or self._waits:
            return False
        start = len(self.text)
        hidden = reason == "stop" and not self.params.include_stop_str_in_output
        self.text += "" if hidden else self._reader.add(drawn.token)
        if reason is not None:
            self.text += self._reader.finish()
        return n > self.params.min_tokens and self._stops(start)

    def output(self, kind: RequestOutputKind, lora_request: LoRARequest | None) -> CompletionOutput | None:
        """Return the part of the answer to output now; None if ``kind`` is DELTA and nothing is new."""
        done = self.request.status is Status.DONE
        if done and self._waits and self._reader is not None:
            self.text = self._whole(self._reader)
        end = len(self.text) if done else max(self._shown_text, len(self.text) - self._held_back)
        delta = kind is RequestOutputKind.DELTA
        first_token, first_char = (self._shown_tokens, self._shown_text) if delta else (0, 0)
        tokens = self.request.output[first_token:]
        if delta and (self._shown_end or not (done or tokens)):
            return None
        self._shown_tokens, self._shown_text, self._shown_end = len(self.request.output), end, done
        asked = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text[first_char:end],
            token_ids=list(tokens),
            cumulative_logprob=self.cumulative_logprob if asked else None,
            logprobs=self.logprobs[first_token:] if asked else None,
            finish_reason=self.request.finish_reason,
            stop_reason=self.stop_string if self.stop_string is not None else self.request.stop_token,
            lora_request=lora_request,
            policy=self.policy[first_token:] if self.params.policy_logprobs else None,
        )

    def _whole(self, reader: Detokenizer) -> str:
        reason, tokens = self.request.finish_reason, self.request.output
        hides = reason == "stop" and not self.params.include_stop_str_in_output
        return reader.read(tokens[:-1] if hides else tokens, final=reason in ("stop", "length"))

    @property
    def _held_back(self) -> int:
        """Return the number of last characters that may be the start of a stop string."""
        return max((len(stop) - 1 for stop in self.params.stop_strings), default=0)

    def _stops(self, start: int) -> bool:
        """Look for stop strings that end at ``start`` or later. If there is one, cut the text at the first and return
        True.
        """
        places = [(self.text.find(s, max(0, start - len(s) + 1)), s) for s in self.params.stop_strings]
        found = min((place for place in places if place[0] >= 0), default=None)
        if found is None:
            return False
        at, self.stop_string = found
        self.text = self.text[: at + len(self.stop_string) * self.params.include_stop_str_in_output]
        return True


def decoded(logprobs: TokenLogprobs, tokenizer: Any) -> TokenLogprobs:
    """Return log-probabilities with the texts of their tokens, each of which is decoded once."""
    texts = _TEXTS.setdefault(tokenizer, {})
    for token in logprobs:
        if token not in texts:
            texts[token] = str(tokenizer.decode([token]))
    return {i: Logprob(p.logprob, p.rank, texts[i]) for i, p in logprobs.items()}
