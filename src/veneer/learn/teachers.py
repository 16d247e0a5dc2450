"""Teachers of distillation: the base of the student, another adapter of it, or another model of its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from veneer.adapters.peft_model import PeftModel
from veneer.errors import ConfigError
from veneer.model.sites.structure import evaluation
from veneer.recipe.distill_checks import BASE
from veneer.store.adapter.folder import is_alone
from veneer.store.model_config import model_config
from veneer.store.source import load_model, load_tokenizer, resolve
from veneer.train.sweep.shared_base import twin

Teacher = Callable[[Any], AbstractContextManager[nn.Module]]
"""Context of a pass by the teacher of a student, which gives the teacher's model."""


@contextmanager
def base_of(student: Any) -> Iterator[nn.Module]:
    """Enter a context that yields the student without its adapter, which is its base, in evaluation mode."""
    with evaluation(student), student.disable_adapter():
        yield student


def teacher_of(source: str, student: PreTrainedModel, tokenizer: Any) -> Teacher:
    """Return the teacher that ``source`` names: "base", or the adapter or model in a folder.

    An adapter acts on the weights of the student's base, which stay in memory once. Raises ConfigError for a model of
    another vocabulary, FormatError for an adapter of another base, and the errors of `load_model`.
    """
    if source == BASE:
        return base_of
    folder = Path(source).expanduser()
    if is_alone(folder):
        base = twin(student).unload()
        other: nn.Module = PeftModel.from_pretrained(base, folder).eval()
    else:
        _require_same_vocabulary(source, student, tokenizer)
        other = load_model(source, device=student.device).eval().requires_grad_(False)

    @contextmanager
    def alone(_: Any) -> Iterator[nn.Module]:
        yield other

    return alone


def _require_same_vocabulary(source: str, student: PreTrainedModel, tokenizer: Any) -> None:
    """Raise ConfigError if the teacher ``source`` has another vocabulary than the student. Only its config and
    tokenizer are read.
    """
    place = resolve(source)
    config = model_config(place) if isinstance(place, Path) else AutoConfig.from_pretrained(place)
    configs = (config, student.config)
    n_taught, n_own = (int(each.get_text_config().vocab_size) for each in configs)
    if n_taught != n_own or load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"teacher={source!r} has another vocabulary ({n_taught:,} ids) than the student ({n_own:,}), so their "
            "distributions cannot be compared: give a teacher with the student's tokenizer"
        )
