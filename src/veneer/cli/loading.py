"""Loading shared by several verbs: a model with its adapter and tokenizer, as the arguments name them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.errors import ConfigError, FormatError, TargetError
from veneer.plan.presets import require_weights

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
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter", "-a", metavar="FOLDER", show_default=False, help="An adapter to put on it; may be given again."
    ),
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
    """A model that is ready to answer. ``names``: what the adapters on it are called there, by their folders."""

    model: Any
    tokenizer: Any
    names: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a model that is to answer: a base as ``source`` names it, its tokenizer, and adapters for it.

    ``takes_any_dtype``: nobody chose a precision.
    """

    base: Any
    tokenizer: Any
    source: str
    adapters: tuple[Path, ...] = ()
    takes_any_dtype: bool = False

    @property
    def adapter(self) -> Path | None:
        """The first adapter, which acts where nobody names one."""
        return next(iter(self.adapters), None)

    def joined(self) -> Loaded:
        """The base with all adapters on it, of which the first is active. Raises as `with_adapters`."""
        if self.takes_any_dtype:
            _tell_of_float32(self.base)
        names = {folder: f"adapter{number}" for number, folder in enumerate(self.adapters)}
        model = with_adapters(self.base, names, self.source) if names else self.base
        return Loaded(model, self.tokenizer, names)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The model and adapters that a command names, looked at from outside: no weight of the base is loaded yet."""

    source: str
    adapters: tuple[Path, ...]
    tokenizer: Any
    four_bit: bool
    dtype: str

    def load(self) -> Parts:
        """The parts themselves. Raises the errors of `load_model`."""
        from veneer.adapters.auto import make_room_for
        from veneer.store.source import load_model

        with quiet():
            base = load_model(self.source, dtype=self.dtype, quantization=_nf4() if self.four_bit else None)
            if self.adapters:
                make_room_for(self.tokenizer, base)
        any_dtype = self.dtype == "auto" and not self.four_bit
        return Parts(
            base=base, tokenizer=self.tokenizer, source=self.source, adapters=self.adapters, takes_any_dtype=any_dtype
        )


def choose(model: str, adapters: Sequence[Path] = (), *, four_bit: bool = False, dtype: str = "auto") -> Chosen:
    """The model and adapters that a command names, checked: they exist and they fit it by shape.

    The tokenizer is the base's, or, where it has more tokens or another chat template, the adapter's. Raises
    ConfigError and FormatError as `require_weights`, `resolve` and `require_adapter` do, FormatError for an adapter of
    another model, and CompositionError for one that was merged into it.
    """
    require_weights(model)  # before torch is imported
    from veneer.store.merge_record import require_not_merged
    from veneer.store.source import load_tokenizer, parse_dtype, resolve

    parse_dtype(dtype)
    source, folders = split(model, tuple(adapters))
    for number, folder in enumerate(folders):
        require_adapter(folder)
        if folder in folders[:number]:
            raise ConfigError(f"--adapter {folder} is given twice: once is enough")
    place = resolve(source) if folders else source
    for folder in folders:
        require_not_merged(place, folder)
    with quiet():
        tokenizer = tokenizer_with(load_tokenizer(source), folders)
        require_fit(source, folders, tokenizer)
    return Chosen(source=source, adapters=folders, tokenizer=tokenizer, four_bit=four_bit, dtype=dtype)


def load_parts(model: str, adapter: Path | None = None, *, four_bit: bool = False, dtype: str = "auto") -> Parts:
    """A model and an adapter, if one is given, checked by `choose` and loaded."""
    return choose(model, adapter_list(adapter), four_bit=four_bit, dtype=dtype).load()


def load(model: str, adapter: Path | None = None, *, four_bit: bool = False, dtype: str = "auto") -> Loaded:
    """`load_parts`, joined."""
    with quiet():
        return load_parts(model, adapter, four_bit=four_bit, dtype=dtype).joined()


def adapter_list(adapter: Path | None) -> list[Path]:
    """The adapters that an option means which may be left out."""
    return [] if adapter is None else [adapter]


def _tell_of_float32(model: Any) -> None:
    """Say on stderr that float32 would be faster, where the CPU lacks products in the dtype that nobody chose."""
    from veneer.ops.matmul import NARROW, float32_is_faster

    if model.dtype in NARROW and model.device.type == "cpu" and float32_is_faster():
        typer.echo("note: this CPU is faster with --dtype float32, which takes twice the memory", err=True)


def split_one(model: str, adapter: Path | None) -> tuple[str, Path | None]:
    """`split` for commands that take one adapter."""
    base, adapters = split(model, tuple(adapter_list(adapter)))
    return base, next(iter(adapters), None)


def split(model: str, adapters: tuple[Path, ...]) -> tuple[str, tuple[Path, ...]]:
    """The base and the adapters that are meant: MODEL may itself be an adapter, which names its base."""
    from veneer.contract.file import CONFIG_FILE
    from veneer.store.adapter.config import read_config

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


def tokenizer_with(tokenizer: Any, adapters: Sequence[Path]) -> Any:
    """The base's tokenizer, or what the adapters' folders hold beside them where that has more tokens.

    An adapter that was trained with another chat template brings it along. Raises ConfigError where several adapters
    want their prompts written differently.
    """
    from transformers import AutoTokenizer

    from veneer.adapters.auto import TOKENIZER_CONFIG

    found = {}
    for folder in adapters:
        if (folder / TOKENIZER_CONFIG).is_file():
            own = AutoTokenizer.from_pretrained(folder)
            found[folder] = own if len(own) > len(tokenizer) else _with_template(tokenizer, own.chat_template)
        else:
            found[folder] = tokenizer
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


def require_fit(source: str, adapters: Sequence[Path], tokenizer: Any) -> None:
    """Raise FormatError for an adapter that does not fit, by its shapes, the model that the source's config describes.

    One that fits but was trained on other weights is told on stderr. A model on the hub is not looked at.
    """
    from transformers import AutoConfig

    from veneer.adapters.peft_model import PeftModel
    from veneer.contract import LinearMethod
    from veneer.store.adapter.config import read_config
    from veneer.store.adapter.skeleton import without_storage
    from veneer.store.source import resolve

    place = resolve(source)
    if not isinstance(place, Path):
        return
    for folder in adapters:
        config = _config_of(AutoConfig, place)
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, len(tokenizer))  # as `make_room_for` will resize it
        shape = without_storage(config, ())
        if isinstance(
            read_config(folder), LinearMethod
        ):  # others may need a pass through the model to find their places
            with fitting(folder, source):
                PeftModel.from_pretrained(shape, folder)
        trained_on = base_named_by(folder)
        if trained_on is not None and not _is_same(trained_on, place):
            typer.echo(f"note: the adapter {folder} was trained on {trained_on}, and the model is {source}", err=True)


def require_of_one_base(adapters: Sequence[Path], base: str | None) -> None:
    """Raise ConfigError and FormatError where one of these adapters is none, or they are not of one base, or not of
    ``base`` where that is given. Bases of equal shapes and other names are told on stderr. No weight is loaded.
    """
    for folder in adapters:
        require_adapter(folder)
    if base is not None:
        choose(base, list(dict.fromkeys(adapters)))
        return
    shapes: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for folder in adapters:
        for key, size in _sides(folder).items():
            other, before = shapes.setdefault(key, (folder, size))
            if before != size:
                named = [base_named_by(each) or "a base that it does not name" for each in (other, folder)]
                raise FormatError(
                    f"{other} and {folder} are adapters of two bases: {key} has {before[0]} features in {other}, which "
                    f"was trained on {named[0]}, and {size[0]} in {folder}, which was trained on {named[1]}"
                )
    bases = {name: folder for folder in reversed(adapters) if (name := base_named_by(folder)) is not None}
    if len(bases) > 1:
        told = ", ".join(f"{folder} was trained on {name}" for name, folder in reversed(bases.items()))
        typer.echo(f"note: {told}: what is said of them together holds where these are one base", err=True)


def _sides(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The features of the layers that LoRA's factors are for, by key: the side that is not the rank."""
    from veneer.store.adapter.files import read_headers

    sides = {".lora_A.weight": 1, ".lora_B.weight": 0}
    return {
        key: (tensor.shape[side],)
        for key, tensor in read_headers(adapter).items()
        for end, side in sides.items()
        if key.endswith(end) and len(tensor.shape) == 2
    }


def _config_of(auto: Any, place: Path) -> Any:
    try:
        return auto.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{place / 'config.json'} is no config of a model that can be loaded: {reason}") from error


def base_named_by(adapter: Path) -> str | None:
    """The base that an adapter's config names."""
    from veneer.store.adapter.config import read_config

    return read_config(adapter).base_model_name_or_path or None


def _is_same(named: str, place: Path) -> bool:
    """Return False where a base that an adapter names is on this machine and lies elsewhere."""
    from veneer.store.fetch import KNOWN, is_fetched, model_folder

    folder = model_folder(named) if named in KNOWN and is_fetched(named) else Path(named).expanduser()
    return not folder.is_dir() or folder.resolve() == place.resolve()


@contextmanager
def fitting(adapter: Path, base: str) -> Iterator[None]:
    """Inside the block what is wrong with the adapter, which is sound in itself, is that it does not fit the base."""
    try:
        yield
    except (FormatError, TargetError) as error:
        known = base_named_by(adapter)
        other = known is not None and Path(known).expanduser() != Path(base).expanduser()
        advice = (
            f"it was trained on {known}: give {known} as the model, or the adapter's folder alone. " if other else ""
        )
        raise FormatError(f"the adapter {adapter} does not fit the model {base}: {advice}{error}") from error


def with_adapters(model: Any, names: Mapping[Path, str], base: str) -> Any:
    """The model with adapters on it, the first active. Raises FormatError where one does not fit."""
    from veneer.adapters.peft_model import PeftModel

    first, *others = names
    with fitting(first, base):
        adapted = PeftModel.from_pretrained(model, first, names[first])
    for folder in others:
        with fitting(folder, base):
            adapted.load_adapter(folder, names[folder])
    return adapted


def _nf4() -> Any:
    import torch

    import veneer

    return veneer.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
