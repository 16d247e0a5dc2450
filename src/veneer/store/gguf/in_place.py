"""GGUF files whose blocks can be used in place, judged by the header; torch is not imported."""

from __future__ import annotations

from pathlib import Path

from veneer.ops.ggml_types import GGML_TYPES
from veneer.store.gguf.header import own_pairs, read_header
from veneer.store.gguf.registry import laid_out_family


def why_not_in_blocks(path: Path) -> str | None:
    """Return the reason why a file must be decoded into a dense copy; None if its blocks can be used in place.

    The reason is empty ("") for a file without quantized matrices, because such a file is always copied.
    """
    header = read_header(path)
    architecture = str(header.values.get("general.architecture"))
    kinds = {tensor.type for tensor in header.tensors}
    unread = sorted(kinds - GGML_TYPES.keys())
    if unread:
        return f"it holds matrices in {', '.join(unread)}, which are not multiplied in their blocks"
    if not any(GGML_TYPES[kind].block > 1 for kind in kinds):
        return ""
    if (header.values.get("split.count") or 1) > 1:
        return "it is one of several parts"
    if laid_out_family(architecture, own_pairs(header.values, architecture)) is None:
        return f"no table describes the layout of {architecture}'s files"
    return None
