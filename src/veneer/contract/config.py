"""Base of every adapter config: fields in PEFT's names, checked once, never changed."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from veneer.contract.discovery import concrete
from veneer.contract.extras import Extras
from veneer.contract.file import CONFIG_FILE, problems_of, read_fields, read_values, text_of
from veneer.contract.known import Known
from veneer.contract.late_start import LateStart
from veneer.contract.packing import Packing
from veneer.contract.parameters import Params, Record, Shapes
from veneer.contract.peft_fields import PeftFields
from veneer.contract.places import Placed, ShapesByKey
from veneer.contract.shared import Shared
from veneer.contract.source import adapter_folder, hub_options
from veneer.contract.training import Training
from veneer.disk.atomic import write_atomically
from veneer.disk.known_name import known_name
from veneer.errors import ConfigError, FormatError, listed
from veneer.plain.field_types import check
from veneer.plain.frozen_config import FrozenConfig
from veneer.plain.tasks import TaskType
from veneer.records.sites import Site


@dataclass(frozen=True, kw_only=True)
class MethodConfig(FrozenConfig):
    """Protocol of a method, and the fields of every adapter config in PEFT's names.

    A *site* is the place that a method changes: a linear layer, a sub-layer, all attention layers of a model, or its
    input. All methods have the same functions, so that no caller asks of which kind a method is. ``peft_type`` names
    the format on disk. ``modules_to_save`` are modules trained completely and saved with the adapter.
    Values are checked against the types of the fields, see `plain.field_types`. Lists and sets become tuples (sets
    sorted) and mappings are copied, so that a config is immutable.
    ``inert`` names fields that do not change what the tensors of an adapter mean. They act in training alone, or follow
    from the keys and shapes of the tensors. Those of base classes count too; every other field changes the meaning.
    ``headline`` names the most informative fields: model cards and ``veneer info`` always show them.
    """

    peft_type: ClassVar[str]
    changes_weights: ClassVar[bool] = False  # its records are updates of weights, which a merge folds into them
    identity_at_start: ClassVar[bool] = True
    usual_learning_rate: ClassVar[float] = 2e-4  # of AdamW, where a recipe gives none
    usual_fields: ClassVar[Mapping[str, object]] = {}  # of a recipe that does not give them
    peft_fields: ClassVar[PeftFields] = PeftFields()
    inert: ClassVar[frozenset[str]] = frozenset(
        {"task_type", "base_model_name_or_path", "revision", "inference_mode", "modules_to_save"}
    )
    headline: ClassVar[tuple[str, ...]] = ()

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    modules_to_save: Collection[str] | None = None

    def __post_init__(self) -> None:
        check(self, lambda: self.problems())

    def problems(self) -> list[str]:
        """Return the problems of values that have the right types, one sentence each. Subclasses extend the list."""
        tasks = [task.value for task in TaskType]
        return [] if self.task_type in (None, *tasks) else [f"task_type={self.task_type!r} must be one of {tasks}"]

    @abstractmethod
    def shapes(self, site: Any) -> Shapes:
        """Return the names and shapes of the parameters trained at one site."""

    @abstractmethod
    def init(self, site: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return initial values in float32 on the CPU, drawn from ``generator``."""

    @abstractmethod
    def lower(self, site: Any, params: Params) -> Record:
        """Return the record (the change as data, which forward passes and merging use) of these parameters at this
        site.
        """

    def init_together(self, sites: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Params]:
        """Return the initial values at all sites, by path, if the values of one site depend on the weights of others.

        Otherwise return an empty dict, and ``init`` returns the values. A method with such values must return True for
        `reads_weight`.
        """
        return {}

    def derived(self, site: Any, params: Params) -> dict[str, Tensor]:
        """Return tensors that are computed from a site's weight and fixed parameters. They are kept, but never trained
        or saved.

        A method with such tensors must return True for `reads_weight`. Its ``lower`` finds them in ``params``, or
        computes them.
        """
        return {}

    def disk_names(self, site: Any) -> Mapping[str, str]:
        """Return, for each parameter, the end of its key in ``adapter_model.safetensors``: the part after the module
        path.
        """
        return {name: name for name in self.shapes(site)}

    @property
    def dropout(self) -> float:
        """Probability, in training, that an input of a weight's update (or an output of a bottleneck) is set to
        zero.
        """
        return 0.0

    def written_key(self, key: str) -> str:
        """Return the key under which this method's file stores a tensor, given the tensor's key in the files of all
        other methods.

        The keys differ for parts of the base, because PEFT names them otherwise if a method trains nothing else.
        `keys.usual_key` is the inverse.
        """
        return key

    def for_sites(self, sites: Sequence[Any], known: Known) -> Self:
        """Fill in the fields of the config that depend on all of its sites, which are described by their shapes."""
        return self

    @property
    def samples(self) -> tuple[Site, ...]:
        """Example sites without sizes, one for each kind of module that a file of this method may contain."""
        return ()

    def site_of(self, site: Any, shapes: ShapesByKey) -> Any:
        """Return ``site``, whose name and kind are known, with sizes inferred from the shapes of its parameters.

        Return None if the shapes do not determine all sizes.
        """
        return None

    @abstractmethod
    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        """Return the sites of a saved adapter by path, read from its file, or None if the file does not determine all
        sizes.

        ``shapes`` are those of the file's tensors by key, and ``source`` is the file's name in errors. Layers with a
        missing parameter are left out. Raises FormatError if a parameter has a shape that no layer gives it, or if the
        number of layers differs from the config's.
        """

    @property
    def late_start(self) -> LateStart | None:
        """Low-rank factors that may be initialized again on the model (see `LateStart`), or None."""
        return None

    @property
    def reads_weight(self) -> bool:
        """Return True if ``lower`` needs the frozen weight of the site; False if the weight's shape suffices."""
        return False

    @property
    def largest_rank(self) -> int:
        """Largest rank of an update, from the config as written; 0 for a method that has none."""
        return 0

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens that the method adds before the sequence."""
        return 0

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """Token ids from whose last occurrence in a sequence the adapter acts; empty if it acts everywhere."""
        return ()

    @property
    def n_tasks(self) -> int:
        """Number of tasks, each with its own record, or 0 if one record serves all rows."""
        return 0

    def of_task(self, params: Params, task: int) -> Params:
        """Return the parameters of one site that belong to task number ``task`` (below ``n_tasks``), as ``lower`` needs
        them.
        """
        return params

    @property
    def input_dependent(self) -> bool:
        """Return True if the update of a layer depends on its input, so that no weight can have the same effect."""
        return self.by_sequence

    @property
    def counts_layers(self) -> bool:
        """Return True if the layers of the method are counted from the top of the model."""
        return False

    @property
    def by_sequence(self) -> bool:
        """Return True if records depend on whole sequences. ``lower`` then finds in ``params``, under `MEMBERS`, which
        tokens belong to which sequence.
        """
        return False

    @property
    def draws_by_token(self) -> bool:
        """Return True if a training pass draws random numbers for each token, besides those of dropout."""
        return False

    @property
    def has_own_loss(self) -> bool:
        """Return True if the adapter replaces the model's usual loss for labels by one of its own."""
        return False

    @property
    def has_network(self) -> bool:
        """Return True if a network computes the saved tensors, as P-tuning's does.

        The network is not in a plain save. A checkpoint has it in a file of its own, so that training can resume.
        """
        return False

    @property
    def extras(self) -> Extras:
        """Parts of the base that the adapter also trains."""
        return Extras(modules=tuple(self.modules_to_save or ()))

    @property
    def packing(self) -> Packing:
        """Form in which the adapter is written to its file."""
        return Packing()

    @property
    def training(self) -> Training | None:
        """Actions of the method in a training run, if it has any besides its forward pass."""
        return None

    @property
    def shared(self) -> Shared | None:
        """Tensors that the layers share, if there are any."""
        return None

    @property
    def is_prompt_learning(self) -> bool:
        """Return True if the method adds virtual tokens before the sequence."""
        return self.virtual_tokens > 0

    def packed(self) -> Self:
        """Return the config in the form in which it is saved.

        If other libraries do not know a method, its trained adapters may be saved as another method that they know.
        """
        changed = self.packing.fields
        return replace(self, **changed) if changed else self  # type: ignore[arg-type]

    def differing(self, other: MethodConfig) -> list[str]:
        """Return the fields that differ between this config and ``other``, of the same class. Fields that do not change
        what the same tensors mean are left out.
        """
        inert = frozenset().union(*(vars(cls).get("inert", ()) for cls in type(self).__mro__))
        names = (spec.name for spec in fields(self) if spec.name not in inert)
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def told(self) -> dict[str, object]:
        """Return the settings to show to people: the ``headline``, then all fields that differ from their defaults."""
        aside = {"base_model_name_or_path", "revision", "inference_mode", *self.headline}
        others = (spec for spec in fields(self) if spec.name not in aside and spec.metadata.get("on_disk", True))
        chosen = [spec.name for spec in others if getattr(self, spec.name) != _default(spec)]
        values = {name: getattr(self, name) for name in (*self.headline, *chosen)}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, object]:
        """Return the fields by name, with ``peft_type``, in a form for logs: new lists and mappings, no tuples."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name, value in values.items():
            plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            plain = list(plain) if isinstance(plain, tuple) else plain
            values[name] = dict(plain) if isinstance(plain, Mapping) else plain
        return {"peft_type": self.peft_type, **values}

    def to_json(self, auto_mapping: Mapping[str, str] | None = None) -> str:
        """Return the text of ``adapter_config.json``. ``auto_mapping`` names the base's class if no task does."""
        on_disk = [spec.name for spec in fields(self) if spec.metadata.get("on_disk", True)]
        values: dict[str, object] = {name: getattr(self, name) for name in on_disk}
        values |= {"peft_type": self.peft_type, "auto_mapping": auto_mapping if self.task_type is None else None}
        return text_of(values, self.peft_fields)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_config.json`` into a folder, which is made if it does not exist. Raises DiskError."""
        write_atomically(Path(save_directory) / CONFIG_FILE, self.to_json().encode())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: str | bool | None
    ) -> MethodConfig:
        """Return the config of a saved adapter of any method, from a folder or a hub id.

        ``hub``: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``. Raises
        FormatError if there is no config or it is invalid.
        """
        return config_in(adapter_folder(pretrained_model_name_or_path, hub_options(hub)))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, object]:
        """Return the fields of the config in a file, as `to_dict` does. Raises FormatError if there is no config or it
        is invalid.
        """
        path = Path(path_json_file)
        return from_values(read_values(path), str(path)).to_dict()

    @classmethod
    def variants(cls) -> Mapping[str, str]:
        """Return the boolean fields that stand for a method of their own in recipes: the field's name by the method's
        name.
        """
        return {}

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return settings of papers that recipes can name like a method: the fields by that name.

        A recipe's own fields take precedence.
        """
        return {}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Return a config from the fields of an ``adapter_config.json`` that are this class's; ``peft_type`` is not
        among them.
        """
        return cls(**values)  # type: ignore[arg-type]


def _default(spec: Field[Any]) -> object:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def for_use(config: MethodConfig) -> MethodConfig:
    """Return the config that is saved with trained values: ``inference_mode`` is True, and the form is one that other
    libraries know.
    """
    return replace(config.packed(), inference_mode=True)


def config_in(folder: Path) -> MethodConfig:
    """Return the config of an adapter folder. Raises FormatError if there is no config or it is invalid.

    If the config names its base by a path into a cache, the path is replaced by the base's `known_name`.
    """
    found = from_values(read_fields(folder), str(folder / CONFIG_FILE))
    base = found.base_model_name_or_path
    return found if base is None else replace(found, base_model_name_or_path=known_name(base))


def from_values(given: Mapping[str, object], source: str) -> MethodConfig:
    """Return the config with these fields, ``peft_type`` among them. Raises FormatError with every problem."""
    values = dict(given)
    method = _method(values.pop("peft_type", None), source)
    known = {spec.name for spec in fields(method)}
    problems = problems_of(values, known, method.peft_fields)
    if problems:
        raise FormatError(listed(problems, source))
    try:
        return method.from_dict({key: value for key, value in values.items() if key in known})
    except (ConfigError, TypeError, AttributeError) as error:  # a value of a type that the checks cannot even compare
        raise FormatError(f"{source}: {error}") from error


def _method(peft_type: object, source: str) -> type[MethodConfig]:
    methods = concrete(MethodConfig)
    if not isinstance(peft_type, str) or peft_type not in methods:
        raise FormatError(f"{source}: peft_type={peft_type!r} is not a known method; known: {sorted(methods)}")
    return methods[peft_type]
