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


def load(model: str, adapter: Path | None = None, *, four_bit: bool = False, dtype: str = "auto") -> Loaded:
    """The model and tokenizer that the arguments name, with the adapter active.

    The tokenizer is the base's, or, where it has more tokens, the adapter's, to which the base is resized. Raises the
    errors of `load_model`, and FormatError where the adapter does not fit.
    """
    from transformers import AutoTokenizer

    from veneer.adapters.auto import TOKENIZER_CONFIG, make_room_for
    from veneer.store.source import load_model, load_tokenizer

    base, adapter = split(model, adapter)
    with quiet():
        tokenizer = load_tokenizer(base)
        loaded = load_model(base, dtype=dtype, quantization=_nf4() if four_bit else None)
        if dtype == "auto" and not four_bit:
            _tell_of_float32(loaded)
        if adapter is None:
            return Loaded(loaded, tokenizer)
        if (adapter / TOKENIZER_CONFIG).is_file():
            tokenizer = max(tokenizer, AutoTokenizer.from_pretrained(adapter), key=len)
            make_room_for(tokenizer, loaded)
        return Loaded(with_adapter(loaded, adapter, base), tokenizer)


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


def sampling(temperature: float, top_p: float, top_k: int, max_new_tokens: int) -> dict[str, Any]:
    """The options as `generate` takes them. A checkpoint's own beams are left out: answers appear word by word."""
    from veneer.evaluate.scoring import greedy

    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, **greedy()}
    chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "num_beams": 1}
    return {"do_sample": True, "max_new_tokens": max_new_tokens, **chosen}


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


def with_adapter(model: Any, adapter: Path, base: str) -> Any:
    """The model with the adapter active.

    Raises ConfigError where there is none, FormatError where it is damaged or does not fit.
    """
    from veneer.adapters.peft_model import PeftModel
    from veneer.store.adapter.config import read_config
    from veneer.store.adapter.files import read_headers

    if not adapter.is_dir():
        raise ConfigError(f"no adapter {str(adapter)!r}: there is no such folder")
    read_config(adapter)  # what is wrong with the adapter itself is no misfit
    read_headers(adapter)
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (FormatError, TargetError) as error:
        raise FormatError(f"the adapter {adapter} does not fit the model {base}: {error}") from error


def _nf4() -> Any:
    import torch

    import veneer

    return veneer.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
