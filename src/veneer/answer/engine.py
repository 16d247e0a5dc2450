"""Answers prompts by the engine, which packs the weights of a loaded base, or by ``generate``.

The engine answers if it is faster and gives the same answers; otherwise transformers' own ``generate`` does.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from veneer.adapters.chosen import ModelParts
from veneer.answer.answerer import Answerer, Asked, Drawing, tokens_behind
from veneer.answer.model import ModelAnswerer
from veneer.errors import ConfigError, DescriptionError
from veneer.evaluate.scoring import Answering, OnProgress, context_length, ignore_progress, require_room
from veneer.model.quantized.packed_linear import unpack
from veneer.ops.dispatch import backends
from veneer.ops.packed import ROWS
from veneer.serve.engine import Engine
from veneer.serve.program.effects import UnsaidError
from veneer.serve.requests.checked import CheckedRequest as Request
from veneer.serve.schedule.lora_request import LoRARequest
from veneer.serve.schedule.outputs import CompletionOutput, RequestOutput
from veneer.serve.schedule.sampling_params import RequestOutputKind, SamplingParams
from veneer.serve.start import EngineOptions, start_engine
from veneer.store.adapter.fit import fitting
from veneer.store.bars import quiet

# Of a checkpoint's settings for `generate`: what `Drawing` or `SamplingParams` says, and what changes no token.
_KNOWN = {
    *("temperature", "top_p", "top_k", "repetition_penalty", "do_sample", "num_beams", "max_length", "max_new_tokens"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
}


def answerer_of(parts: ModelParts, drawing: Drawing | None = None, n_rows: int = 1) -> tuple[Answerer, str]:
    """Return an `Answerer` and its name: the engine's if it gives the same answers as transformers' `generate`, else
    `generate`'s.

    The name contains the reason if the engine is not used. ``n_rows``: the most prompts answered at once. Raises
    FormatError for an adapter that does not fit.
    """
    drawing = drawing or Drawing()
    with quiet():
        found = engine_answerer(parts, drawing, n_rows)
        if not isinstance(found, str):
            return found, "veneer's engine"
        return ModelAnswerer(parts.joined(), drawing, n_rows), f"transformers' generate ({found})"


class EngineAnswerer(Answerer):
    """`Answerer` that uses an engine. It knows the engine's loaded adapters by their folders."""

    def __init__(self, engine: Engine, params: SamplingParams, adapters: Mapping[Path, LoRARequest]) -> None:
        self.tokenizer = engine.tokenizer
        self._engine, self._params, self._adapters = engine, params, adapters
        self.default = next(iter(adapters), None)
        self._limit = engine.scheduler.limits.max_model_len - max((self._n_front(each) for each in adapters), default=0)

    def _n_front(self, folder: Path | None) -> int:
        """Return the number of virtual tokens that the adapter in ``folder`` adds before a prompt."""
        return 0 if folder is None else int(self._engine.versions.of(self._adapters[folder]).n_front)

    def _request(self, prompt: Sequence[int], params: SamplingParams, folder: Path | None) -> Request:
        return self._engine.asked(None, prompt, params, None if folder is None else self._adapters[folder])

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        n_most = tokens_behind(prompt, self._limit, max_new_tokens)
        params = replace(self._params, max_tokens=n_most, detokenize=False, output_kind=RequestOutputKind.DELTA)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.put(torch.tensor(prompt))  # which it leaves out
        ids: list[int] = []

        def take(output: RequestOutput) -> None:
            for token in output.outputs[0].token_ids:
                ids.append(token)
                streamer.put(torch.tensor([token]))

        self._run([self._request(prompt, params, self.default)], take)
        streamer.end()
        return self._text(ids)

    def answers_to(self, asked: Sequence[Asked], answering: Answering, on_progress: OnProgress) -> list[str]:
        require_room([prompt for prompt, _ in asked], self._limit)
        params = replace(
            self._params,
            max_tokens=answering.max_new_tokens,
            stop=answering.stop or None,
            skip_special_tokens=False,  # one of them may be what ends the answer
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        requests = [self._request(prompt, params, folder) for prompt, folder in asked]
        texts: dict[str, str] = {}

        def take(output: RequestOutput) -> None:
            texts[output.request_id] = answering.cut(self._text(output.outputs[0].token_ids))
            on_progress(len(texts), len(requests))

        self._run(requests, take)
        return [texts[each.id] for each in requests]

    def drawn(
        self,
        asked: Sequence[Asked],
        n: int,
        max_new_tokens: int,
        seeds: Sequence[int],
        on_progress: OnProgress = ignore_progress,
    ) -> list[list[CompletionOutput]]:
        """Return ``n`` sampled answers to each prompt, as token ids with `SamplingParams.policy_logprobs`. ``seeds``
        has a seed for each prompt.

        Raises ConfigError if the context has no room for an answer.
        """
        require_room([prompt for prompt, _ in asked], self._limit)
        params = replace(
            self._params, n=n, max_tokens=max_new_tokens, detokenize=False, policy_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        requests = [
            self._request(prompt, replace(params, seed=seed), folder)
            for (prompt, folder), seed in zip(asked, seeds, strict=True)
        ]
        found: dict[str, list[CompletionOutput]] = {}

        def take(output: RequestOutput) -> None:
            found[output.request_id] = output.outputs
            on_progress(len(found), len(requests))

        self._run(requests, take)
        return [found[each.id] for each in requests]

    def _run(self, requests: Sequence[Request], take: Callable[[RequestOutput], None]) -> None:
        """Answer requests, and pass each output to ``take``. Raises the error of the first request that fails."""
        left, left_over = {each.id for each in requests}, deque(requests)
        try:
            while left:
                while left_over and self._engine.backlog.has_room([left_over[0]]):
                    self._engine.submit(left_over.popleft())
                if not self._engine.has_work:
                    self._engine.wait()  # for an adapter that is being read
                for output in self._engine.step():
                    if output.error is not None:
                        raise output.error
                    take(output)
                    left -= {output.request_id} if output.finished else set()
        except BaseException:
            self._engine.drop([each.id for each in requests])
            raise

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def engine_answerer(parts: ModelParts, drawing: Drawing, n_rows: int) -> EngineAnswerer | str:
    """Return an engine that answers as `generate` would, or the reason why none can.

    If it returns a reason, the base is unchanged. Raises FormatError for an adapter that does not fit.
    """
    reason = _slow(parts.base) or _unsaid(parts.base)
    if reason:
        return reason
    try:
        params = _params(parts.base, drawing)
        seed = secrets.randbits(63) if drawing.seed is None else drawing.seed
        options = EngineOptions(
            tokenizer=parts.tokenizer, seed=seed, max_num_seqs=n_rows, max_num_batched_tokens=max(512, n_rows)
        )
        engine = start_engine(  # one context, for others need the memory
            parts.base, options, program_alone=True, contexts_cached=1, compares_bases=False
        )
    except (ConfigError, DescriptionError) as error:
        unpack(parts.base)  # where it was what comes behind the program that failed
        return str(error)
    limit, context = engine.scheduler.limits.max_model_len, context_length(parts.base)
    if context is not None and limit < context:
        del engine
        unpack(parts.base)
        return f"memory has room for {limit} of the {context} tokens of the model's context"
    requests = {folder: LoRARequest(str(folder), n, str(folder)) for n, folder in enumerate(parts.adapters, start=1)}
    for folder, request in requests.items():
        try:
            with fitting(folder, parts.source):
                engine.add_adapter(request)
        except UnsaidError as error:
            del engine
            unpack(parts.base)
            return f"the adapter has {error}, which the engine's program does not support"
    return EngineAnswerer(engine, params, requests)


def _slow(base: Any) -> str:
    """Return why the engine would be no faster than `generate` for this base, or an empty text if it is faster."""
    if base.device.type != "cpu":
        return f"the engine is fast on a CPU, and the model is on {base.device.type}"
    if base.dtype not in ROWS:
        return f"the engine is fast in float32 and bfloat16, and the model is in {str(base.dtype).split('.')[-1]}"
    return "" if "cpu" in backends("packed.matmul") else "the engine's kernels were not built"


def _unsaid(base: Any) -> str:
    """Return the setting of the model that the engine does not support, so that its answers would differ from
    `generate`'s.

    Return an empty text if there is none.
    """
    if context_length(base) is None:
        return "the model's config has no context length"
    stored = base.generation_config.to_diff_dict()
    foreign = sorted(name for name, value in stored.items() if name not in _KNOWN and value not in (None, False))
    return f"its generation_config.json sets {', '.join(foreign)}, which the engine does not know" if foreign else ""


def _params(base: Any, drawing: Drawing) -> SamplingParams:
    """Return the sampling settings as the engine's parameters. Answers end at the same token ids as `generate`'s.

    Raises ConfigError for settings that the engine does not support.
    """
    stored = base.generation_config
    ends = stored.eos_token_id if isinstance(stored.eos_token_id, list) else [stored.eos_token_id]
    n_ids = base.config.get_text_config().vocab_size
    penalty = 1.0 if drawing.temperature == 0 else stored.repetition_penalty
    return SamplingParams(
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        top_k=drawing.top_k,
        repetition_penalty=1.0 if penalty is None else penalty,
        ignore_eos=True,  # which would be the tokenizer's end too
        stop_token_ids=[id for id in ends if id is not None and 0 <= id < n_ids],
    )
