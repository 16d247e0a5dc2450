"""Composition of cartridges: the tokens of several, one after another, as one (Eyuboglu et al. 2025,
arXiv:2506.06266).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from veneer.contract.config import config_in
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.contract.source import adapter_folder
from veneer.disk.atomic import write_together
from veneer.disk.safetensors import tensors_to_bytes
from veneer.errors import ConfigError, listed
from veneer.methods.cartridge import STORED, CartridgeConfig
from veneer.store.adapter.files import read_headers, read_tensors

_OF_BASE = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]], *, output_path: str | os.PathLike[str]
) -> None:
    """Write a cartridge with the tokens of several cartridges, one after another. Its other settings are those of the
    first.

    ``adapter_paths`` are folders or hub ids. Raises ConfigError, with every problem, if there are fewer than two paths,
    or if an adapter is no cartridge. Raises it too if a file does not hold as many tokens as its config says, or if the
    bases differ in shape. Raises FormatError if a file is missing or damaged.
    """
    folders = [adapter_folder(path) for path in adapter_paths]
    configs = {folder: config_in(folder) for folder in folders}
    cartridges = {folder: config for folder, config in configs.items() if isinstance(config, CartridgeConfig)}
    problems = [
        f"{folder} is no cartridge, but {config.peft_type}: leave it out"
        for folder, config in configs.items()
        if folder not in cartridges
    ]
    if len(folders) < 2:
        problems.append(f"adapter_paths names {len(folders)} cartridges: give at least two")
    problems += [
        f"the cartridges differ in {name}: give those of one base"
        for name in _OF_BASE
        if len({getattr(config, name) for config in cartridges.values()}) > 1
    ]
    problems += _problems_of_files(cartridges)
    if problems:
        raise ConfigError(listed(problems))
    tokens = torch.cat([read_tensors(folder)[STORED] for folder in folders])
    whole = replace(cartridges[folders[0]], num_virtual_tokens=len(tokens))
    files = {WEIGHTS_FILE: tensors_to_bytes({STORED: tokens}), CONFIG_FILE: whole.to_json().encode()}
    write_together(Path(output_path), files)


def _problems_of_files(cartridges: Mapping[Path, CartridgeConfig]) -> list[str]:
    """Return a problem for each file whose number of tokens differs from its config, and one problem if the files'
    widths differ.
    """
    found, widths = [], set()
    for folder, config in cartridges.items():
        stored, n = read_headers(folder).get(STORED), config.num_virtual_tokens
        if stored is None or len(stored.shape) != 2:
            found.append(f"{folder} holds no matrix {STORED}: save it again")
            continue
        if stored.shape[0] != n:
            found.append(f"{folder} holds {stored.shape[0]} tokens, and its config tells of {n}: save it again")
        widths.add(stored.shape[1])
    if len(widths) > 1:
        found.append(f"the cartridges differ in width {sorted(widths)}: give those of one base")
    return found
