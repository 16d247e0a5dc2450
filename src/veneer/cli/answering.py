"""Prompts as token ids, and the two ways to answer them.

The engine of serving answers where it is faster and gives the same answers; transformers' own ``generate`` otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from veneer.cli.answerer import Answerer, Drawing, tokens_behind
from veneer.cli.loading import Loaded, Parts, quiet
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.evaluate.scoring import Answering, OnProgress

Message = dict[str, str]


def answerer_of(parts: Parts, drawing: Drawing | None = None, n_rows: int = 1) -> Answerer:
    """The faster way to the same answers, told in a line on stderr. ``n_rows``: prompts answered at once, at most.

    Raises FormatError for an adapter that does not fit.
    """
    from veneer.cli.engine_answering import engine_answerer

    drawing = drawing or Drawing()
    with quiet():
        found = engine_answerer(parts, drawing, n_rows)
        if not isinstance(found, str):
            typer.echo("answers: veneer's engine", err=True)
            return found
        typer.echo(f"answers: transformers' generate ({found})", err=True)
        return ModelAnswerer(parts.joined(), drawing, n_rows)


class ModelAnswerer:
    """An `Answerer` by transformers' ``generate``."""

    def __init__(self, loaded: Loaded, drawing: Drawing, n_rows: int) -> None:
        import torch

        self.model, self.tokenizer, self._names = loaded.model, loaded.tokenizer, loaded.names
        self._drawing, self._n_rows = drawing, n_rows
        if drawing.seed is not None:
            torch.manual_seed(drawing.seed)

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        import torch
        from transformers import TextStreamer

        from veneer.evaluate.scoring import context_length

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
        return str(self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        answering: Answering,
        on_progress: OnProgress,
        adapters: Sequence[Path | None] = (),
    ) -> list[str]:
        from veneer.evaluate.scoring import Batching, generated_answers

        how: dict[str, Any] = {"batching": Batching(n_rows=self._n_rows), "options": self._options()}
        found: dict[int, str] = {}
        with quiet():
            for folder in dict.fromkeys(adapters or [next(iter(self._names), None)]):
                own = [at for at in range(len(prompts)) if not adapters or adapters[at] == folder]
                before = len(found)

                def tell(done: int, total: int, before: int = before) -> None:
                    on_progress(before + done, len(prompts))

                with self._acting(folder):
                    texts = generated_answers(
                        self.model, self.tokenizer, [prompts[at] for at in own], answering, on_progress=tell, **how
                    )
                found |= dict(zip(own, texts, strict=True))
        return [found[at] for at in range(len(prompts))]

    def _acting(self, folder: Path | None) -> AbstractContextManager[None]:
        """A block in which the adapter of this folder acts, or none."""
        from veneer.evaluate.scoring import acting_alone
        from veneer.model.routing import BASE

        return (
            acting_alone(self.model, BASE if folder is None else self._names[folder]) if self._names else nullcontext()
        )

    def _options(self) -> dict[str, Any]:
        """The drawing as `generate` takes it. A checkpoint's own beams are left out: answers appear word by word."""
        from veneer.evaluate.scoring import greedy

        drawing = self._drawing
        if drawing.temperature == 0:
            return greedy()
        chosen = {"temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": drawing.top_k}
        return {"do_sample": True, "num_beams": 1, **chosen}


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The conversation under the chat template, ready for the assistant's turn."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "this model has no chat template, so it cannot chat: use `veneer generate`, which sends plain text"
        )
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_prompt(tokenizer: Any, prompt: str, *, system: str | None = None, raw: bool = False) -> list[int]:
    """A prompt as one user turn where the model has a chat template, as plain text otherwise or where ``raw``."""
    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise ConfigError(
                "--system needs a chat template; with --raw, or a model without one, put it in the prompt"
            )
        return list(tokenizer(prompt)["input_ids"])
    turns = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(tokenizer, [*turns, {"role": "user", "content": prompt}])
