"""GGUF files as models: checked, and described once in a folder of the cache, or converted into a dense copy."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer

from veneer.disk.atomic import write_atomically
from veneer.disk.cache import cache_dir
from veneer.disk.digest import sha256_of
from veneer.disk.folder import build_once
from veneer.disk.known_name import CONVERTED, MANIFEST
from veneer.errors import FormatError
from veneer.ops.ggml import dequantize_ggml
from veneer.plain.progress import progress_bar
from veneer.plain.units import size
from veneer.store.bars import without_bars
from veneer.store.gguf.blocks import describe_into, model_without_storage
from veneer.store.gguf.byte_level import byte_level_tokenizer
from veneer.store.gguf.config import GgufContents, mended_config, unplaced_tensors
from veneer.store.gguf.fields import FACTOR_TENSORS, HEADS_KEPT
from veneer.store.gguf.header import GgufHeader, own_pairs, read_header
from veneer.store.gguf.in_place import why_not_in_blocks
from veneer.store.gguf.reader import open_gguf
from veneer.store.gguf.rebuilt import rebuilt_config, rebuilt_model
from veneer.store.gguf.registry import laid_out_family, rebuilt_family
from veneer.store.gguf.rows import stored_rows

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONVERSION = 3
"""Goes up when files are converted in another way: folders of an earlier one are left alone."""
OnProgress = Callable[[int, int], None]
log = logging.getLogger(__name__)
_COUNT = re.compile(r"\b(\d+)/(\d+) \[")
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id",
    "unk_token_id": "unknown_token_id",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """Facts in the header of a GGUF file. ``values`` are those of all keys, the vocabulary's included.

    ``dtype`` is that of the matrices if nothing is quantized, and bfloat16 otherwise. ``token_ids`` are the ids of the
    special tokens by transformers' names.
    """

    values: Mapping[str, Any]
    contents: GgufContents
    dtype: torch.dtype
    token_ids: Mapping[str, int]
    has_tokenizer: bool
    pre_tokenizer: str | None


def read_facts(path: Path) -> GgufFacts:
    """Return the facts of a GGUF file.

    Raises FormatError if the file is not GGUF, is truncated, or holds an adapter instead of a model.
    """
    header = read_header(path, whole=True)
    values = header.values
    if values.get("general.type") == "adapter":
        raise FormatError(
            f"{path} holds an adapter: veneer reads GGUF files of whole models. Run it in llama.cpp: llama-server "
            f"-m base.gguf --lora {path.name}."
        )
    architecture = values.get("general.architecture")
    if architecture is None:
        raise FormatError(
            f"{path} names no architecture (general.architecture): veneer reads GGUF files of whole models. Convert "
            "the model again"
        )
    ids = {name: values.get(f"tokenizer.ggml.{field}") for name, field in _TOKEN_IDS.items()}
    return GgufFacts(
        values=values,
        contents=_contents(path, header, architecture),
        dtype=_dtype({tensor.type for tensor in header.tensors}),
        token_ids={name: value for name, value in ids.items() if value is not None},
        has_tokenizer="tokenizer.ggml.tokens" in values,
        pre_tokenizer=values.get("tokenizer.ggml.pre"),
    )


def header_config(path: Path) -> Any:
    """Return the config of a GGUF file's model after conversion, from the header alone. No weight is read.

    Raises FormatError as `convert_gguf` does, except for missing tensors.
    """
    return _config_of(path, read_facts(path))


def _config_of(path: Path, facts: GgufFacts) -> Any:
    model = None
    with _refusals_told(path, facts):
        config = _own_config(path, facts)
        if not _is_rebuilt(facts):
            model = model_without_storage(config)
    if model is not None:
        _require_placed(model, path, facts)
    config.dtype = facts.dtype
    _forget_file(config)
    return config


def folder_of_file(path: Path) -> Path:
    """Return the cached folder of a GGUF file, made if needed. A changed file has another folder.

    The folder describes the file, whose weights stay where they are. It holds a dense copy of them if nothing is
    quantized, or if the file's blocks cannot be used in place. Its ``veneer.json`` holds the file's portable name.
    """
    reason = why_not_in_blocks(path)
    if reason:
        log.warning("%s is decoded into a dense copy in the cache: %s", path.name, reason)
    if reason is None:
        return _cached(path, "blocks", lambda folder: describe_gguf(path, folder))
    return converted_folder(path)


def converted_folder(path: Path) -> Path:
    """Return the cached folder of a GGUF file's dense copy, converted if needed."""
    return _cached(path, "", lambda folder: _convert_shown(path, folder))


def _cached(path: Path, form: str, build: Callable[[Path], None]) -> Path:
    stat = path.stat()
    identity = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}\n{CONVERSION}{form}"
    name = f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    folder = build_once(
        cache_dir() / CONVERTED / name,
        Path.is_dir,
        build,
        on_wait=lambda: print(f"waiting for another process, which converts {path.name}", file=sys.stderr),
    )
    if not (folder / MANIFEST).is_file():
        manifest = {"name": f"{path.name}@sha256:{sha256_of(path)}", "conversion": CONVERSION}
        write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return folder


def _convert_shown(path: Path, folder: Path) -> None:
    title = f"converting {path.name}"
    with progress_bar(title, opens_with=f"{title} ({size(path.stat().st_size)}) into the cache, once") as on_progress:
        convert_gguf(path, folder, on_progress)


def convert_gguf(path: Path, folder: Path, on_progress: OnProgress = lambda done, total: None) -> None:
    """Write the model of a GGUF file, its tokenizer and chat template into ``folder``, as transformers would.

    ``on_progress`` receives the number of tensors read, and of all. Raises FormatError for damaged files, unsupported
    families, missing tensors, and files whose model cannot be computed exactly.
    """
    facts = read_facts(path)
    with _counted_progress(on_progress):
        model = _load(path, facts, on_progress)
        model.save_pretrained(folder)
        if facts.has_tokenizer:
            _tokenizer(path, facts, model.config).save_pretrained(folder)


def describe_gguf(path: Path, folder: Path) -> None:
    """Describe a GGUF file in ``folder``, so that its model can be used in place: config, tokenizer, and where tensors
    lie.

    Raises FormatError as `convert_gguf` does.
    """
    facts = read_facts(path)
    config = _config_of(path, facts)
    describe_into(folder, path, config, facts.dtype)
    if facts.has_tokenizer:
        _tokenizer(path, facts, config).save_pretrained(folder)


def _load(path: Path, facts: GgufFacts, on_progress: OnProgress) -> Any:
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x the default keeps blocks packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    file = str(path.resolve())
    if _is_rebuilt(facts):
        return _rebuilt(path, facts, on_progress)
    with _refusals_told(path, facts):
        config = _own_config(path, facts)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=file, config=config, dtype=facts.dtype, output_loading_info=True, **options
        )
    if report["missing_keys"]:
        raise FormatError(
            f"{path} lacks the tensors of {sorted(report['missing_keys'])}: it is not a whole model. Fetch it again"
        )
    _require_placed(model, path, facts)
    _forget_file(model.config)
    return model


@contextmanager
def _refusals_told(path: Path, facts: GgufFacts) -> Iterator[None]:
    """Turn errors of transformers' reader within the context into a FormatError that names the file."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}. Take the model's own folder of safetensors instead") from error
    except (ValueError, KeyError, RuntimeError, NotImplementedError, StrictDataclassError) as error:
        raise FormatError(
            f"{path} holds a model of the family {facts.contents.architecture!r} that transformers "
            f"{transformers.__version__} cannot read: {error}. Take the model's own folder of safetensors instead"
        ) from error


def _forget_file(config: Any) -> None:
    """Remove a config's references to its source file."""
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(leftover, None)


def _require_placed(model: Any, path: Path, facts: GgufFacts) -> None:
    if unplaced := unplaced_tensors(model, facts.contents):
        raise FormatError(
            f"{path} holds the tensors {unplaced}, for which transformers' {type(model).__name__} has no place: it "
            "would compute another model. Take the model's own folder of safetensors instead"
        )


def _is_rebuilt(facts: GgufFacts) -> bool:
    """Return True for files that transformers cannot read, or reads wrongly.

    For example, transformers leaves a Llama's q and k in ggml's row order if the file lacks the number of key-value
    heads.
    """
    architecture, pairs = facts.contents.architecture, facts.contents.pairs
    if rebuilt_family(architecture, pairs) is not None:
        return True
    family = laid_out_family(architecture, pairs)
    return family is not None and HEADS_KEPT not in pairs and HEADS_KEPT in {entry.key for entry in family.fields}


def _rebuilt(path: Path, facts: GgufFacts, on_progress: OnProgress) -> Any:
    try:
        return rebuilt_model(open_gguf(path), facts.contents, facts.token_ids, facts.dtype, on_progress)
    except (FormatError, StrictDataclassError) as error:
        raise FormatError(f"{path}: {error}. Take the model's own folder of safetensors instead") from error


def _own_config(path: Path, facts: GgufFacts) -> Any:
    """Return the config of the file's model: from its family's table, or as transformers reads the file."""
    if laid_out_family(facts.contents.architecture, facts.contents.pairs) is not None:
        return rebuilt_config(facts.contents, facts.token_ids)[1]
    config = AutoConfig.from_pretrained(path.parent, gguf_file=str(path.resolve()))
    for name, value in facts.token_ids.items():
        setattr(config, name, value)
    return mended_config(config, facts.contents)


def _tokenizer(path: Path, facts: GgufFacts, config: Any) -> Any:
    tokenizer = byte_level_tokenizer(facts.values)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=str(path.resolve()))
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return tokenizer


def _contents(path: Path, header: GgufHeader, architecture: str) -> GgufContents:
    return GgufContents(
        architecture=architecture,
        pairs=own_pairs(header.values, architecture),
        shapes={tensor.name: tensor.shape for tensor in header.tensors},
        factors={
            tensor.name: dequantize_ggml(stored_rows(tensor, path).read(), tensor.type).reshape(-1)
            for tensor in header.tensors
            if tensor.name in FACTOR_TENSORS
        },
    )


def _dtype(stored: set[str]) -> torch.dtype:
    if not stored <= set(_PLAIN):
        return torch.bfloat16
    half = {_PLAIN[kind] for kind in stored} - {torch.float32}  # norms are float32 beside half-precision matrices
    return half.pop() if len(half) == 1 else torch.bfloat16 if half else torch.float32


@contextmanager
def _counted_progress(on_progress: OnProgress) -> Iterator[None]:
    """Report the progress of transformers' reader while the context is open.

    Hide the reader's own bar, which no setting turns off.
    """
    with without_bars(), redirect_stderr(_Counted(on_progress)):
        yield


class _Counted(StringIO):
    """Stream that reads a tqdm bar (``…: 9%|▉ | 24/272 [00:01<…``) and reports its two numbers."""

    def __init__(self, on_progress: OnProgress) -> None:
        super().__init__()
        self._on_progress = on_progress

    def write(self, text: str) -> int:
        for done, total in _COUNT.findall(text):
            self._on_progress(int(done), int(total))
        return len(text)
