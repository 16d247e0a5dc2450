"""Answers prompts by transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from veneer.adapters.chosen import LoadedModel
from veneer.answer.answerer import Answerer, Asked, Drawing, tokens_behind
from veneer.evaluate.scoring import (
    Answering,
    Batching,
    OnProgress,
    acting_alone,
    context_length,
    generated_answers,
    greedy,
)
from veneer.model.adapted.routing import BASE
from veneer.store.bars import quiet


class ModelAnswerer(Answerer):
    """`Answerer` that uses transformers' ``generate``. ``n_rows``: the most prompts in one batch."""

    def __init__(self, loaded: LoadedModel, drawing: Drawing, n_rows: int) -> None:
        self.model, self.tokenizer, self._names = loaded.model, loaded.tokenizer, loaded.names
        self.default = next(iter(loaded.names), None)
        self._drawing, self._n_rows = drawing, n_rows
        if drawing.seed is not None:
            torch.manual_seed(drawing.seed)

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        n_most = tokens_behind(prompt, context_length(self.model), max_new_tokens)
        ids, pad = torch.tensor([list(prompt)], device=self.model.device), self.tokenizer.pad_token_id
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with quiet(), torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                streamer=streamer,
                max_new_tokens=n_most,
                **self._options(),
            )
        n_before = 0 if self.model.config.is_encoder_decoder else len(prompt)
        return str(self.tokenizer.decode(output[0, n_before:], skip_special_tokens=True))

    def answers_to(self, asked: Sequence[Asked], answering: Answering, on_progress: OnProgress) -> list[str]:
        how: dict[str, Any] = {"batching": Batching(n_rows=self._n_rows), "options": self._options()}
        found: dict[int, str] = {}
        with quiet():
            for folder in dict.fromkeys(adapter for _, adapter in asked):
                own = {at: prompt for at, (prompt, adapter) in enumerate(asked) if adapter == folder}
                before = len(found)

                def tell(done: int, total: int, before: int = before) -> None:
                    on_progress(before + done, len(asked))

                with self._acting(folder):
                    texts = generated_answers(
                        self.model, self.tokenizer, list(own.values()), answering, on_progress=tell, **how
                    )
                found |= dict(zip(own, texts, strict=True))
        return [found[at] for at in range(len(asked))]

    def _acting(self, folder: Path | None) -> AbstractContextManager[None]:
        """Enter a context in which only the adapter of this folder acts; if ``folder`` is None, no adapter does."""
        if not self._names:
            return nullcontext()
        return acting_alone(self.model, BASE if folder is None else self._names[folder])

    def _options(self) -> dict[str, Any]:
        """Return the sampling settings as `generate`'s options. The checkpoint's number of beams is ignored: text is
        streamed.
        """
        drawing = self._drawing
        if drawing.temperature == 0:
            return greedy()
        chosen = {"temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": drawing.top_k}
        return {"do_sample": True, "num_beams": 1, **chosen}
