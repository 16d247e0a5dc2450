"""Reference model of preference training: the model as it was at the start, sharing its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.lifecycle import holders
from veneer.adapters.peft_model import PeftModel
from veneer.adapters.token_scores import PreferenceScoring
from veneer.errors import ConfigError
from veneer.train.preference.scores import ScoredModel

_START = "start of training"  # no name that an adapter may have


class Reference(nn.Module):
    """The model in its state before training, callable as TRL calls a reference model. No gradient flows through it.

    For a new adapter, it is the model with its adapter off. For an adapter that was trained before (``fresh`` is
    False), it keeps a copy of that adapter's earlier state, which is active during its passes. For a model trained
    whole, it is a copy. Raises ConfigError if several adapters that were trained before are active together.
    """

    def __init__(self, model: PreTrainedModel, scoring: PreferenceScoring, *, fresh: bool) -> None:
        super().__init__()
        self.scoring = scoring
        adapted = isinstance(model, PeftModel)
        self.model = model if adapted else copy.deepcopy(model).requires_grad_(False)
        self._start: list[tuple[nn.ModuleDict, nn.Module]] = []
        if adapted and not fresh:
            name = _acting_alone(model)
            self._start += [(held, _frozen_copy(held[name])) for held in holders(model, name)]
            self._config = model.peft_config[name]

    def copies(self) -> list[nn.Module]:
        """Return the modules that hold an adapter's earlier state."""
        return [module for _, module in self._start]

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """Return the scores of a batch, without the details, which only the model in training needs."""
        with self._as_it_was():
            return ScoredModel(self.model, self.scoring)(**inputs)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        if not isinstance(self.model, PeftModel):
            yield
        elif not self._start:
            with self.model.disable_adapter():
                yield
        else:
            with self._started(self.model):
                yield

    @contextmanager
    def _started(self, model: PeftModel) -> Iterator[None]:
        state = model.adapter_state
        state.configs[_START] = self._config
        for held, module in self._start:
            held.add_module(_START, module)
        try:
            with state.only((_START,)), state.without_dropout():
                yield
        finally:
            for held, _ in self._start:
                del held[_START]
            del state.configs[_START]


class Placeholder(nn.Module):
    """Stand-in for the reference model while TRL's constructor runs, so that it loads no second model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.config = model.config

    def forward(self, **inputs: Any) -> Any:
        """Raise NotImplementedError: a `Reference` replaces it before anything is computed."""
        raise NotImplementedError


def _acting_alone(model: PeftModel) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise ConfigError(
            f"the reference is a copy of exactly one adapter, but the model's active ones are {active}: choose one "
            "with set_adapter, or join them with add_weighted_adapter, before you make the trainer"
        )
    return active[0]


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)
