"""Log-probabilities of given tokens, and greedy answers, many sequences at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from veneer.errors import CompositionError, ConfigError
from veneer.model.adapted.routing import BASE
from veneer.model.sites.structure import evaluation
from veneer.model.sites.virtual_tokens import virtual_tokens

OnProgress = Callable[[int, int], None]


def ignore_progress(done: int, total: int) -> None:
    """Ignore the progress."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Sequence, and its span ``[start, end)`` of tokens to score, with start ≥ 1."""

    ids: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Limits of a forward pass: at most ``n_rows`` sequences and ``n_tokens`` tokens, padding included."""

    n_rows: int = 16
    n_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.n_rows < 1 or self.n_tokens < 1:
            raise ConfigError(f"a batch holds at least one row and one token, not {self.n_rows} and {self.n_tokens}")

    def split(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Return the indices of ``lengths`` in batches, longest first: padding is small, and oversized ones
        fail at once.
        """
        batch: list[int] = []
        for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            widest = lengths[batch[0]] if batch else lengths[at]
            if batch and (len(batch) == self.n_rows or widest * (len(batch) + 1) > self.n_tokens):
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch


@torch.no_grad()
def log_probabilities(
    model: Any,
    items: Sequence[Scored],
    batching: Batching | None = None,
    on_progress: OnProgress = ignore_progress,
    adapters: Sequence[str] = (),
) -> list[Float32[Tensor, " n"]]:
    """Return, for each item, the natural log-probabilities of its span's tokens, each given all preceding tokens.

    Items that differ only in their last token share a forward pass. Padding is on the right, where causal attention
    ignores it. ``adapters`` gives each item its own adapter on the model (``"__base__"``: none), in one pass over the
    base. Without it the active adapter is used.

    Raises ConfigError for spans outside their sequence and for sequences longer than the model's context. Raises
    CompositionError if the model cannot use a different adapter for each row.
    """
    inputs: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    limit, longest = context_length(model, adapters), max((len(item.ids) for item in items), default=0)
    if limit is not None and longest > limit:
        raise ConfigError(f"a text has {longest} tokens and the model's context holds {limit}: shorten it")
    for at, item in enumerate(items):
        if not 1 <= item.start <= item.end <= len(item.ids):
            raise ConfigError(
                f"span [{item.start}, {item.end}) does not lie in a sequence of {len(item.ids)} tokens, "
                "or begins at the first token, which nothing predicts"
            )
        inputs.setdefault((adapters[at] if adapters else "", item.ids[: item.end - 1]), []).append(at)
    rows = list(inputs)
    found: dict[int, Tensor] = {}
    with evaluation(model):
        for batch in (batching or Batching()).split([len(ids) for _, ids in rows]):
            named = [rows[i][0] for i in batch] if adapters else None
            logits = _forward(model, [rows[i][1] for i in batch], named)
            for row, i in enumerate(batch):
                found |= {at: _gathered(logits[row], items[at]) for at in inputs[rows[i]]}
            on_progress(len(found), len(items))
    return [found[at] for at in range(len(items))]


def log_probabilities_of_each(
    model: Any,
    items: Sequence[Scored],
    names: Sequence[str],
    batching: Batching | None = None,
    on_progress: OnProgress = ignore_progress,
) -> list[list[Float32[Tensor, " n"]]]:
    """Return `log_probabilities` of all items for each adapter in ``names``, in one pass over the base. The name
    ``"__base__"`` means no adapter.

    With one name, the model is measured as it is. If the model cannot use a different adapter for each row (experts),
    the adapters are measured one after another.
    """
    if len(names) == 1:
        return [log_probabilities(model, items, batching, on_progress)]
    wanted = [name for name in names for _ in items]
    try:
        found = log_probabilities(model, [*items] * len(names), batching, on_progress, wanted)
    except CompositionError:
        found_by_each = []
        for number, name in enumerate(names):
            with acting_alone(model, name):
                tell = _from(on_progress, number, len(names))
                found_by_each.append(log_probabilities(model, items, batching, tell))
        return found_by_each
    return [found[at : at + len(items)] for at in range(0, len(found), len(items))]


@contextmanager
def acting_alone(model: Any, name: str) -> Iterator[None]:
    """Activate only the adapter ``name`` inside the ``with`` block, for all rows. The name ``"__base__"`` means no
    adapter.
    """
    if name == BASE:
        with model.disable_adapter():
            yield
        return
    before = model.active_adapters
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)


def _from(on_progress: OnProgress, number: int, n_parts: int) -> OnProgress:
    return lambda done, total: on_progress(number * total + done, n_parts * total)


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Settings of generated answers: greedy, at most ``max_new_tokens``, cut at the first of the ``stop`` strings."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def cut(self, text: str) -> str:
        """Return the text up to the first of the ``stop`` strings."""
        ends = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        return text[: min(ends)] if ends else text


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answering: Answering | None = None,
    batching: Batching | None = None,
    *,
    on_progress: OnProgress = ignore_progress,
) -> list[str]:
    """Return the `generated_answers` of greedy decoding."""
    return generated_answers(model, tokenizer, prompts, answering, batching, options=greedy(), on_progress=on_progress)


@torch.no_grad()
def generated_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answering: Answering | None = None,
    batching: Batching | None = None,
    *,
    options: Mapping[str, Any],
    on_progress: OnProgress = ignore_progress,
) -> list[str]:
    """Return a continuation of every prompt as text, within the model's context, with these ``options`` of `generate`.

    Padding is on the left and masked. Raises ConfigError for prompts that are empty or fill the context.
    """
    answering = answering or Answering()
    answers: dict[int, str] = {}
    limit = context_length(model)
    require_room(prompts, limit)
    with evaluation(model):
        for batch in _batches([len(p) + answering.max_new_tokens for p in prompts], batching or Batching(), limit):
            texts = _continued(model, tokenizer, [prompts[i] for i in batch], answering, options)
            answers |= {i: answering.cut(text) for i, text in zip(batch, texts, strict=True)}
            on_progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def require_room(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Raise ConfigError for prompts that are empty, or leave no room for an answer in ``limit`` tokens."""
    if any(not prompt for prompt in prompts):
        raise ConfigError("a prompt is empty: give at least one token")
    if limit is not None and any(len(prompt) >= limit for prompt in prompts):
        raise ConfigError(
            f"a prompt has {max(map(len, prompts))} tokens and the model's context holds {limit}: shorten it"
        )


def context_length(model: Any, adapters: Sequence[str] = ()) -> int | None:
    """Return the model's context length minus the active adapters' virtual tokens. Return None if the model has no
    limit.

    If ``adapters`` are named, the virtual tokens of the one that has most are subtracted instead.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = None if limit is not None and limit < 0 else limit  # XLNet's -1 is no limit
    if limit is not None and adapters:
        configs = [model.adapter_state.configs[name] for name in set(adapters) - {BASE}]
        return int(limit) - max((config.virtual_tokens for config in configs), default=0)
    fronts = [holder.acting() for holder in virtual_tokens(model).values()]
    return None if limit is None else int(limit) - sum(front.width for front in fronts if front is not None)


def _batches(lengths: Sequence[int], batching: Batching, limit: int | None) -> Iterator[list[int]]:
    """Yield batches of answers, each as a list of indices. ``lengths`` are the most tokens of each prompt with its
    answer.

    An entry above ``limit``, the context length, has a batch of its own, because a batch ends when one of its answers
    reaches the context's end.
    """
    for batch in batching.split(lengths):
        cut = [i for i in batch if limit is not None and lengths[i] > limit]
        yield from ([i] for i in cut)
        if len(cut) < len(batch):
            yield [i for i in batch if i not in cut]


def _forward(model: Any, sequences: Sequence[Sequence[int]], adapters: list[str] | None) -> Tensor:
    width = max(len(s) for s in sequences)
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=model.device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=model.device)
    routed = {} if adapters is None else {"adapter_names": adapters}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **routed).logits
    return logits


def _gathered(logits: Tensor, item: Scored) -> Float32[Tensor, " n"]:
    targets = torch.tensor(item.ids[item.start : item.end], device=logits.device)
    scores = logits[item.start - 1 : item.end - 1].float().log_softmax(dim=-1)
    return scores.gather(1, targets[:, None])[:, 0].cpu()


def _continued(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], answering: Answering, options: Mapping[str, Any]
) -> list[str]:
    width, limit = max(len(p) for p in prompts), context_length(model)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[*[pad or 0] * (width - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stop = {"stop_strings": list(answering.stop), "tokenizer": tokenizer} if answering.stop else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=answering.max_new_tokens if limit is None else min(answering.max_new_tokens, limit - width),
        pad_token_id=pad or 0,
        **options,
        **stop,
    )
    n_before = 0 if model.config.is_encoder_decoder else width
    return [str(tokenizer.decode(row[n_before:], skip_special_tokens=True)) for row in output]


def greedy() -> dict[str, Any]:
    """Return the options of `generate` for greedy decoding, which override the checkpoint's own settings."""
    # The first three would be warned about, the others choose another answer.
    plain = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0, "num_beams": 1}
    return {"do_sample": False, **plain}
