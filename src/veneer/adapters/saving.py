"""Writing the adapters of a model: into folders, and to the Hugging Face hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor, nn

from veneer.adapters.card import write_card
from veneer.adapters.merging import require_known
from veneer.contract.file import WEIGHTS_FILE
from veneer.contract.source import from_keywords
from veneer.disk.atomic import write_atomically
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import ConfigError, FormatError
from veneer.model.adapted.state import AdapterState
from veneer.store.adapter.files import NETWORK_FILE, read_tensors
from veneer.store.adapter.tensors import SaveEmbeddings, adapter_tensors, has_network, save_adapter, save_network

_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
_TRAINER_FILE = "model.safetensors"
_JOINT = "::"  # in no adapter's name

# Arguments of transformers and PEFT that ask for what is so anyway: one safetensors file in PEFT's format, and starts
# from the weight written as plain LoRA.
AS_IT_IS = (
    *("max_shard_size", "variant", "save_peft_format", "save_original_format", "distributed_checkpoint"),
    *("save_function", "path_initial_model_for_weight_conversion"),
)


@dataclass(frozen=True)
class Selection:
    """Choices of a save: the adapters, whole embeddings or not, replacement values, and extra tags.

    ``state_dict`` replaces the model's own values. ``tags`` are added to the model card's.
    """

    names: tuple[str, ...]
    save_embedding_layers: SaveEmbeddings = "auto"
    state_dict: Mapping[str, Tensor] | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Options of an upload, under the hub's names."""

    commit_message: str = "Upload adapter"
    commit_description: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False


def upload_of(values: Mapping[str, Any]) -> Upload:
    """Return an `Upload` from keyword arguments. Raises ConfigError that lists the unknown and the allowed ones."""
    return from_keywords(Upload, values, AS_IT_IS)


def require_safetensors(safe_serialization: bool) -> None:
    """Raise ConfigError if a pickle is requested."""
    if not safe_serialization:
        raise ConfigError(
            "safe_serialization=False asks for a pickle; adapters are written as safetensors only. Leave it out"
        )


def save(model: nn.Module, state: AdapterState, folder: Path, what: Selection) -> None:
    """Write each adapter and a model card. Raises AdapterNameError and FormatError."""
    if folder.is_file():
        raise FormatError(f"{folder} is a file: give the folder to save into")
    require_known(state, what.names)
    for name in what.names:
        tensors = adapter_tensors(model, state, name, what.save_embedding_layers, what.state_dict)
        save_adapter(model, state, name, subfolder(folder, name), tensors)
    of_base = getattr(model, "model_tags", None) or ()
    write_card(folder, state.configs[what.names[0]], (*what.tags, *of_base))
    if _TRAINER_CHECKPOINT.fullmatch(folder.name):
        _keep_for_training(model, state, folder, what.names)


def subfolder(folder: Path, name: str) -> Path:
    """Return the folder for an adapter of this name: ``folder`` itself for ``default``."""
    return folder if name == "default" else folder / name


def upload(folder: Path, repo_id: str, how: Upload) -> str:
    """Upload a folder to a model repository, which is created if there is none. Return the commit's URL."""
    api = HfApi(token=how.token)
    repo = api.create_repo(repo_id, private=how.private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=how.commit_message,
        commit_description=how.commit_description,
        revision=how.revision,
        create_pr=how.create_pr,
    )
    return str(commit)


def push(model: nn.Module, state: AdapterState, repo_id: str, what: Selection, how: Upload) -> str:
    """Save the adapters into a temporary folder and upload it. Return the commit's URL."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, state, Path(folder), what)
        return upload(Path(folder), repo_id, how)


def _keep_for_training(model: nn.Module, state: AdapterState, folder: Path, names: tuple[str, ...]) -> None:
    """Write the further files that a Trainer needs to resume from its checkpoint."""
    for name in names:
        if has_network(state, name):
            save_network(model, state, name, subfolder(folder, name))
    files = {
        name: subfolder(folder, name) / (NETWORK_FILE if has_network(state, name) else WEIGHTS_FILE) for name in names
    }
    if len(files) == 1:
        _let_trainer_find(folder, files[names[0]])
    else:
        parts = {name: read_tensors(file.parent, file.name) for name, file in files.items()}
        write_atomically(folder / _TRAINER_FILE, tensors_to_bytes(joined(parts)))


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several adapters in one mapping, with each key prefixed by its adapter's name."""
    return {f"{name}{_JOINT}{key}": value for name, tensors in parts.items() for key, value in tensors.items()}


def divided(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split the result of `joined` into the adapters' tensors, by name. Return an empty dict if the keys have no
    adapter prefix.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, joint, rest = key.partition(_JOINT)
        if not joint:
            return {}
        parts.setdefault(name, {})[rest] = value
    return parts


def _let_trainer_find(folder: Path, source: Path) -> None:
    """Give the adapter's file in a Trainer checkpoint a second name: that of a model's file.

    transformers' Trainer resumes, and loads the best checkpoint, from ``model.safetensors`` through
    ``model.load_state_dict``, which here knows an adapter's keys. The second name is a hard link and takes no space.
    """
    target = folder / _TRAINER_FILE
    temporary = folder / f".{_TRAINER_FILE}.link"
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:  # a file system without hard links: a copy
        write_atomically(target, source.read_bytes())
