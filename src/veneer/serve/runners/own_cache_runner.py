"""Runner of plans by transformers' own caches: for every model whose layers keep more than keys and values.

Each sequence has its own cache and takes one pass a step, in which only its adapter acts.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.errors import CompositionError
from veneer.model.adapted.routing import Routing
from veneer.model.batch.encoded import EncodingModel
from veneer.model.batch.mixed import routed
from veneer.model.batch.own_cache import CachingModel, Extended, Held, Way
from veneer.serve.runners.general_runner import OwnCodeRunner
from veneer.serve.runners.runner import Computed, read, wanted
from veneer.serve.runners.sampler import DrawRule
from veneer.serve.schedule.step_plan import PlannedSequence, StepPlan


@dataclass(slots=True)
class _Progress:
    """A sequence in progress: its cache, and the tokens computed so far, grouped by the adapter version that acted on
    them.
    """

    held: Held = field(default_factory=Held)
    stretches: list[tuple[str | None, tuple[int, ...]]] = field(default_factory=list)


class OwnCacheRunner(OwnCodeRunner):
    """`Runner` by the model's own forward pass and transformers' caches.

    Pages only limit how much is held: the memory is in the caches.
    """

    def __init__(self, model: PreTrainedModel, way: Way) -> None:
        super().__init__(model)
        self.encodes = bool(model.config.is_encoder_decoder)
        self.caching = EncodingModel(model, way) if self.encodes else CachingModel(model, way)
        self._sequences: dict[Hashable, _Progress] = {}
        self._n_prompts: dict[str, int] = {}

    def begin(self, request_id: str, rule: DrawRule) -> None:
        super().begin(request_id, rule)
        self._n_prompts[request_id] = rule.n_prompt

    def end(self, request_id: str) -> None:
        super().end(request_id)
        self._n_prompts.pop(request_id, None)

    def taken(self, version: str) -> None:
        config = self.model.peft_config[version]
        if self.encodes and (config.virtual_tokens or config.invocation_tokens):
            raise CompositionError(
                f"{type(self.model).__name__} has an encoder and a decoder, but the adapter acts on a part of a "
                "sequence: serve another adapter, or generate with the model itself"
            )
        if self.caching.way is Way.ANEW and self.model.peft_config[version].invocation_tokens:
            raise CompositionError(
                f"{type(self.model).__name__} computes each sequence anew, and an adapter with invocation tokens acts "
                "on a part of it: serve another adapter, or generate with the model itself"
            )

    def release(self, request_ids: Sequence[Hashable]) -> None:
        for id in request_ids:
            self._sequences.pop(id, None)

    @property
    def n_held(self) -> int:
        """Number of sequences that have a cache."""
        return len(self._sequences)

    def compute(self, plan: StepPlan, greedy: Collection[str]) -> Computed:
        logits: list[Tensor] = []
        hidden: dict[str, Tensor] = {}
        for sequence in plan.sequences:
            found = self._extended(sequence)
            logits.append(found.logits[wanted(sequence)])
            if read(sequence):
                hidden[sequence.request_id] = found.states[read(sequence)].cpu()
        return Computed([torch.cat(logits)], {}, hidden)

    def _extended(self, sequence: PlannedSequence) -> Extended:
        n_before = sequence.start - sequence.n_front
        id = sequence.request_id
        progress = self._sequences.setdefault(id, self._new(id)) if n_before else self._new(id)
        if not progress.held.is_whole or len(progress.held.tokens) != n_before:  # a step was interrupted
            progress = self._again(progress, n_before)
        self._sequences[id] = progress
        found = self._extend(progress.held, sequence.version, sequence.tokens, with_states=sequence.reads_only)
        progress.stretches.append((sequence.version, sequence.tokens))  # after the pass: it may not have begun
        return found

    def _new(self, request_id: str) -> _Progress:
        return _Progress(Held(n_prompt=self._n_prompts.get(request_id, 0)))

    def _again(self, before: _Progress, n_tokens: int) -> _Progress:
        """Compute the first ``n_tokens`` tokens of a sequence into a new cache, with the same adapter version on each
        token.
        """
        made = _Progress(Held(n_prompt=before.held.n_prompt))
        for version, tokens in before.stretches:
            kept = tokens[: n_tokens - len(made.held.tokens)]
            if kept:
                self._extend(made.held, version, kept)
                made.stretches.append((version, kept))
        return made

    def _extend(self, held: Held, version: str | None, tokens: Sequence[int], *, with_states: bool = False) -> Extended:
        with self._acting(version):
            return self.caching.extend(held, tokens, with_states=with_states)

    @contextmanager
    def _acting(self, version: str | None) -> Iterator[None]:
        state = self.model.adapter_state
        if version is None:
            with state.base_alone():
                yield
        elif self.model.peft_config[version].invocation_tokens:  # the scheduler knows where it begins to act
            with state.only(()), routed(self.model, state, Routing((version,), is_by_token=True)):
                yield
        else:
            with state.only((version,)):
                yield
