"""Base, adapters and tokenizer by name: checked from config and headers, then loaded, then joined."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.auto import make_room_for
from veneer.adapters.peft_model import PeftModel
from veneer.adapters.tokenizer import TOKENIZER_CONFIG, larger, read_tokenizer, template_in
from veneer.contract.file import CONFIG_FILE
from veneer.errors import ConfigError
from veneer.model.memory.default_device import default_device
from veneer.store.adapter.config import read_config
from veneer.store.adapter.fit import base_warnings, fitting, require_fit, require_undamaged
from veneer.store.bars import quiet
from veneer.store.merge_record import require_not_merged
from veneer.store.quantization import BitsAndBytesConfig
from veneer.store.source import float32_note, load_model, load_tokenizer, parse_dtype, resolve


@dataclass(frozen=True)
class LoadedModel:
    """Model that is ready to answer. ``names``: the adapter names on the model, by folder."""

    model: Any
    tokenizer: Any
    names: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Parts of a model for answering: the base, loaded from ``source``, its tokenizer, and adapters for it.

    ``takes_any_dtype``: True if the user chose no precision.
    """

    base: Any
    tokenizer: Any
    source: str
    adapters: tuple[Path, ...] = ()
    takes_any_dtype: bool = False

    @property
    def adapter(self) -> Path | None:
        """First adapter, which answers by default; None if there is none."""
        return next(iter(self.adapters), None)

    def float32_note(self, setting: str) -> str | None:
        """Return a note that a base in float32, which ``setting`` chooses, would be faster on this CPU.

        Return None if the CPU has native products in the base's dtype, or if the user chose the dtype.
        """
        return float32_note(self.base.dtype, self.base.device.type, setting) if self.takes_any_dtype else None

    def joined(self) -> LoadedModel:
        """Attach all adapters to the base, with the first active. Raises FormatError if one does not fit."""
        names = {folder: f"adapter{number}" for number, folder in enumerate(self.adapters)}
        return LoadedModel(_with_adapters(self.base, names, self.source), self.tokenizer, names)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Base and adapters that fit it by shape, before any weight of the base is loaded.

    ``warnings``: adapters that name another base.
    """

    source: str
    adapters: tuple[Path, ...]
    tokenizer: Any
    four_bit: bool
    dtype: str
    warnings: tuple[str, ...] = ()
    device: str | None = None

    def load(self, *, encodes: bool = False) -> ModelParts:
        """Load the parts, on the default device if none was chosen. Raises the errors of `load_model`.

        ``encodes``: an encoder-decoder is accepted too.
        """
        device, quantization = self.device or default_device(), _nf4() if self.four_bit else None
        with quiet():
            base = load_model(self.source, dtype=self.dtype, quantization=quantization, device=device, encodes=encodes)
            if self.adapters:
                make_room_for(self.tokenizer, base)
        any_dtype = self.dtype == "auto" and not self.four_bit
        return ModelParts(
            base=base, tokenizer=self.tokenizer, source=self.source, adapters=self.adapters, takes_any_dtype=any_dtype
        )


def choose(
    model: str,
    adapters: Sequence[Path] = (),
    *,
    four_bit: bool = False,
    dtype: str = "auto",
    device: str | None = None,
) -> Chosen:
    """Return a base and adapters by name, after checking that they exist and that their shapes fit.

    The tokenizer is the base's, or the adapter's if it has more tokens or another chat template. The shapes of a base
    on the hub are not compared.

    Raises ConfigError and FormatError as `resolve` and `require_undamaged` do. Raises FormatError for an adapter of
    another model, and CompositionError if the adapter is already merged into the base.
    """
    parse_dtype(dtype)
    source, folders = split(model, tuple(adapters))
    for number, folder in enumerate(folders):
        require_undamaged(folder)
        if folder in folders[:number]:
            raise ConfigError(f"--adapter {folder} is given twice: once is enough")
    place = resolve(source) if folders else source
    for folder in folders:
        require_not_merged(place, folder)
    with quiet():
        tokenizer = tokenizer_with(load_tokenizer(source), folders)
        if isinstance(place, Path):
            for folder in folders:
                require_fit(folder, place, len(tokenizer), source)
    warnings = tuple(base_warnings(folders, source, place))
    return Chosen(
        source=source,
        adapters=folders,
        tokenizer=tokenizer,
        four_bit=four_bit,
        dtype=dtype,
        warnings=warnings,
        device=device,
    )


def split_one(model: str, adapter: Path | None) -> tuple[str, Path | None]:
    """Return the result of `split` for at most one adapter."""
    base, adapters = split(model, () if adapter is None else (adapter,))
    return base, next(iter(adapters), None)


def split(model: str, adapters: tuple[Path, ...]) -> tuple[str, tuple[Path, ...]]:
    """Return the base and the adapters. If ``model`` is itself an adapter, its config names the base.

    Raises ConfigError if ``model`` is an adapter and ``adapters`` are given too, or if its config does not name a base.
    """
    folder = Path(model).expanduser()
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return model, adapters
    if adapters:
        raise ConfigError(f"MODEL {model} is an adapter and --adapter {adapters[0]} another: give the base as MODEL")
    base = read_config(folder).base_model_name_or_path
    if not base:
        raise ConfigError(
            f"the adapter {model} does not name its base: give the base as MODEL and {model} as --adapter"
        )
    return base, (folder,)


def tokenizer_with(tokenizer: Any, adapters: Sequence[Path]) -> Any:
    """Return the base's tokenizer, or an adapter's if it has more tokens.

    The adapters' chat template replaces the base's, also if an adapter has a template and no tokenizer. Raises
    ConfigError if the adapters differ in vocabulary size or chat template.
    """
    found = {}
    for folder in adapters:
        if (folder / TOKENIZER_CONFIG).is_file():
            own = read_tokenizer(folder)
            found[folder] = _with_template(larger(tokenizer, own), own.chat_template)
        else:
            found[folder] = _with_template(tokenizer, template_in(folder))
    ways = {(len(each), each.chat_template) for each in found.values()}
    if len(ways) > 1:
        raise ConfigError(
            f"the adapters {', '.join(map(str, found))} were trained with other tokens or another chat template than "
            "one another, so that a prompt is not the same for all: take one at a time"
        )
    return next(iter(found.values()), tokenizer)


def _with_template(tokenizer: Any, template: Any) -> Any:
    if template and template != tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def _with_adapters(model: Any, names: Mapping[Path, str], base: str) -> Any:
    """Return the model with adapters on it, the first active."""
    if not names:
        return model
    first, *others = names
    with fitting(first, base):
        adapted = PeftModel.from_pretrained(model, first, names[first])
    for folder in others:
        with fitting(folder, base):
            adapted.load_adapter(folder, names[folder])
    return adapted


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
