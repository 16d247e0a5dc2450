"""Loading shared by several verbs: a model with its adapter and tokenizer, as the arguments name them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.errors import ConfigError, FormatError, TargetError

_MODEL = typer.Argument(
    metavar="MODEL",
    show_default=False,
    help="A folder, a .gguf file, a fetched name, a hub id, or the folder of an adapter (its base is loaded too).",
)
Model = Annotated[str, _MODEL]
MaybeModel = Annotated[str | None, _MODEL]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", "-a", metavar="FOLDER", show_default=False, help="An adapter to put on it.")
]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Keep the base in NF4 with double quantization.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", show_default=False, help="A system message.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(metavar="X", min=0.0, help="0 takes the likeliest token every time.")]
TopP = Annotated[
    float, typer.Option(metavar="X", min=0.0, max=1.0, help="Sample from the likeliest tokens of this total mass.")
]
TopK = Annotated[int, typer.Option(metavar="N", min=0, help="Sample from this many likeliest tokens; 0 for all.")]
Seed = Annotated[int | None, typer.Option(metavar="N", show_default=False, help="Makes sampling repeatable.")]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a model that is to answer: a base as ``source`` names it, its tokenizer, and an adapter for it.

    ``takes_any_dtype``: nobody chose a precision.
    """

    base: Any
    tokenizer: Any
    source: str
    adapter: Path | None = None
    takes_any_dtype: bool = False

    def joined(self) -> Loaded:
        """The base with the adapter active on it. Raises as `with_adapter`."""
        if self.takes_any_dtype:
            _tell_of_float32(self.base)
        if self.adapter is None:
            return Loaded(self.base, self.tokenizer)
        return Loaded(with_adapter(self.base, self.adapter, self.source), self.tokenizer)


def load_parts(model: str, adapter: Path | None = None, *, four_bit: bool = False, dtype: str = "auto") -> Parts:
    """The base, its tokenizer and the adapter that the arguments name.

    The tokenizer is the base's, or, where it has more tokens, the adapter's, to which the base is resized. Raises the
    errors of `load_model`, and those of `require_adapter`.
    """
    from transformers import AutoTokenizer

    from veneer.adapters.auto import TOKENIZER_CONFIG, make_room_for
    from veneer.store.source import load_model, load_tokenizer

    source, adapter = split(model, adapter)
    with quiet():
        tokenizer = load_tokenizer(source)
        base = load_model(source, dtype=dtype, quantization=_nf4() if four_bit else None)
        if adapter is not None:
            require_adapter(adapter)
            if (adapter / TOKENIZER_CONFIG).is_file():
                tokenizer = max(tokenizer, AutoTokenizer.from_pretrained(adapter), key=len)
                make_room_for(tokenizer, base)
    any_dtype = dtype == "auto" and not four_bit
    return Parts(base=base, tokenizer=tokenizer, source=source, adapter=adapter, takes_any_dtype=any_dtype)


def load(model: str, adapter: Path | None = None, *, four_bit: bool = False, dtype: str = "auto") -> Loaded:
    """`load_parts`, joined."""
    with quiet():
        return load_parts(model, adapter, four_bit=four_bit, dtype=dtype).joined()


def _tell_of_float32(model: Any) -> None:
    """Say on stderr that float32 would be faster, where the CPU lacks products in the dtype that nobody chose."""
    from veneer.ops.matmul import NARROW, float32_is_faster

    if model.dtype in NARROW and model.device.type == "cpu" and float32_is_faster():
        typer.echo("note: this CPU is faster with --dtype float32, which takes twice the memory", err=True)


def split(model: str, adapter: Path | None) -> tuple[str, Path | None]:
    """The base and the adapter that are meant: MODEL may itself be an adapter, which names its base."""
    from veneer.contract.file import CONFIG_FILE
    from veneer.store.adapter.config import read_config

    folder = Path(model).expanduser()
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return model, adapter
    if adapter is not None:
        raise ConfigError(f"MODEL {model} is an adapter and --adapter {adapter} another: give the base as MODEL")
    base = read_config(folder).base_model_name_or_path
    if not base:
        raise ConfigError(
            f"the adapter {model} does not name its base: give the base as MODEL and {model} as --adapter"
        )
    return base, folder


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    from veneer.store.bars import without_bars

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(level)


def require_adapter(adapter: Path) -> None:
    """Raise ConfigError where there is no such adapter, FormatError where it is damaged in itself."""
    from veneer.store.adapter.config import read_config
    from veneer.store.adapter.files import read_headers

    if not adapter.is_dir():
        raise ConfigError(f"no adapter {str(adapter)!r}: there is no such folder")
    read_config(adapter)
    read_headers(adapter)


@contextmanager
def fitting(adapter: Path, base: str) -> Iterator[None]:
    """Inside the block what is wrong with the adapter, which is sound in itself, is that it does not fit the base."""
    try:
        yield
    except (FormatError, TargetError) as error:
        raise FormatError(f"the adapter {adapter} does not fit the model {base}: {error}") from error


def with_adapter(model: Any, adapter: Path, base: str) -> Any:
    """The model with the adapter active. Raises as `require_adapter`, and FormatError where it does not fit."""
    from veneer.adapters.peft_model import PeftModel

    require_adapter(adapter)
    with fitting(adapter, base):
        return PeftModel.from_pretrained(model, adapter)


def _nf4() -> Any:
    import torch

    import veneer

    return veneer.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
