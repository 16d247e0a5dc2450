"""Sequences of an encoder-decoder: the encoder reads the prompt, and the decoder writes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from veneer.errors import TargetError
from veneer.model.batch.own_cache import CachingModel, Extended, Held, KeptBytes, Way
from veneer.model.batch.paged import TOLERANCE, UNFIT
from veneer.model.sites.structure import evaluation
from veneer.plain.tensor_tree import told_bytes


class EncodingModel(CachingModel):
    """Model whose encoder reads a prompt in one pass, once all of it has arrived.

    Of a prompt's tokens, only the last has logits: those of the answer's first token.
    """

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        super().__init__(model, way)
        self._first = first_ids(model)

    @torch.no_grad()
    def extend(self, held: Held, tokens: Sequence[int], *, with_states: bool = False) -> Extended:
        """Compute the next tokens of a sequence and add them to ``held``.

        The logits (n, vocabulary) of the prompt's tokens are zeros, except the last one's: they predict the answer's
        first token. The states returned are always empty, whatever ``with_states`` says.
        """
        n_prompt, n_before = held.n_prompt, len(held.tokens)
        answer = list(tokens[max(0, n_prompt - n_before) :])
        held.is_whole = False
        if n_before < n_prompt:
            logits = self._read(held, tokens[: n_prompt - n_before], answer)
        else:
            logits = self._decoded(held, answer)
        held.tokens += tokens
        held.is_whole = True
        unread = logits.new_zeros(1).expand(max(0, len(tokens) - len(logits)), logits.shape[1])
        return Extended(torch.cat([unread, logits[-len(tokens) :]]), logits.new_empty(0, 0))

    def _read(self, held: Held, prompt: Sequence[int], answer: list[int]) -> Tensor:
        """Return logits for every token of the answer. They are empty as long as tokens of the prompt are missing,
        because the encoder reads only a whole prompt.
        """
        whole = [*held.tokens, *prompt]
        if len(whole) < held.n_prompt:
            return torch.zeros(0, self.model.config.get_text_config(decoder=True).vocab_size)
        encoder = cast(Any, self.model).get_encoder()
        states = encoder(input_ids=self._ids(whole)).last_hidden_state
        held.encoded = BaseModelOutput(last_hidden_state=states)
        return self._decoded(held, [*self._first, *answer])[len(self._first) - 1 :]

    def _decoded(self, held: Held, tokens: list[int]) -> Tensor:
        caches = self.way is Way.AT_ONCE
        held.answer += tokens
        given = {} if held.cache is None or self._cache is None else {self._cache: held.cache}
        output = self.model(
            encoder_outputs=held.encoded,
            decoder_input_ids=self._ids(tokens if caches else held.answer),
            use_cache=caches,
            **given,
        )
        held.cache = output.get(self._cache) if caches else None
        return cast(Tensor, output.logits)[0, -len(tokens) :]

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)


def first_ids(model: PreTrainedModel) -> list[int]:
    """Return the ids with which every answer begins: the decoder's start id, and one that the checkpoint may force
    next.

    Raises TargetError if the config names no start.
    """
    settings: Any = model.generation_config
    start = getattr(settings, "decoder_start_token_id", None)
    start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
    start = getattr(settings, "bos_token_id", None) if start is None else start
    if start is None:
        raise TargetError(
            f"{type(model).__name__} cannot be served: its config names no decoder_start_token_id, which an answer "
            "begins with. Set it in config.json"
        )
    forced = getattr(settings, "forced_bos_token_id", None)
    return [int(id) for id in (start, forced) if id is not None]


def proved_encoding(model: PreTrainedModel) -> Way:
    """Return the way in which a model with an encoder extends an answer: with its cache, or by a new pass.

    Raises TargetError for a model that computes no logits from token ids alone.
    """
    ids = [at * 7 % model.config.get_text_config(decoder=True).vocab_size for at in range(sum(_PARTS))]
    anew, caching, held = EncodingModel(model, Way.ANEW), EncodingModel(model, Way.AT_ONCE), Held(n_prompt=_PARTS[0])
    try:
        with evaluation(model):
            own = anew.extend(Held(n_prompt=_PARTS[0]), ids).logits[_PARTS[0] - 1 :].float()
            found = torch.cat([caching.extend(held, ids[:-3]).logits, caching.extend(held, ids[-3:]).logits])
    except UNFIT as error:
        raise TargetError(
            f"{type(model).__name__} cannot be served: it computes no logits from token ids alone ({error}). Give a "
            "model that reads text"
        ) from error
    if not own.isfinite().all():
        raise TargetError(
            f"{type(model).__name__} cannot be served: its logits are not finite. Load a model with finite weights"
        )
    apart = float((found[_PARTS[0] - 1 :].float() - own).norm() / own.norm().clamp_min(1e-30))
    return Way.AT_ONCE if held.cache is not None and apart <= TOLERANCE.get(model.dtype, 1e-4) else Way.ANEW


_PARTS = (9, 6)  # tokens of the proof: of a prompt, and of an answer


def encoded_bytes(model: PreTrainedModel, way: Way) -> KeptBytes:
    """Return the bytes that a sequence keeps in memory, measured on short ones.

    A token of the prompt and one of the answer keep different numbers of bytes; the larger number counts for every
    token.
    """
    none, prompt, answer = (_bytes_of(model, way, *each) for each in ((1, 1), (1 + _FEW, 1), (1, 1 + _FEW)))
    position = max(1, -(-max(prompt - none, answer - none) // _FEW))
    return KeptBytes(position, max(0, none - 2 * position))


_FEW = 16


def _bytes_of(model: PreTrainedModel, way: Way, n_prompt: int, n_answer: int) -> int:
    held = Held(n_prompt=n_prompt)
    with evaluation(model):
        EncodingModel(model, way).extend(held, [1] * (n_prompt + n_answer))
    return told_bytes((held.cache, held.encoded.last_hidden_state))
