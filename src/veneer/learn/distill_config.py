"""Settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.train.config import SFTConfig


@dataclass
class DistillConfig(SFTConfig):
    """`SFTConfig` with the settings of distillation, in TRL's names. Raises ConfigError with all problems at once.

    ``teacher`` is "base" (the model with its adapter off), or a folder. The folder holds another adapter of the base,
    or another model with the same vocabulary. ``teacher_prompt`` is the text that the teacher reads before each row's
    prompt. ``beta`` is 0 for the forward KL divergence and 1 for the reverse one; between them it is a Jensen-Shannon
    divergence. ``lmbda`` is the share of optimizer steps for which the student generates the answers: with 0, every
    step uses the rows' own answers. ``temperature`` divides the logits of student and teacher, also when the student
    generates answers. ``max_completion_length`` is the most tokens of a generated answer.
    """

    teacher: str = "base"
    teacher_prompt: str = ""
    beta: float = 0.5
    lmbda: float = 0.0
    temperature: float = 1.0
    max_completion_length: int = 128

    def problems(self) -> list[str]:
        """Return all problems of the teacher, the loss, and the settings of generated answers."""
        found = super().problems()
        if self.teacher == "base" and not self.teacher_prompt:
            found.append(
                "teacher_prompt is empty, so the teacher would be the student: give the text that it reads, or another "
                "teacher"
            )
        found += [
            f"{name}={value!r} must be between 0 and 1"
            for name, value in (("beta", self.beta), ("lmbda", self.lmbda))
            if not 0 <= value <= 1
        ]
        if not 0 < self.temperature < float("inf"):
            found.append(f"temperature={self.temperature!r} must be a finite number above 0")
        if self.max_completion_length < 1:
            found.append(f"max_completion_length={self.max_completion_length!r} must be at least 1")
        plain = {"packing": False, "padding_free": False, "eval_packing": False, "truncation_mode": "keep_start",
                 "label_smoothing_factor": 0, "loss_type": "nll"}  # fmt: skip
        found += [
            f"{name}={getattr(self, name)!r} has no effect in distillation: leave it out"
            for name, usual in plain.items()
            if (getattr(self, name) or usual) != usual
        ]
        return found
