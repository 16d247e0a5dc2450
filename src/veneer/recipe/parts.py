"""Parts of a recipe as written, each with its keys, types and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from veneer.data.named_files import is_missing, missing_told
from veneer.recipe.distributed_part import DistributedPart
from veneer.recipe.metric_part import MetricPart
from veneer.recipe.source_part import SourcePart
from veneer.recipe.tasks import Task


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(_Part):
    """Base, and the storage of its frozen weights."""

    source: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = True
    float32_rest: bool = False
    gguf: Literal["blocks", "dense"] = "blocks"
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None


class DataPart(_Part):
    """Rows: their source, their reading, and the part of them that is trained."""

    train: str
    more: list[SourcePart] = []
    chat_template: str | None = None
    response_template: str | None = None
    eval: str | None = None
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    prompt: str | None = None
    completion: str | None = None
    chat: bool = False
    system: str | None = None
    train_on: Literal["answers", "everything"] = "answers"
    streaming: bool = False
    limit: int | None = Field(default=None, ge=1)
    eval_limit: int | None = Field(default=None, ge=1)

    @property
    def holds_out(self) -> bool:
        """Return True if rows are held out, in a file of their own or from the training rows."""
        return self.eval is not None or self.eval_fraction > 0

    @property
    def sources(self) -> dict[str, str]:
        """Sources of rows by their keys in a recipe."""
        held_out = {} if self.eval is None else {"data.eval": self.eval}
        more = {f"data.more, entry {number}": each.source for number, each in enumerate(self.more, start=1)}
        return {"data.train": self.train, **more, **held_out}

    @property
    def missing_files(self) -> list[str]:
        """Problems, in words, of sources that must be files and do not exist."""
        missing = {key: Path(source) for key, source in self.sources.items() if is_missing(source)}
        return [f"{key}: {missing_told(path)}" for key, path in missing.items()]


class RolloutsPart(_Part):
    """Source of the answers that are learned from: veneer's engine, transformers' generate, or the engine if it can."""

    engine: Literal["auto", "engine", "generate"] = Field(
        default="auto",
        description="what draws the answers: the engine, or transformers' generate; `auto` is the engine if it can "
        "([answers.md](answers.md))",
    )
    journal: bool = Field(
        default=True,
        description="keep the engine's rollouts in `rollouts/` of the output, which `veneer samples` and a resume read",
    )
    memory: Literal["auto", "one", "beside"] = Field(
        default="auto",
        description="copies of the base in memory: `one` trains on the engine's packed weights, `beside` packs a "
        "second copy; `auto` is `one` if a step is no slower ([answers.md](answers.md#who-draws))",
    )


class DistillPart(_Part):
    """Teacher of distillation, and a prompt that it reads and the student does not."""

    teacher: str = Field(
        default="base",
        description="`base`, which is the model without its adapter, or the folder of another adapter of the base, or "
        "of another model with the same vocabulary",
    )
    teacher_prompt: str | None = Field(
        default=None,
        description="file with the text that the teacher reads before each prompt, such as examples; in a "
        "conversation it begins the system message ([answers.md](answers.md#distillation))",
    )


class Written(_Part):
    """Recipe as written. `recipe.Recipe` adds the configs of its parts."""

    task: Task = "sft"
    model: ModelPart
    data: DataPart
    adapter: dict[str, Any] = {"method": "lora"}
    training: dict[str, Any] = {}
    rewards: list[str | dict[str, Any]] = []
    tools: list[str] = Field(
        default=[],
        description="for grpo, functions that the model may call: file.py:function or module:function "
        "([answers.md](answers.md#conversations))",
    )
    environment: str | None = Field(
        default=None,
        description="for grpo, the class of environments: file.py:Class or module:Class, or openenv:URL, a server of "
        "OpenEnv. If it has `get_reward`, `rewards` may be missing",
    )
    rollouts: RolloutsPart = RolloutsPart()
    distill: DistillPart | None = None
    metric: MetricPart | None = None
    distributed: DistributedPart = DistributedPart()
    output: str
    seed: int = 0
