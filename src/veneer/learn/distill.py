"""Distillation: a student with an adapter learns the next-token distributions of a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.token_scores import has_own_loss, kept_logits, model_of, unmade_logits
from veneer.data.encoding import IGNORED, Encoder
from veneer.errors import ConfigError, DataError
from veneer.evaluate.scoring import context_length
from veneer.learn.distill_config import DistillConfig
from veneer.learn.divergence import summed_divergence
from veneer.learn.rollouts import Rollouts, seed_of
from veneer.learn.taught_rows import COLUMNS, TEACHER, TaughtCollator, TaughtEncoder, answered, prompts_in
from veneer.learn.teachers import Teacher, base_of, teacher_of
from veneer.serve.schedule.sampling_params import SamplingParams
from veneer.train.config import as_settings
from veneer.train.loss import TokenLoss
from veneer.train.trainer import SFTTrainer

_DRAWS, _ANSWERS = 3, 4  # first numbers of keys, other than those of `DrawingTrainer`
_READERS = {
    "teacher": (TEACHER, "its prompt with ", "shorten the teacher's prompt or the rows"),
    "student": ("", "", "shorten the rows"),
}
"""The beginning of each reader's columns, what it reads before a row, and advice if that is too long."""


class DistillTrainer(SFTTrainer):
    """`SFTTrainer` whose loss is the divergence from a teacher: the base with another prompt, another adapter of it, or
    another model.

    The base is the model with its adapter off. The teacher reads `DistillConfig.teacher_prompt` before each row's
    prompt; the student does not. In a share ``lmbda`` of the steps, the student generates new answers in place of the
    rows' own. Agarwal et al. 2024, arXiv:2306.13649; for prompts, Snell et al. 2022, arXiv:2209.15189. Raises
    ConfigError, DataError or TrainingError if the run is impossible as configured.
    """

    def __init__(self, model: Any, args: DistillConfig | None = None, *given: Any, **options: Any) -> None:
        super().__init__(model, as_settings(args, DistillConfig, "trainer_output"), *given, **options)
        if not isinstance(self.model, PeftModel) or has_own_loss(self.model):
            raise ConfigError(
                "distillation trains an adapter without a loss of its own: give peft_config, such as LoraConfig()"
            )
        self._teacher = teacher_of(self.args.teacher, self.model, self._tokenizer)
        with self._teacher(self.model) as other:
            self._contexts = {"teacher": context_length(other), "student": context_length(self.model)}
        held_out = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for rows in (self.train_dataset, *held_out):
            self._require_room(rows)
        self._rollouts: Rollouts | None = None
        if self.args.lmbda > 0:
            self._adapter = self.model.adapter_state.active[0]
            self._rollouts = Rollouts(self.model, self._tokenizer)
            self._rollouts.hand_over(self._adapter)

    def _require_room(self, rows: Any) -> None:
        """Raise ConfigError if a row does not fit into the student's context, or a row with the teacher's prompt into
        the teacher's.

        Room for a new answer is included if the student generates answers. Rows of a stream are not checked.
        """
        if not isinstance(rows, Dataset):
            return
        drawn = self.args.max_completion_length if self.args.lmbda > 0 else 0
        for reader, (prefix, prompt, advice) in _READERS.items():
            longest, context = max(map(len, rows[f"{prefix}input_ids"]), default=0) + drawn, self._contexts[reader]
            if context is not None and longest > context:
                raise ConfigError(
                    f"the {reader} would read {longest} tokens, {prompt}the longest row"
                    + (f" and an answer of {drawn}" if drawn else "")
                    + f", and its context is {context}: {advice}"
                )

    def encoder(self, args: Any, **settings: Any) -> Encoder:
        """Return the encoder of rows for student and teacher."""
        return TaughtEncoder(**settings, teacher_prompt=args.teacher_prompt)

    def _collator(self) -> Any:
        return TaughtCollator(super()._collator())

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *(name for name in COLUMNS if name not in columns)]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of a step. In a share ``lmbda`` of the steps, the student writes their answers."""
        batches, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        key = (_DRAWS, self.args.seed, self.state.global_step)
        if self._rollouts is None or not batches or seed_of(*key) >= self.args.lmbda * 2**64:
            return batches, n_items
        drawn = self._drawn(self._rollouts, batches)
        return drawn, self._get_num_items_in_batch(drawn, device)

    def _drawn(self, rollouts: Rollouts, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return the micro-batches ``batches`` with the student's new answers in place of their answers.

        The engine generates the answers to all micro-batches in one call.
        """
        prompts = [prompts_in(each["input_ids"], each["labels"]) for each in batches]
        asked = [ids for each in prompts for ids in each]
        params = SamplingParams(temperature=self.args.temperature, max_tokens=self.args.max_completion_length)
        key = (_ANSWERS, self.args.seed, self.state.global_step)
        rows = range(self.args.process_index * len(asked), (self.args.process_index + 1) * len(asked))
        drawn = rollouts.draw(asked, params, adapter=self._adapter, key=key, rows=rows)
        answers, found = iter(drawn), []
        for batch, own in zip(batches, prompts, strict=True):
            taught = prompts_in(batch["teacher_input_ids"], batch["teacher_labels"])
            examples = [
                answered(ids, other, next(answers).answers[0].token_ids) for ids, other in zip(own, taught, strict=True)
            ]
            device = batch["input_ids"].device
            found.append({name: value.to(device) for name, value in self.data_collator(examples).items()})
        return found

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the divergence summed over a micro-batch's tokens, divided by the number of tokens of the step.

        ``return_outputs`` is ignored: no outputs are returned.
        """
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def token_loss(self, model: nn.Module, inputs: dict[str, Any]) -> TokenLoss:
        """Return the divergence over the tokens of the answers, before it is normalized."""
        taught = {name.removeprefix(TEACHER): value for name, value in inputs.items() if name.startswith(TEACHER)}
        own = {name: value for name, value in inputs.items() if not name.startswith(TEACHER)}
        self._require_context(inputs)
        return taught_loss(model, own, taught, self.args, self._teacher)

    def _require_context(self, inputs: dict[str, Any]) -> None:
        """Raise DataError if a row of a batch is longer than the context of the student or the teacher.

        Rows of a stream are first checked here, because their lengths are not known before.
        """
        for reader, (prefix, prompt, advice) in _READERS.items():
            longest, context = int(inputs[f"{prefix}attention_mask"].sum(dim=1).max()), self._contexts[reader]
            if context is not None and longest > context:
                raise DataError(
                    f"the {reader} would read {longest} tokens, {prompt}a row, and its context is {context}: {advice}"
                )


def taught_loss(
    model: nn.Module, own: dict[str, Any], taught: dict[str, Any], args: DistillConfig, teaches: Teacher = base_of
) -> TokenLoss:
    """Return the divergence between the student's predictions and the teacher's, summed over the tokens of the answers.

    ``own`` and ``taught`` are the batches that the student and the teacher read; both hold the same answers.
    ``teaches(model)`` enters a context that yields the teacher.
    """
    with torch.no_grad(), teaches(model_of(model)) as other:
        teacher, _ = _logits_of_answers(other, taught)
    student, labels = _logits_of_answers(model, own)
    total, hits = summed_divergence(student, teacher, labels, beta=args.beta, temperature=args.temperature)
    return TokenLoss(total, torch.tensor(len(labels), device=labels.device), hits, None)


def _logits_of_answers(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits (n, v) that predict the n trained tokens of a batch, and the ids of these tokens.

    The logits are computed later, in chunks, if the model's head allows it.
    """
    labels = inputs["labels"][:, 1:]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    every = torch.arange(labels.shape[1], device=labels.device)
    found = unmade_logits(model, given)
    logits = kept_logits(model, given, every)[0] if found is None else found[0][:, :-1]
    trained = labels != IGNORED
    at = trained.flatten().nonzero().flatten().to(logits.device)
    return logits.flatten(0, 1)[at], labels[trained]
