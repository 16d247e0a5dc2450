"""Trainers that learn from rewards of answers drawn by the model in training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather
from datasets import Dataset
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from trl.trainer.utils import RepeatSampler

from veneer.adapters.peft_model import PeftModel
from veneer.adapters.token_scores import PreferenceScoring
from veneer.contract import MethodConfig
from veneer.data.preference import Task, checked_rows
from veneer.errors import DataError, DivergedError, NonFiniteError, TrainingError
from veneer.learn.conversation import Rollout
from veneer.learn.journal import FOLDER, Journal, Line, hash_of, journal_path
from veneer.learn.learning_rows import by_prompt, equal_groups, learning_rows, of_all_rows
from veneer.learn.policy import Policy, policy_of, rollouts_of_base
from veneer.learn.proof import beyond, require_same_policy, rounded_otherwise
from veneer.learn.rewards import RewardLimits, checked_reward, reward_functions
from veneer.learn.rollouts import DrawnAnswer, Rollouts
from veneer.model.sites.structure import evaluation
from veneer.train.config import RunSettings
from veneer.train.preference.reference import Reference
from veneer.train.preference.scores import ScoredModel
from veneer.train.preference.trainer import PreferenceTrainer
from veneer.train.resume import random_state_kept
from veneer.train.run_trainer import Ready

log = logging.getLogger(__name__)
_MOST_EQUAL = 10  # draws
GENERATED_FILE = "generated_{rank}_of_{n_processes}.safetensors"


class EpochRepeatSampler(RepeatSampler):  # type: ignore[misc]
    """TRL's sampler: each prompt occurs once per completion. An epoch's order depends on seed and epoch alone."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration yields."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()


class DrawingTrainer(PreferenceTrainer):
    """Mixin for TRL's GRPO and RLOO trainers, with their arguments.

    An engine on the model's weights (`Rollouts`) generates the answers. If the engine does not support the run,
    transformers does. Losses are TRL's. The reference, if ``beta`` needs one, is that of `veneer.DPOTrainer`. If
    several steps train on the same answers, checkpoints hold these answers.
    """

    task: ClassVar[Task]
    settings: ClassVar[type[Any]]
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _pending_metrics: dict[str, list[float]]
    policy: Policy | None = None
    rollouts_of_base: Rollouts | None = None  # if the base's only copy is the engine's
    _n_evaluated = 0  # answers, in this evaluation
    journal: Journal | None = None
    rollouts: list[Rollout]  # of the last draw
    observations: Sequence[Any] = ()  # of environments, at the beginning of each
    draws_by_function = False  # a user's
    _recalled: list[Line] | None = None  # the draw in progress, if it is in the journal
    _told: tuple[Any, Any] = (), ()  # prompts and completions of the last draw
    _told_metrics: Mapping[str, list[float]] = MappingProxyType({})  # by its reward functions
    _n_calls = 0  # of the engine, for the answers of this step: a rollout function makes several
    _scored: Tensor | None = None  # log-probabilities of the last training pass
    _loss_of: dict[str, Any] | None = None  # micro-batch whose loss is computed
    _rewards: Tensor | None = None  # of the last answers, by function
    _n_equal = 0  # draws in a row in which all rewards of every group were equal
    left_out: set[int]  # answers of the last draw whose environment could not begin

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: RunSettings | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: MethodConfig | None = None,
        conversing: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if conversing.get("environment_factory") is None:
            checked_rows(train_dataset, "train", self.task)
            checked_rows(eval_dataset, "eval", self.task)
        functions = reward_functions(reward_funcs, needed=conversing.get("environment_factory") is None)
        args, self.left_out = self.own_settings(args, self.settings), set()
        self.reward_limits = RewardLimits(args.reward_timeout, args.reward_on_error, args.reward_most_failed)
        rewards = [self.limited(each, alone=len(functions) == 1) for each in functions]
        ready = self.made_ready(model, args, processing_class, quantization_config, peft_config, optimizers)
        with self.building(ready) as made:
            super().__init__(
                **made,
                reward_funcs=rewards,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                **conversing,
            )
        self.beta = self.args.beta
        if self.beta:
            scoring = PreferenceScoring(self.temperature, details=False)
            self.ref_model = Reference(self.model, scoring, fresh=peft_config is not None)
        self.policy = policy_of(self)
        # TRL's correction of draws by another policy is for 16 bits: in float32 they are the same, which is proved.
        self.use_vllm = self.policy is not None and not self.policy.is_exact
        self.surround()

    def take_base(
        self, base: PreTrainedModel, args: Any, processing_class: Any, peft_config: MethodConfig | None
    ) -> None:
        """Pack the base's weights for the engine as the only copy, if ``rollout_memory`` asks for one. Raises
        ConfigError.
        """
        self.rollouts_of_base = rollouts_of_base(base, processing_class, args, peft_config)

    def limited(self, function: Any, *, alone: bool, name: str | None = None) -> Any:
        """Wrap a reward function by `checked_reward`, with the limits in the trainer's settings."""
        return checked_reward(function, self.reward_limits, alone=alone, name=name, left_out=self.left_out)

    @contextmanager
    def building(self, ready: Ready) -> Iterator[dict[str, Any]]:
        """Enter a context that hides ``beta`` and ``use_vllm`` from TRL's constructor, so that TRL loads neither a
        reference nor vLLM.
        """
        given = {name: getattr(ready.args, name) for name in ("beta", "use_vllm")}
        ready.args.beta, ready.args.use_vllm = 0.0, False
        try:
            with super().building(ready) as made:
                yield made
        finally:
            for name, value in given.items():
                setattr(ready.args, name, value)

    def drawn(self, prompts: Sequence[Sequence[int]]) -> list[DrawnAnswer] | None:
        """Return the engine's answer to each prompt, or None if transformers generates the answers."""
        if self.policy is None:
            return None
        if self._recalled is not None:
            self.rollouts = self._recalled_rollouts(self._recalled, prompts)
            return self.policy.recall([each.first_answer for each in self.rollouts])
        first = self.args.process_index * len(prompts)
        key: tuple[int, ...] = (1, self.args.seed, 0)
        if self.model.training:
            key = (0, self.args.seed, self._draw_number())
            key = (2, *key[1:], self._n_calls) if self._n_calls else key
            self._n_calls += 1
        else:
            first += self._n_evaluated
            self._n_evaluated += len(prompts) * self.args.world_size
        drawn = self.policy.draw(prompts, key, range(first, first + len(prompts)))
        self.rollouts = [Rollout.of(ids, each, {}) for ids, each in zip(prompts, drawn, strict=True)]
        return drawn

    def _recalled_rollouts(self, lines: Sequence[Line], prompts: Sequence[Sequence[int]]) -> list[Rollout]:
        if [line["prompt_hash"] for line in lines] != [hash_of(ids) for ids in prompts]:
            raise TrainingError(
                f"the journal of rollouts, draw {lines[0]['draw']}, has other prompts than this run: give the same "
                f"data and chat template, or remove the {FOLDER} folder of the run"
            )
        return [Rollout.recalled(line, ids) for line, ids in zip(lines, prompts, strict=True)]

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate as `PreferenceTrainer.evaluation_loop` does. Every evaluation generates answers with the same random
        keys.
        """
        self._n_evaluated = 0
        return super().evaluation_loop(*args, **options)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._n_calls, self.observations, self.rollouts = 0, [], []
        self.left_out.clear()
        with self._divergence_told():
            self._recalled = self._in_journal(len(inputs))
            found: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self.weigh(found)
        if self.policy is None or not self.policy.has_drawn:
            return found
        found["sampling_per_token_logps"] = self.policy.logprobs(found["completion_ids"])
        if self.journal is not None and self.model.training and self._recalled is None:
            self.journal.write(self._draw_number(), self._lines(found["advantages"]))
        if (mass := self.policy.kept_mass) < 1:
            self._metrics["train" if self.model.training else "eval"]["rollouts/kept_mass"].append(mass)
        if self.policy.is_exact and not self.policy.is_proved and self.model.training:
            with random_state_kept(), evaluation(self.model), torch.no_grad():
                self._prove(self.policy, found)
        self.policy.end()
        return found

    @contextmanager
    def _divergence_told(self) -> Iterator[None]:
        """Enter a context that turns NonFiniteError, which the engine raises for an adapter with NaN or infinite
        values, into DivergedError.
        """
        try:
            yield
        except NonFiniteError as error:
            last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
            kept = "no checkpoint is there" if last is None else f"the last checkpoint is {last}"
            raise DivergedError(
                f"the adapter has values that are not finite after step {self.state.global_step}, and {kept}: lower "
                "the learning rate, or clip gradients (max_grad_norm)"
            ) from error

    def show_rollouts(self, n: int) -> list[Line]:
        """Generate and reward at least ``n`` answers to the first prompts, in whole groups, and return them as lines of
        a journal.

        Nothing is trained or written. Raises the errors of a training step.
        """
        size, rows = self.num_generations, self.train_dataset
        groups = min(-(-n // size), len(rows))
        self.model.train()
        with random_state_kept(), self.dropout_as_set():
            found = self._generate_and_score_completions([dict(rows[i // size]) for i in range(groups * size)])
        if not self.rollouts:  # transformers drew, or a rollout function
            ids = [
                own[mask.bool()].tolist()
                for own, mask in zip(found["completion_ids"], found["completion_mask"], strict=True)
            ]
            self.rollouts = [Rollout([], own, [], [1] * len(own), [], [], None, None) for own in ids]
        return self._lines(found["advantages"])

    def resolve_resume(self, resume: str | bool | None) -> str | None:
        """Return the checkpoint as `ResumableTrainer.resolve_resume` does, and open the run's journal."""
        found = super().resolve_resume(resume)
        if self.policy is not None and self.args.rollout_journal:
            place = journal_path(Path(self.args.output_dir), self.args.process_index, self.args.world_size)
            self.journal = Journal(place, keeps=found is not None)
        return found

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, *args: Any) -> Tensor:
        if self._recalled is None:
            self._rewards = self._without_lost_groups(super()._calculate_rewards(inputs, prompts, completions, *args))
            self._told = prompts, completions
            self._told_metrics = {name: [*values] for name, values in self._pending_metrics.items()}
            return self._rewards
        for name, values in self._recalled[0].get("metrics", {}).items():
            self._pending_metrics[name].extend(values)
        own = [[math.nan if value is None else value for value in line["rewards"]] for line in self._recalled]
        self._rewards = gather(torch.tensor(own, device=self.accelerator.device))
        return self._rewards

    def _without_lost_groups(self, rewards: Tensor) -> Tensor:
        """Return the rewards (answers, functions), NaN for groups in which an environment failed to start.

        Raises TrainingError if every group has such an environment.
        """
        if getattr(self, "environments", None) is None:
            return rewards
        own = len(rewards) // self.args.world_size
        lost = torch.tensor([row in self.left_out for row in range(own)], device=self.accelerator.device)
        n = self.num_generations if self.model.training else self.num_generations_eval
        groups = gather(lost).view(-1, n).any(dim=1)
        if groups.all():
            raise TrainingError(
                "in every group, the reset of an environment failed twice, so no answer has a reward: "
                "correct the errors that the log names"
            )
        self._pending_metrics["rollouts/reset_failed"].append(groups.float().mean().item())
        return rewards.masked_fill(groups.repeat_interleave(n).unsqueeze(1), math.nan)

    def _draw_number(self) -> int:
        return int(self._step // self._steps_of_a_draw())

    def _in_journal(self, n: int) -> list[Line] | None:
        """Return the journal's ``n`` lines of the current draw (the answers of this step).

        Return None if the journal does not have them all, in evaluation, or if a user's function generates the answers.
        """
        if self.journal is None or self.policy is None or not self.model.training or self.draws_by_function:
            return None
        return self.journal.draw(self._draw_number(), self.policy.version().id, n)

    def _lines(self, advantages: Tensor) -> list[Line]:
        """Return the last generated answers as lines of a journal."""
        first = self.args.process_index * len(self.rollouts)
        rewards = (self._rewards if self._rewards is not None else torch.empty(0)).tolist()
        weights, lines = self.reward_weights.tolist(), []
        for row, (rollout, prompt, completion) in enumerate(zip(self.rollouts, *self._told, strict=True)):
            line = {
                "step": self.state.global_step, "row": first + row, "prompt": prompt, "completion": completion,
                "functions": self.reward_func_names, "advantage": advantages[row].item(),
                "reward": _weighted(rewards[first + row], weights),
                "rewards": [None if math.isnan(value) else value for value in rewards[first + row]],
            }  # fmt: skip
            observed = {"observation": self.observations[row]} if self.observations else {}
            lines.append(line | observed | rollout.line())
        lines[0]["metrics"] = self._told_metrics
        return lines

    def weigh(self, found: dict[str, Any]) -> None:
        """Set the advantages of a draw's groups with equal rewards to exactly 0: TRL's mean has a rounding error."""
        advantages = found["advantages"]
        if self._rewards is None or (self.beta and self.task == "rloo"):  # its rewards have the distance to a reference
            return
        n = self.num_generations if self.model.training else self.num_generations_eval
        first, equal = self.args.process_index * len(advantages), equal_groups(self._rewards, n)
        advantages[equal[first : first + len(advantages)].to(advantages.device)] = 0
        if self.model.training:
            self._n_equal = self._n_equal + 1 if equal.all() else 0
            if self._n_equal == _MOST_EQUAL:
                log.warning(
                    "in %d draws one after another, all answers to each prompt had equal rewards, which teach nothing: "
                    "raise temperature or num_generations, let rewards tell a better answer from a worse one, or give "
                    "other prompts (veneer train --show-rollouts shows answers and rewards before a run)",
                    _MOST_EQUAL,
                )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        steps, buffered = self.args.steps_per_generation, self._buffered_inputs
        is_new = self.model.training and buffered is not None and buffered is not before
        if not is_new or steps == 1 or self.args.gradient_accumulation_steps % steps:
            return inputs
        self._buffered_inputs = by_prompt(buffered or [])  # they are one step, whichever rows share a micro-batch
        return self._buffered_inputs[self._step % steps]

    def _prove(self, policy: Policy, batch: dict[str, Any]) -> None:
        """Raise PolicyMismatchError if engine and training pass give the first answers different log-probabilities."""
        ids, mask = (torch.cat([batch[f"prompt_{n}"], batch[f"completion_{n}"]], dim=1) for n in ("ids", "mask"))
        drawn, counted = batch["sampling_per_token_logps"], _drawn(batch)

        def scored() -> Tensor:
            n, at_once = drawn.shape[1], self.args.per_device_train_batch_size
            return cast(Tensor, self._scored_by(self.model, ids, mask, n, batch_size=at_once)[0])

        own, rounding = scored(), None
        if beyond(drawn, own, counted):
            with rounded_otherwise(self.model.get_input_embeddings()):
                rounding = scored() - own
        require_same_policy(drawn, own, counted, batch["completion_ids"].tolist(), rounding)
        policy.is_proved = True

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self._loss_of = inputs
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._loss_of = None
        scored, self._scored = self._scored, None
        is_first = self._step % self._steps_of_a_draw() < self.args.gradient_accumulation_steps
        counted, rows = _drawn(inputs), self._learning(inputs)
        if rows is not None:
            counted = counted & torch.zeros_like(counted).index_fill(0, rows, True)
        if scored is not None and "sampling_per_token_logps" in inputs and is_first and counted.any():
            differences = (scored - inputs["sampling_per_token_logps"])[counted].abs()
            told = self._metrics["train" if self.model.training else "eval"]
            told["rollouts/logprob_difference/mean"].append(differences.mean().item())
            told["rollouts/logprob_difference/max"].append(differences.max().item())
        return loss

    def _steps_of_a_draw(self) -> int:
        """Return the number of micro-batches that are trained on one set of generated answers."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **options: Any
    ) -> Any:
        policy = None if torch.is_grad_enabled() or model is not self.model else self.policy
        if policy is not None and policy.knows:  # it is the policy that drew them, and the engine has told
            return policy.logprobs(input_ids[:, -logits_to_keep:]), None, None
        rows = None if self._loss_of is None else self._learning(self._loss_of)
        if self._loss_of is None or rows is None:
            found = self._scored_by(model, input_ids, attention_mask, logits_to_keep, *args, **options)
        else:
            drawn = self._loss_of["sampling_per_token_logps"]
            own = self._scored_by(model, input_ids[rows], attention_mask[rows], logits_to_keep, *args, **options)
            old = self._loss_of.get("old_per_token_logps")
            logps = of_all_rows(drawn if old is None else old, rows, own[0])
            found = logps, of_all_rows(-drawn, rows, own[1]), own[2]
        self._scored = found[0].detach()
        return found

    def _learning(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return the indices of a micro-batch's rows that need a training pass, or None if all do.

        An answer of advantage 0 changes TRL's loss only if there is a distance to a reference, an entropy bonus, or a
        selection of tokens by entropy.
        """
        more = (
            (self.beta and self.task == "grpo") or self.aux_loss_enabled or getattr(self, "top_entropy_quantile", 1) < 1
        )
        is_known = self.model.training and "sampling_per_token_logps" in inputs
        if more or not is_known or getattr(self, "_entropy_bonus_enabled", False):
            return None
        return learning_rows(inputs["advantages"])

    def _scored_by(self, model: Any, *args: Any, compute_entropy: bool = False, **options: Any) -> Any:
        if not isinstance(model, Reference):
            learns = compute_entropy and bool(getattr(self, "_entropy_bonus_enabled", False))
            model = ScoredModel(
                model, PreferenceScoring(self.temperature, details=compute_entropy, entropy_learns=learns)
            )
        return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **options)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        prompts = self.args.generation_batch_size // self.num_generations
        rows = self.train_dataset if dataset is None else dataset
        if len(rows) < prompts:
            raise DataError(
                f"{len(rows)} prompts are fewer than the {prompts} that one batch of completions takes: give more "
                "rows, or a smaller per_device_train_batch_size"
            )
        order = EpochRepeatSampler(
            rows,
            mini_repeat_count=self.num_generations,
            batch_size=prompts,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
        self.order = order
        return order

    def tell_of_repeats(self) -> None:
        """Log nothing: no row is repeated, since TRL leaves out prompts that do not fill a batch."""

    def counters(self) -> dict[str, Any]:
        """Return the counters for a checkpoint, with the number of micro-batches so far."""
        return {**super().counters(), "micro_steps": self._step}

    def restore_counters(self, counted: dict[str, Any], folder: Path) -> None:
        """Restore a checkpoint's counters, and the completions on which the next steps train, if some are left."""
        super().restore_counters(counted, folder)
        self._step = counted.get("micro_steps", 0)
        self._buffered_inputs = _read(folder / self._generated_file())

    def own_files(self) -> list[tuple[str, bytes]]:
        """Return this process's checkpoint files, with the completions on which the next steps train, if
        some are left.
        """
        files = super().own_files()
        if self._buffered_inputs is not None and self._step % self._steps_of_a_draw():
            files.append((self._generated_file(), _packed(self._buffered_inputs)))
        return files

    def _generated_file(self) -> str:
        # Another number of processes finds no file: all of them generate anew, where one alone would wait for ever.
        return GENERATED_FILE.format(rank=self.args.process_index, n_processes=self.args.world_size)


def _drawn(batch: dict[str, Any]) -> Tensor:
    """Return a mask (b, t) of the tokens that the model generated."""
    mask: Tensor = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()


def _weighted(rewards: Sequence[float], weights: Sequence[float]) -> float | None:
    """Return the weighted sum of an answer's rewards that are not NaN (no opinion), or None if all are NaN."""
    told = [weight * own for weight, own in zip(weights, rewards, strict=True) if not math.isnan(own)]
    return sum(told) if told else None


def _packed(batches: list[dict[str, Any]]) -> bytes:
    tensors = {
        f"{i}/{key}": value.detach().cpu().contiguous().clone()  # micro-batches may share one
        for i, batch in enumerate(batches)
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }
    return cast(bytes, save(tensors))


def _read(path: Path) -> list[dict[str, Any]] | None:
    if not path.exists():
        return None
    batches: dict[int, dict[str, Any]] = {}
    for name, value in load_file(path).items():
        number, _, key = name.partition("/")
        batches.setdefault(int(number), {})[key] = value
    return [batches[number] for number in sorted(batches)]
