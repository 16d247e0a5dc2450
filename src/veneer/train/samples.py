"""Training rows as a trainer would read them, one from each source, for inspection before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from veneer.data.chat import with_template
from veneer.data.dataset import columns_of, encode_all
from veneer.data.encoding import IGNORED, Encoder, kind_of
from veneer.data.tasks import OF_REWARDS
from veneer.errors import DataError
from veneer.recipe.parts import DataPart
from veneer.recipe.readers import preference_reader
from veneer.recipe.recipe import Recipe
from veneer.recipe.tasks import KEYS, OF_ANSWERS, Task
from veneer.store.source import load_tokenizer
from veneer.train.rows import answers_only, read_data

Sample = Mapping[str, Sequence[int]]  # input_ids, and labels where tokens of the row itself are trained
_READING = {"prompt", "completion", "chat", "system"}


def samples_of(recipe: Recipe) -> tuple[dict[str, Sample], PreTrainedTokenizerBase]:
    """Return the first training row of every source, by the source's name, and the tokenizer.

    For tasks whose rows hold several answers or none, return the parts of the first row instead, such as ``chosen`` and
    ``rejected``.
    """
    tokenizer = with_template(load_tokenizer(recipe.model.source), recipe.data.chat_template)
    if recipe.task not in OF_ANSWERS:
        return _by_part(recipe, tokenizer), tokenizer
    longest = recipe.training_config().max_length
    parts = _alone(recipe.data)
    return {part.train: _first_row(part, recipe.seed, tokenizer, longest) for part in parts}, tokenizer


def _alone(part: DataPart) -> Iterator[DataPart]:
    """Yield, for each source of rows, a copy of the data part that has this source alone."""
    yield part.model_copy(update={"more": []})
    for each in part.more:
        own = {key: value for key, value in each.model_dump(include=_READING).items() if value is not None}
        yield part.model_copy(update={**own, "train": each.source, "more": [], "eval": None, "eval_fraction": 0.0})


def _first_row(part: DataPart, seed: int, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Sample:
    rows = read_data(part, seed)
    kind = kind_of(columns_of(rows.train), "text")
    only = answers_only(part, kind)
    encoder = Encoder(
        tokenizer=tokenizer,
        kind=kind,
        completion_only=only.completion,
        assistant_only=only.assistant,
        max_length=longest,
    )
    return dict(next(iter(encode_all(rows.train.take(1), encoder, "train"))))


def _by_part(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Sample]:
    rows = read_data(recipe.data, recipe.seed, preference_reader(recipe.data, recipe.task))
    first = Dataset.from_list([rows.train[0]])
    if recipe.task in OF_REWARDS:
        return {"the prompt, to which the model's own answers are rewarded": _prompt(first[0]["prompt"], tokenizer)}
    args = recipe.training_config()
    encoded = _encoded(recipe.task, first, tokenizer, args)
    if recipe.task == "reward":
        return {
            "chosen, which is to score higher": {"input_ids": encoded[0]["chosen_ids"]},
            "rejected, which is to score lower": {"input_ids": encoded[0]["rejected_ids"]},
        }
    if recipe.task == "kto":
        return {
            "wanted" if row["label"] else "not wanted": _answered(row["prompt_ids"], row["completion_ids"], args)
            for row in encoded
        }
    return {key: _answered(encoded[0]["prompt_ids"], encoded[0][f"{key}_ids"], args) for key in ("chosen", "rejected")}


def _encoded(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any) -> Dataset:
    """Encode the rows as TRL's trainer of the task does, without making a trainer."""
    reader: Any = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    found: Dataset = getattr(trl, KEYS[task].trainer)._prepare_dataset(reader, rows, tokenizer, args, "sample")
    if not len(found):
        raise DataError(f"the first row does not fit into max_length={args.max_length} tokens: set it higher")
    return found


def _answered(prompt: Sequence[int], answer: Sequence[int], args: Any) -> Sample:
    ids, labels = [*prompt, *answer], [*([IGNORED] * len(prompt)), *answer]
    return {"input_ids": ids[: args.max_length], "labels": labels[: args.max_length]}


def _prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> Sample:
    if isinstance(prompt, str):
        return {"input_ids": tokenizer(prompt)["input_ids"]}
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
