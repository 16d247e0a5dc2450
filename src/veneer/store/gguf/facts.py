"""Facts about a GGUF file, read from its header: as values, and as lines of a table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from veneer.plain.units import size
from veneer.store.gguf.header import GgufHeader, GgufTensor

Section = dict[str, str]
_SHAPE = {
    "context_length": "context",
    "embedding_length": "width",
    "block_count": "layers",
    "attention.head_count": "attention heads",
    "attention.head_count_kv": "key/value heads",
    "attention.key_length": "head width",
    "feed_forward_length": "feed-forward width",
    "expert_count": "experts",
    "expert_used_count": "experts for a token",
    "attention.sliding_window": "window",
    "rope.freq_base": "rotary theta",
    "rope.scaling.type": "rotary scaling",
    "rope.scaling.factor": "rotary scaling factor",
}
_TOKENIZER = "tokenizer.ggml."
_FACTORS = re.compile(r"(.+)\.lora_([ab])")


_HELD = {"adapter": "an adapter ({})", "imatrix": "an importance matrix", "mmproj": "the image half of a model"}


def gguf_facts(header: GgufHeader) -> dict[str, Any]:
    """Return all facts of a file, for JSON. The vocabulary's lists are replaced by their lengths, and tensors are
    counted by type.
    """
    values = {
        key: _length(value) if key.startswith(_TOKENIZER) and not isinstance(value, (str, int)) else value
        for key, value in header.values.items()
    }
    types = {name: {"tensors": len(of), "bytes": _bytes(of)} for name, of in _by_type(header.tensors).items()}
    return {"keys": values, "types": types, "parameters": _count(header.tensors), "n_bytes": header.n_bytes}


def gguf_section(path: Path, header: GgufHeader) -> Section:
    """Return the lines of a table for a model or an adapter."""
    values = header.values
    kind = str(values.get("general.type", "model"))
    family = values.get("general.architecture")
    return {
        "GGUF file": str(path),
        "holds": _HELD.get(kind, f"a {kind}").format(values.get("adapter.type", "of no type")),
        **_said(values, {"general.name": "name", "general.license": "license"}),
        **({"family": str(family)} if family else {}),
        **(_adapter(header) if kind == "adapter" else _model(header)),
        **_parts(values),
        **_sizes(header),
    }


def _model(header: GgufHeader) -> Section:
    values = header.values
    family = values.get("general.architecture")
    names = {tensor.name for tensor in header.tensors}
    tied = {"tied embeddings": "False" if "output.weight" in names else "True"} if "token_embd.weight" in names else {}
    return {**_said(values, {f"{family}.{key}": name for key, name in _SHAPE.items()}), **tied, **_tokenizer(values)}


def _tokenizer(values: Mapping[str, Any]) -> Section:
    """Return the vocabulary's kind, size and special tokens, and whether there is a chat template."""
    kind = values.get(f"{_TOKENIZER}model")
    if kind is None:
        return {"tokenizer": "none in the file"}
    cut = values.get(f"{_TOKENIZER}pre")
    special = {name: values.get(f"{_TOKENIZER}{name}_token_id") for name in ("bos", "eos")}
    told = [f"{name.upper()} {number}" for name, number in special.items() if number is not None]
    template = values.get("tokenizer.chat_template")
    return {
        "vocabulary": f"{_length(values.get(f'{_TOKENIZER}tokens')):,}",
        "tokenizer": ", ".join([f"{kind} ({cut})" if cut else str(kind), *told]),
        "chat template": "none" if template is None else f"yes, {len(template):,} characters",
    }


def _adapter(header: GgufHeader) -> Section:
    """Return the table rows of an adapter: base, rank, ``lora_alpha`` and modules. Factor A is (rank, in), B is (out,
    rank).
    """
    shapes = {found.groups(): t.shape for t in header.tensors if (found := _FACTORS.fullmatch(t.name))}
    ranks = sorted({shape[1] for (_, factor), shape in shapes.items() if factor == "b" and len(shape) == 2})
    modules = sorted({name for name, _ in shapes})
    kinds = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in modules})
    alpha = header.values.get("adapter.lora.alpha")
    return {
        **_said(header.values, {"general.base_model.0.name": "base"}),
        "r": ", ".join(map(str, ranks)),
        "lora_alpha": f"{alpha:g}" if alpha else "none: the strength is in the factors",
        "modules": f"{len(modules)} ({', '.join(kinds)})",
    }


def _parts(values: Mapping[str, Any]) -> Section:
    n_parts = values.get("split.count") or 1
    return {"part": f"{values.get('split.no', 0) + 1} of {n_parts}"} if n_parts > 1 else {}


def _sizes(header: GgufHeader) -> Section:
    """Return the number of parameters, and for each storage type its tensors and bytes."""
    n_parameters, n_bytes = _count(header.tensors), _bytes(header.tensors)
    rows = {
        f"  {name}": f"{len(of)} tensors, {_count(of):,} parameters, {size(_bytes(of))}"
        for name, of in _by_type(header.tensors).items()
    }
    bits = f", {8 * n_bytes / n_parameters:.2f} bits a parameter" if n_parameters else ""
    return {
        "parameters": f"{n_parameters:,}",
        "type": _file_type(header.values.get("general.file_type")),
        **rows,
        "size": f"{size(header.n_bytes)}{bits}",
    }


def _file_type(number: Any) -> str:
    """Return llama.cpp's name for a file's mix of storage types, such as ``Q4_K_M``, by its number in the header."""
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "not told" if number is None else f"number {number}"


def _by_type(tensors: Iterable[GgufTensor]) -> dict[str, list[GgufTensor]]:
    found: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.type, []).append(tensor)
    return dict(sorted(found.items(), key=lambda item: -_bytes(item[1])))


def _said(values: Mapping[str, Any], names: Mapping[str, str]) -> Section:
    return {name: _text(values[key]) for key, name in names.items() if values.get(key) not in (None, "", 0)}


def _text(value: Any) -> str:
    if isinstance(value, list):  # one for each layer
        counts = Counter(map(_text, value))
        return ", ".join(f"{text} (×{n})" for text, n in counts.items())
    if isinstance(value, float):
        return f"{value:,.10g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _length(values: Any) -> int:
    return len(values) if isinstance(values, list) else getattr(values, "n_values", 0)


def _count(tensors: Iterable[GgufTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _bytes(tensors: Iterable[GgufTensor]) -> int:
    return sum(tensor.n_bytes for tensor in tensors)
