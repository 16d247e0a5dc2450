"""Source of a model: a folder, a GGUF file, the name of a fetched model, or the hub."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veneer.disk.known_name import known_name
from veneer.errors import ConfigError, FormatError, OutOfMemoryError
from veneer.model.adapted.experts import fit_experts
from veneer.model.memory.available import address_limit, no_memory
from veneer.ops import matmul
from veneer.plain.units import size
from veneer.store.bars import bars_in_terminals_alone, downloads_shown
from veneer.store.block_by_block import EachBlock, blocks_handed_on
from veneer.store.checkpoint import Checkpoint
from veneer.store.found import require_model
from veneer.store.gguf.blocks import described_file
from veneer.store.gguf.model import converted_folder, folder_of_file
from veneer.store.hub import on_hub
from veneer.store.in_blocks import load_in_blocks
from veneer.store.kinds import auto_class
from veneer.store.named import folder_of
from veneer.store.quantizer import watch_loading
from veneer.store.stored_quantization import stored_quantization

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def resolve(source: str | os.PathLike[str]) -> Path | str:
    """Return the local folder of a model, or the hub id as given.

    A GGUF file is first described in a folder of the cache, or converted into it. Later it can also be named by name
    and hash, as adapters do (``model.gguf@sha256:…``).

    Raises FormatError for folders and files that hold no model. Raises ConfigError for an unknown name, with the
    nearest known one.
    """
    name, path = os.fspath(source), Path(source).expanduser()
    require_model(path)
    if path.is_dir():
        return path
    if path.is_file():
        return folder_of_file(path)
    folder = folder_of(name)
    if folder is not None:
        return folder
    return on_hub(known_name(name))


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    quantization: Any = None,
    device: str | torch.device | None = None,
    scores: bool = False,
    encodes: bool = False,
    gguf: str = "blocks",
    each_block: EachBlock | None = None,
) -> PreTrainedModel:
    """Return the causal language model at ``source``, for evaluation. With ``scores`` its head scores each sequence.

    A score is one number; the head is new if the files hold none. ``encodes``: an encoder-decoder is accepted too.
    ``dtype`` ``"auto"`` keeps the checkpoint's. ``quantization`` is a `BitsAndBytesConfig`, not needed for a model that
    was saved quantized. The matrices of a GGUF file stay in their blocks, mapped; ``gguf="dense"`` or a
    ``quantization`` makes a dense copy in the cache first. ``each_block`` is called with each block as soon as its
    weights are loaded. With a CUDA ``device`` each weight goes there as it is read (blocks of a GGUF file:
    at the end), so that host memory never holds the model.

    Raises the errors of `resolve` and `auto_class`, FormatError if weights are damaged or missing, and ConfigError for
    an unknown dtype. Raises OutOfMemoryError if the process may not allocate the memory.
    """
    place, file = resolve(source), None
    if isinstance(place, Path) and (file := described_file(place)) is not None and (quantization or gguf == "dense"):
        place, file = converted_folder(file.path), None
    if isinstance(place, Path) and file is None:
        Checkpoint.open(place)  # a damaged file is told apart here, with everything that is wrong with it
    if quantization is None and isinstance(place, Path):
        quantization = stored_quantization(place)
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    kind = AutoModelForSequenceClassification if scores else _auto_class(source, place, encodes=encodes)
    options |= {"num_labels": 1} if scores else {}
    options |= _straight_to(device)
    if each_block is not None:
        watch_loading()
    try:
        shown = downloads_shown(place) if isinstance(place, str) else nullcontext()
        with bars_in_terminals_alone(), shown, blocks_handed_on(each_block):
            if file is None:
                model, report = kind.from_pretrained(
                    place, dtype=parse_dtype(dtype), output_loading_info=True, **options
                )
            else:
                model, report = load_in_blocks(file, dtype=parse_dtype(dtype), scores=scores)
    except (OSError, MemoryError, RuntimeError) as error:
        if no_memory(error) or isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemoryError(_told_memory(source, place, error)) from error
        if isinstance(error, OSError):
            raise _not_loaded(source, place, error) from error
        raise
    _require_whole(source, model, set(report["missing_keys"]), scores)
    fit_experts(model)
    if quantization is None:
        model.__dict__.pop("hf_device_map", None)  # a mark of models that no trainer may move
    return cast(PreTrainedModel, model if device is None else model.to(device)).eval()


def _require_whole(source: str | os.PathLike[str], model: PreTrainedModel, missing: set[str], scores: bool) -> None:
    """Raise FormatError if the files lack tensors other than those of a new classification head."""
    lacking = sorted(missing - ({"score.weight"} if scores else set()))
    if lacking:
        raise FormatError(
            f"{source} lacks {len(lacking)} tensors that {type(model).__name__} needs, such as {lacking[0]!r}: it is "
            f"not a whole {'model' if scores else 'causal language model'}. Fetch or save it again"
        )


def _auto_class(source: str | os.PathLike[str], place: Path | str, *, encodes: bool) -> Any:
    """Return the transformers class that loads a model, by its config. It is AutoModelForCausalLM for a hub id whose
    files are not on this machine, and for a config that cannot be read, which that class then reports.
    """
    if isinstance(place, str):
        return AutoModelForCausalLM
    try:
        facts = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return AutoModelForCausalLM
    return auto_class(source, facts, encodes=encodes) if isinstance(facts, dict) else AutoModelForCausalLM


def _straight_to(device: str | torch.device | None) -> dict[str, Any]:
    """Return transformers' option to read weights straight to a GPU; none for other devices."""
    wanted = torch.device("cpu" if device is None else device)
    if wanted.type != "cuda":
        return {}
    return {"device_map": {"": torch.cuda.current_device() if wanted.index is None else wanted.index}}


def _told_memory(source: str | os.PathLike[str], place: Path | str, error: Exception) -> str:
    """Return a message for weights that did not fit into memory: their size on disk, the limit, and a remedy."""
    weights = f" ({size(Checkpoint.open(place).nbytes)} on disk)" if isinstance(place, Path) else ""
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    limit = None if on_gpu else address_limit()
    if limit is None:
        room = "the memory of the GPU" if on_gpu else "memory"
        return (
            f"the weights of {source}{weights} do not fit into {room}: take a smaller base, or load it quantized. "
            "`veneer plan` tells how much a run takes"
        )
    return (
        f"the weights of {source}{weights} do not fit into {size(limit)} of address space (ulimit -v): files are "
        "mapped, and mapped bytes count. Raise the limit (ulimit -v unlimited), and bound memory by a "
        "control group instead, such as systemd-run --user --scope -p MemoryMax=8G"
    )


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model's folder. Raises FormatError if there is none."""
    place = resolve(source)
    if isinstance(place, Path) and not any((place / name).is_file() for name in _TOKENIZER_FILES):
        raise FormatError(f"{place} holds no tokenizer (none of {list(_TOKENIZER_FILES)}): copy that of the base there")
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(place))
    except OSError as error:
        raise _not_loaded(source, place, error) from error


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return ``"auto"`` or the torch dtype of a name. Raises ConfigError for an unknown one."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; allowed: auto, {', '.join(DTYPES)}. Give one of these")
    return DTYPES[dtype]


def float32_note(dtype: torch.dtype | None, device: str, setting: str) -> str | None:
    """Return a note that computing in float32, by ``setting``, is faster on this machine; None if it is not.

    It is faster on a CPU without native 16-bit products, because such a CPU computes them in float32 and rounds
    (`ops.matmul`).
    """
    if dtype not in matmul.NARROW or device != "cpu" or not matmul.float32_is_faster():
        return None
    return f"note: this CPU is faster with {setting}, which takes twice the memory"


def _not_loaded(source: str | os.PathLike[str], place: Path | str, error: OSError) -> ConfigError | FormatError:
    reason = str(error).strip().splitlines()[0]
    if isinstance(place, Path):
        return FormatError(f"{place} cannot be loaded: {reason}")
    return ConfigError(f"no model {os.fspath(source)!r}: there is no such folder or file, and the hub says: {reason}")
