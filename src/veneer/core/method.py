"""The contract of a method. A config *is* its method: data, and pure functions from parameters to a record.

Laws, run on every method by ``tests/contract``:

- ``init`` returns exactly the names and shapes of ``shapes``, for any site, with finite values;
- ``lower`` is pure and differentiable, and where ``identity_at_start`` holds, the record of ``init`` changes nothing;
- for linear methods, forward through the record equals forward through the folded weight;
- what is saved and loaded is bit-equal, and the declared bytes are the bytes on disk.
"""

from __future__ import annotations

import importlib
import os
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from veneer.core.field_types import check
from veneer.core.frozen_config import FrozenConfig
from veneer.core.records import LinearDelta, PrefixDelta, PromptDelta, ResidualDelta
from veneer.core.sites import AttentionSite, InputSite, LinearSite, ResidualSite
from veneer.core.tasks import TaskType

Shapes = dict[str, tuple[int, ...]]
Params = Mapping[str, Tensor]
C = TypeVar("C", bound="MethodConfig")
WRAPPER = "base_model."  # what PEFT's wrapper of a model puts in front of the keys on disk
DISK_PREFIX = "base_model.model."  # and what its two wrappers put in front of a module's path


class Schedule(Protocol):
    """What a method does to its parameters between the steps of a training run."""

    def step(self, step: int) -> None:
        """Act after the optimizer step of this number, while its gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(FrozenConfig):
    """What every adapter config holds, in PEFT's names.

    ``peft_type`` names the format on disk. ``modules_to_save`` are modules trained whole and kept with the adapter.
    Values are checked against the types of the fields, see `core.field_types`. Lists and sets are kept as tuples (sets
    sorted), mappings as copies, so that no config changes behind one's back.
    """

    peft_type: ClassVar[str]
    identity_at_start: ClassVar[bool] = True
    usual_learning_rate: ClassVar[float] = 2e-4  # of AdamW, where a recipe gives none

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    modules_to_save: Collection[str] | None = None

    def __post_init__(self) -> None:
        check(self, lambda: self.problems())

    def problems(self) -> list[str]:
        """What is wrong with values of the right types, one sentence each. Subclasses extend the list."""
        tasks = [task.value for task in TaskType]
        return [] if self.task_type in (None, *tasks) else [f"task_type={self.task_type!r} must be one of {tasks}"]

    @property
    def keeps_tie(self) -> bool:
        """Whether modules that share the input embeddings' weight are changed alike, so that they go on sharing it."""
        return False

    def packed(self) -> MethodConfig:
        """The config as it is written: a method that others do not know may be one that they do know, once trained."""
        return self

    def to_dict(self) -> dict[str, object]:
        """The fields by name, with ``peft_type``, as one logs them: new lists and mappings, no tuples."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name, value in values.items():
            plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            plain = list(plain) if isinstance(plain, tuple) else plain
            values[name] = dict(plain) if isinstance(plain, Mapping) else plain
        return {"peft_type": self.peft_type, **values}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_config.json`` into a folder, which is made if there is none. Raises DiskError."""
        _disk().save_config(self, save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: str | bool | None
    ) -> MethodConfig:
        """The config of a saved adapter, of whatever method it is: from a folder or a hub id.

        ``hub``: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.
        Raises FormatError where there is none or it is not understood.
        """
        found: MethodConfig = _disk().config_of(pretrained_model_name_or_path, hub)
        return found

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method puts virtual tokens in front of the sequence."""
        return False

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, object]) -> C:
        """A config from the fields of an ``adapter_config.json``, ``peft_type`` and the like already taken out."""
        return cls(**values)  # type: ignore[arg-type]


def _disk() -> Any:
    """What knows the format on disk; named here and not imported, for it stands above and knows every method."""
    return importlib.import_module("veneer.store.adapter_config")


@dataclass(frozen=True, kw_only=True)
class TargetedConfig(MethodConfig):
    """A config that picks modules by name.

    ``target_modules``: a tuple of names or suffixes, a regular expression that must match the whole module path, or
    ``"all-linear"`` (every linear layer but the output head); None takes those of the method's ``default_targets`` that
    the model has.
    ``layers_to_transform`` keeps only those layer indices, found by ``layers_pattern`` (name of the list of layers).
    """

    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            if isinstance(pattern, str) and pattern != "all-linear":
                try:
                    re.compile(pattern)
                except re.error as error:
                    found.append(f"{name}={pattern!r} is not a regular expression ({error})")
        if self.layers_pattern and self.layers_to_transform is None:
            found.append(
                "layers_pattern is given without layers_to_transform: give the indices too, or drop the pattern"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class LinearMethod(TargetedConfig):
    """A method at linear layers, each with parameters of its own."""

    # the query and value projections (Hu et al. 2021, section 4.2) by the names that families give them
    default_targets: ClassVar[tuple[str, ...]] = (
        "q_proj", "v_proj", "query", "value", "q", "v", "query_proj", "value_proj", "query_key_value", "c_attn",
        "qkv_proj", "Wqkv",
    )  # fmt: skip

    adapts_embeddings: ClassVar[bool] = False
    adapts_convolutions: ClassVar[bool] = False
    shared_from: ClassVar[str] = ""  # the field that `shared` is drawn from
    adapts_attention: ClassVar[bool] = False  # `nn.MultiheadAttention`: both of its maps

    @abstractmethod
    def shapes(self, site: LinearSite) -> Shapes:
        """Names and shapes of the parameters trained at one site, in PEFT's shapes."""

    @abstractmethod
    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU, drawn from ``generator``."""

    @abstractmethod
    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        """The record that these parameters mean at this site."""

    def for_sites(self: C, sites: Sequence[LinearSite]) -> C:
        """The config with what depends on all the layers that it adapts filled in; sites come as shapes."""
        return self

    def unused(self, names: Sequence[str]) -> list[str]:
        """A sentence for everything in the config that means none of the modules it adapts, given by path."""
        return []

    def refused(self, sites: Sequence[LinearSite]) -> list[str]:
        """A sentence for every layer that the method cannot act on with this config; sites come as shapes."""
        return []

    def misfits(self, sites: Sequence[LinearSite]) -> list[str]:
        """A sentence for everything in the config that no layer it adapts is large enough for; sites come as shapes."""
        return []

    def torn(self, tied: Sequence[LinearSite]) -> list[str]:
        """A sentence for everything in the config that is not the same for these layers, which are to stay one."""
        return []

    def shared(self) -> dict[str, Tensor]:
        """What else may be on disk, by its whole key: it follows from the config and is never trained."""
        return {}

    @property
    def saves_shared(self) -> bool:
        """Whether `shared` is written; where a file holds it, it is checked anyway."""
        return True

    def fixed(self, site: LinearSite) -> tuple[str, ...]:
        """Those names in ``shapes`` that stay as they start: kept with the adapter and never trained."""
        return ()

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        """For each parameter, what follows the module path in its key in ``adapter_model.safetensors``."""
        return {name: name for name in self.shapes(site)}

    def packed(self) -> LinearMethod:
        return self

    def pack(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        """The parameters as ``packed()`` names and shapes them, with the same effect."""
        return dict(params)

    def unpack(self, site: LinearSite, packed: Params) -> dict[str, Tensor]:
        """The inverse of ``pack``, bit for bit, so that training can go on."""
        return dict(packed)

    def for_run(self: C, n_steps: int) -> C:
        """The config with what depends on the length of a training run filled in."""
        return self

    @property
    def penalty_weight(self) -> float:
        """How much of `penalty` is added to a training loss."""
        return 0.0

    def penalty(self, layers: Sequence[Params]) -> Tensor:
        """What keeps the parameters of all layers in shape, for methods with a ``penalty_weight``."""
        return torch.zeros(())

    def schedule(self, layers: Mapping[str, Params]) -> Schedule | None:
        """What acts on the parameters of all layers (by path) after each optimizer step; None where nothing does."""
        return None

    @property
    def dropout(self) -> float:
        """Probability of zeroing an input of A in training."""
        return 0.0

    @property
    def trained_biases(self) -> str:
        """Which biases of the base the adapter trains: "none", "all", or those of the adapted layers ("lora_only")."""
        return "none"

    @property
    def adapted_parameters(self) -> tuple[str, ...]:
        """Parameters adapted by name where no linear layer holds them: experts stacked in one tensor, a router."""
        return ()

    @property
    def trained_rows(self) -> Mapping[str | None, tuple[int, ...]]:
        """Rows of tables that the adapter trains, by the end of the module's path; None is the input embeddings."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ResidualMethod(MethodConfig):
    """A method in the residual stream, with parameters of its own after each sub-layer that it names."""

    @property
    @abstractmethod
    def sublayers(self) -> tuple[str, ...]:
        """Which of ``"attention"``, ``"cross_attention"`` and ``"mlp"`` get a bottleneck."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The indices of the blocks that get bottlenecks (from 0, through the whole model); None is all of them."""
        return None

    @property
    def dropout(self) -> float:
        """Probability of zeroing an output of the bottleneck in training."""
        return 0.0

    @abstractmethod
    def shapes(self, site: ResidualSite) -> Shapes:
        """Names and shapes of the parameters trained at one site."""

    @abstractmethod
    def init(self, site: ResidualSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU."""

    @abstractmethod
    def lower(self, site: ResidualSite, params: Params) -> ResidualDelta:
        """The record that these parameters mean at this site."""

    def disk_names(self, site: ResidualSite) -> dict[str, str]:
        """For each parameter, what follows the site's name in its key in ``adapter_model.safetensors``."""
        return {name: name for name in self.shapes(site)}


@dataclass(frozen=True, kw_only=True)
class VirtualTokenMethod(MethodConfig):
    """What prefix and prompt methods share: n virtual tokens in front, one set of parameters for the model.

    A network may make the tokens in training; a plain save holds what it makes. ``inference_mode`` says, as in PEFT,
    that the network is gone and what it made is trained or used as it is.
    ``token_dim``, ``num_attention_heads``, ``num_layers``, ``num_transformer_submodules`` describe the base model and
    are filled in when the config is attached.
    """

    usual_learning_rate: ClassVar[float] = 1e-2

    num_virtual_tokens: int
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    num_transformer_submodules: int | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                found.append(f"{name}={value!r} must be a whole number of at least 1")
        if self.num_transformer_submodules not in (None, 1, 2):
            found.append(f"num_transformer_submodules={self.num_transformer_submodules!r} must be None, 1 or 2")
        return found

    @property
    def is_prompt_learning(self) -> bool:
        return True

    @property
    def has_network(self) -> bool:
        """Whether a network makes the virtual tokens."""
        return False

    def plain(self: C) -> C:
        """The config that trains what a plain save holds, directly."""
        return replace(self, inference_mode=True)

    @abstractmethod
    def disk_names(self) -> dict[str, str]:
        """For each parameter its key on disk; those of a network are kept only where training is to be resumed."""


@dataclass(frozen=True, kw_only=True)
class PrefixMethod(VirtualTokenMethod):
    """A method on the keys and values of all attention layers."""

    @abstractmethod
    def for_model(self: C, sites: Sequence[AttentionSite]) -> C:
        """The config with the base model's numbers filled in."""

    @abstractmethod
    def shapes(self, sites: Sequence[AttentionSite]) -> Shapes:
        """Names and shapes of the parameters trained, for the whole model."""

    @abstractmethod
    def init(self, sites: Sequence[AttentionSite], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU."""

    @abstractmethod
    def lower(self, sites: Sequence[AttentionSite], params: Params) -> tuple[PrefixDelta, ...]:
        """One record for each site, in the order given."""

    @abstractmethod
    def lower_one(self, sites: Sequence[AttentionSite], params: Params, index: int) -> PrefixDelta:
        """One of the records alone, for a layer that is computed again in the backward pass."""

    @abstractmethod
    def stored(self, sites: Sequence[AttentionSite], params: Params) -> dict[str, Tensor]:
        """What a plain save holds, by its key on disk."""


@dataclass(frozen=True, kw_only=True)
class PromptMethod(VirtualTokenMethod):
    """A method on the input embeddings.

    ``keep_virtual_logits``: whether logits and hidden states come back with the virtual positions in front, as from
    PEFT.
    """

    keep_virtual_logits: bool = field(default=False, metadata={"on_disk": False})

    @property
    def n_rows(self) -> int:
        """Rows on disk: PEFT keeps a second set for the decoder of an encoder-decoder model, which nothing reads."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def start_text(self) -> str | None:
        """The text whose embeddings are the start, if any."""
        return None

    def disk_names(self) -> dict[str, str]:
        """For each parameter its key on disk."""
        return {"prompt_embeddings": "prompt_embeddings"}

    @abstractmethod
    def shapes(self, site: InputSite) -> Shapes:
        """Names and shapes of the parameters trained."""

    @abstractmethod
    def init(self, site: InputSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Start values in float32 on the CPU."""

    @abstractmethod
    def lower(self, site: InputSite, params: Params) -> PromptDelta:
        """The record that these parameters mean."""

    @abstractmethod
    def stored(self, site: InputSite, params: Params) -> dict[str, Tensor]:
        """What a plain save holds, by its key on disk."""
