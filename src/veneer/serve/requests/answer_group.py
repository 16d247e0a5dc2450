"""Answers to one prompt, which are output together."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.serve.requests.answer import Answer
from veneer.serve.requests.checked import CheckedRequest
from veneer.serve.requests.pooling import Pooling
from veneer.serve.schedule.outputs import RequestOutput, RequestStats, TokenLogprobs
from veneer.serve.schedule.request import Status
from veneer.serve.schedule.sampling_params import RequestOutputKind


@dataclass(eq=False, slots=True)
class AnswerGroup:
    """Answers to one prompt."""

    asked: CheckedRequest
    answers: list[Answer]
    prompt_ids: list[int]  # the one list that all outputs show
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pool: Pooling | None = None

    @property
    def is_done(self) -> bool:
        """Return True if all answers have ended."""
        return all(answer.request.status is Status.DONE for answer in self.answers)

    def output(self, metrics: RequestStats | None) -> RequestOutput | None:
        """Return the next output, of the requested kind; None if nothing is new."""
        asked, kind, finished = self.asked, self.asked.params.output_kind, self.is_done
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        shown = [answer.output(kind, asked.lora_request) for answer in self.answers]
        errors = [answer.request.error for answer in self.answers if answer.request.error is not None]
        outputs = [output for output in shown if output is not None]
        if not outputs:
            return None
        scores = self.prompt_logprobs
        if scores is None and asked.params.prompt_logprobs is not None and len(asked.prompt_ids) == 1:
            scores = [None]
        return RequestOutput(
            request_id=asked.id, prompt=asked.prompt, prompt_token_ids=self.prompt_ids, prompt_logprobs=scores,
            outputs=outputs, finished=finished, lora_request=asked.lora_request, error=errors[0] if errors else None,
            metrics=metrics, num_cached_tokens=self.answers[0].request.n_cached or 0,
            embedding=self.pool.vector() if self.pool is not None and outputs[0].finish_reason == "stop" else None,
        )  # fmt: skip
