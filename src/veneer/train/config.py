"""Settings of a training run: TRL's, checked together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import trl
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from veneer.errors import ConfigError, listed
from veneer.recipe.key_checks import perhaps
from veneer.recipe.ranges import RANGES, out_of_range
from veneer.train.optimizer import optimizer_problems, require_known

Settings = TypeVar("Settings", bound="RunSettings")

# As a base in earnest, TrainingArguments would put its own defaults in front of those that TRL gives its fields.
if TYPE_CHECKING:
    from transformers import TrainingArguments as _Arguments
else:
    _Arguments = object


@dataclass
class RunSettings(_Arguments):  # type: ignore[misc]
    """Settings that every trainer of veneer adds to TRL's, and the checks of settings that exclude each other.

    ``fused``: "auto" trains on veneer's kernels if the model fits them (`model.fused`), "off" never.
    ``gradient_checkpointing``: False, True, or "selective" (`model.memory.checkpointing`). TRL's key "selective" in
    ``gradient_checkpointing_kwargs`` means the same.
    ``activation_offloading``: "host" (or True) for CUDA, "disk" for a file in ``output_dir`` (`model.memory.offload`).
    ``lora_plus``: ratio of the learning rate of the factor B to that of A (LoRA+); None is one rate for both.
    ``early_stopping_patience``: number of evaluations without a better ``metric_for_best_model`` after which training
    stops; None never stops early. The default metric is the held-out loss.
    """

    fused: Literal["auto", "off", False] = "auto"
    lora_plus: float | None = None
    early_stopping_patience: int | None = None
    gradient_checkpointing: bool | Literal["selective"] | None = True
    activation_offloading: bool | Literal["host", "disk"] = False

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = getattr(self, "metric_for_best_model", None) or "eval_loss"
            self.restore_callback_states_from_checkpoint = True  # the patience that is left
        require_known(self.optim)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bf16, which a CPU computes as well
        with warnings.catch_warnings():
            # The setting that everybody knows by this name is called activation_checkpointing from transformers 6 on.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            super().__post_init__()
        problems = [*_range_problems(self), *_checkpointing_problems(self), *optimizer_problems(self)]
        if self.fused is False:
            self.fused = "off"  # what YAML makes of an unquoted off
        if self.fused not in ("auto", "off"):
            problems.append(f"fused={self.fused!r} must be 'auto' or 'off'")
        if self.lora_plus is not None and not self.lora_plus > 0:
            problems.append(f"lora_plus={self.lora_plus!r} must be above 0")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            problems.append(f"early_stopping_patience={self.early_stopping_patience} must be at least 1")
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            problems.append("early_stopping_patience needs held-out rows and eval_strategy='steps' or 'epoch'")
        problems += [*_reporting_problems(self), *_device_problems(self), *self.problems()]
        if problems:
            raise ConfigError(listed(problems, type(self).__name__))

    def problems(self) -> list[str]:
        """Return all problems of the settings of one trainer alone."""
        return []


@dataclass
class SFTConfig(RunSettings, trl.SFTConfig):  # type: ignore[misc]
    """TRL's ``SFTConfig`` with the fields of `RunSettings`. Raises ConfigError with all problems at once.

    ``loss_type``: "nll" (cross-entropy) or "dft".
    ``packing_strategy``: "bfd", or "bfd_split", which keeps the ends of sequences longer than ``max_length``.
    """

    def problems(self) -> list[str]:
        """Return all problems of packing, lengths and the kind of loss."""
        problems = []
        if self.packing and self.packing_strategy == "wrapped":
            problems.append(
                "packing_strategy='wrapped' cuts sequences anywhere and lets them see one another: use 'bfd', or "
                "'bfd_split' to keep the ends of sequences longer than max_length"
            )
        if self.packing and self.max_length is None:
            problems.append("packing=True needs max_length, the length of a packed row")
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max_length={self.max_length} leaves nothing to predict: use 2 or more")
        if self.loss_type not in ("nll", "dft"):
            problems.append(f"loss_type={self.loss_type!r} must be 'nll' or 'dft'")
        return problems


def _range_problems(args: TrainingArguments) -> list[str]:
    """Return a problem for each number outside its allowed range, with which a run would train nothing or do other than
    meant.
    """
    outside = out_of_range({name: getattr(args, name) for name in RANGES})
    return [f"{name}={getattr(args, name)!r} must be {allowed}" for name, allowed in outside.items()]


def _reporting_problems(args: TrainingArguments) -> list[str]:
    """Return the reporting targets that transformers does not know, or whose package is missing."""
    wanted = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    found = []
    for name in wanted:
        if name in (None, "none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            found.append(f"report_to={name!r} is unknown{perhaps(str(name), INTEGRATION_TO_CALLBACK)}")
        elif name not in get_available_reporting_integrations():
            found.append(f"report_to={name!r} needs a package that is not installed: install it, or leave it out")
    return found


def _device_problems(args: TrainingArguments) -> list[str]:
    if args.fp16 and args.device.type == "cpu":
        return ["fp16=True needs a GPU, and this run is on the CPU: use bf16, or leave both out"]
    return []


def _checkpointing_problems(args: TrainingArguments) -> list[str]:
    """Normalize the checkpointing and offload settings; return their contradictions."""
    problems = []
    if args.gradient_checkpointing not in (True, False, "selective"):
        problems.append(f"gradient_checkpointing={args.gradient_checkpointing!r} must be True, False or 'selective'")
    if args.gradient_checkpointing == "selective":
        settings = {**(args.gradient_checkpointing_kwargs or {}), "selective": True}
        args.gradient_checkpointing, args.gradient_checkpointing_kwargs = True, settings
        if hasattr(args, "activation_checkpointing"):  # its name from transformers 6 on
            args.activation_checkpointing, args.activation_checkpointing_kwargs = True, settings
    settings = args.gradient_checkpointing_kwargs or {}
    beside = {key: value for key, value in settings.items() if key not in ("selective", "every_n_layers") and value}
    if settings.get("selective") and beside:
        problems.append(f"selective checkpointing takes every_n_layers and nothing else beside it: leave out {beside}")
    if settings.get("selective") and not args.gradient_checkpointing:
        problems.append("gradient_checkpointing_kwargs say selective, but gradient_checkpointing is off: switch it on")
    if args.activation_offloading is True:
        args.activation_offloading = "host"
    if args.activation_offloading not in (False, "host", "disk"):
        problems.append(f"activation_offloading={args.activation_offloading!r} must be False, 'host' or 'disk'")
    if args.activation_offloading == "host" and args.device.type == "cpu":
        problems.append("activation_offloading='host' is where a CPU run keeps activations anyway: use 'disk'")
    return problems


def as_settings(args: TrainingArguments | None, kind: type[Settings], default_output: str) -> Settings:
    """Return any training arguments as settings of a kind; missing fields keep their defaults."""
    if args is None:
        return kind(output_dir=default_output)
    if isinstance(args, kind):
        return args
    values = args.to_dict()
    values |= {key: getattr(args, key) for key in values if key.endswith("_token")}  # to_dict hides what may be secret
    if values.get("steps_per_generation") is not None:
        values.pop("generation_batch_size", None)  # which TRL has made of it, and takes beside it no more
    return kind(**values)
