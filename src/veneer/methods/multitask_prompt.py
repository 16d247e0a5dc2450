"""Multitask prompt tuning: the prompt of task t is one shared prompt times a matrix of low rank that is the task's own,
``P ⊙ (C_t R_t)`` (Wang et al. 2023, arXiv:2303.02861, section 3.1, eq. 1).

A prompt of source tasks may start one of a target task: ``AVERAGE_SOURCE_TASKS``, ``EXACT_SOURCE_TASK``,
``ONLY_SOURCE_SHARED``. Difference from PEFT: RANDOM draws P at the scale of the model's own embeddings (PEFT: standard
deviation 1). An adapter of one task needs no ``task_ids``. The prompts are not distilled from those of single tasks
(section 3.2), nor are they in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import Params, Shapes
from veneer.contract.embedded_prompt import EmbeddedPrompt
from veneer.contract.packing import Packing
from veneer.contract.tasks import unnamed_task
from veneer.disk.safetensors import read_all, read_header
from veneer.errors import ConfigError
from veneer.inits import prompt
from veneer.records.deltas import PromptDelta
from veneer.records.sites import InputSite

SHARED, COLUMNS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
OF_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
_DEVIATION = 0.02  # of the start of C and R, as PEFT has it


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(EmbeddedPrompt):
    """Settings of multitask prompt tuning, with the names that PEFT gives them.

    ``num_tasks``: the number of tasks, each with a prompt of its own. ``num_ranks``: the rank of the matrices that
    distinguish them. ``prompt_tuning_init``: the start of the shared prompt. "RANDOM", "SAMPLE_VOCAB" and "TEXT" are as
    in prompt tuning. The others start from ``prompt_tuning_init_state_dict_path``, the file of an adapter that was
    trained on source tasks. "ONLY_SOURCE_SHARED" takes the file's shared prompt. "AVERAGE_SOURCE_TASKS" also takes the
    mean of the low-rank factors of all source tasks, and "EXACT_SOURCE_TASK" those of the task
    ``prompt_tuning_init_task``; the adapter then has one task.
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    inert: ClassVar[frozenset[str]] = frozenset(
        {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_tasks", "num_ranks"}
    )
    headline: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "num_tasks", "num_ranks")

    prompt_tuning_init: Literal[
        "RANDOM", "SAMPLE_VOCAB", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"
    ] = "RANDOM"
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("num_ranks", "num_tasks"):
            if getattr(self, name) < 1:
                found.append(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if self.prompt_tuning_init_task < 0:
            found.append(
                f"prompt_tuning_init_task={self.prompt_tuning_init_task!r} must be a whole number of at least 0"
            )
        return found if self.inference_mode else found + self._problems_of_source()

    def _problems_of_source(self) -> list[str]:
        start, path = self.prompt_tuning_init, self.prompt_tuning_init_state_dict_path
        if start not in OF_SOURCE:
            given = [] if path is None else ["prompt_tuning_init_state_dict_path"]
            return [f"{name} has no effect with prompt_tuning_init={start!r}: drop it" for name in given]
        found = []
        if path is None:
            found.append(f"prompt_tuning_init={start!r} needs prompt_tuning_init_state_dict_path, a .safetensors file")
        if start != "ONLY_SOURCE_SHARED" and self.num_tasks != 1:
            found.append(
                f"num_tasks={self.num_tasks!r} must be 1 with prompt_tuning_init={start!r}, the start of one task"
            )
        return found

    @property
    def n_tasks(self) -> int:
        return self.num_tasks

    @property
    def packing(self) -> Packing:
        """Packing that stores "RANDOM" as the start of an adapter that started from a file, so that it can be loaded
        without this file.
        """
        if self.prompt_tuning_init not in OF_SOURCE:
            return Packing()
        return Packing({"prompt_tuning_init": "RANDOM", "prompt_tuning_init_state_dict_path": None})

    def shapes(self, site: InputSite) -> Shapes:
        n, d = self.n_rows, site.features
        return {SHARED: (n, d), COLUMNS: (self.num_tasks, n, self.num_ranks), ROWS: (self.num_tasks, self.num_ranks, d)}

    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        if self.prompt_tuning_init in OF_SOURCE:
            given = self._of_source(shapes)
        else:
            given = {SHARED: prompt.embeddings(site, self.n_rows, self.prompt_tuning_init, generator)}
        own = {name: _DEVIATION * torch.randn(shapes[name], generator=generator) for name in (COLUMNS, ROWS)}
        return {SHARED: given[SHARED], **own, **given}

    def _of_source(self, shapes: Shapes) -> dict[str, Tensor]:
        """Return the parameters of the source tasks. Raises ConfigError if their file does not hold them."""
        path = Path(str(self.prompt_tuning_init_state_dict_path))
        wanted = (SHARED,) if self.prompt_tuning_init == "ONLY_SOURCE_SHARED" else (SHARED, COLUMNS, ROWS)
        given = _read(path, wanted)
        if self.prompt_tuning_init == "EXACT_SOURCE_TASK":
            task, n = self.prompt_tuning_init_task, len(given[COLUMNS])
            if task >= n:
                raise ConfigError(f"prompt_tuning_init_task={task}, and {path} has the tasks 0 to {n - 1}")
            given = {**given, **{name: given[name][task : task + 1].clone() for name in (COLUMNS, ROWS)}}
        elif self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            given = {**given, **{name: given[name].mean(dim=0, keepdim=True) for name in (COLUMNS, ROWS)}}
        wrong = [
            f"{n} {tuple(x.shape)} instead of {shapes[n]}" for n, x in given.items() if tuple(x.shape) != shapes[n]
        ]
        if wrong:
            raise ConfigError(
                f"{path} does not fit: {', '.join(wrong)}. num_virtual_tokens, num_ranks and the base must be the "
                "source's"
            )
        return given

    def lower(self, site: InputSite, params: Params) -> PromptDelta:
        columns, rows, n = params[COLUMNS], params[ROWS], self.num_virtual_tokens
        if len(columns) > 1:
            raise unnamed_task(self.peft_type, len(columns))
        return PromptDelta(embeddings=params[SHARED][:n] * (columns[0, :n] @ rows[0]))

    def of_task(self, params: Params, task: int) -> Params:
        return {**params, **{name: params[name][task : task + 1] for name in (COLUMNS, ROWS)}}


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path={str(path)!r} must be a .safetensors file: that of an adapter of "
            "source tasks. A pickle can run any code, and is not read"
        )
    header, problems = read_header(path)
    problems += [f"holds no {name}" for name in names if name not in header]
    if problems:
        raise ConfigError(
            f"{path} is no adapter of source tasks: {'; '.join(problems)}. Give the file that such an adapter's "
            "training saved"
        )
    return {name: value.float() for name, value in read_all(path, header).items() if name in names}
