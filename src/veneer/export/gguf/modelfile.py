"""Folder for ``ollama create``: the GGUF file and a Modelfile with template, stop tokens and parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.disk.folder import new_folder
from veneer.errors import FormatError
from veneer.export.gguf.go_template import ChatShape, Messages, chat_shape
from veneer.export.gguf.metadata import sampling_settings
from veneer.export.gguf.model import GgufExport, GgufOptions, GgufReport
from veneer.export.gguf.special import end_of_turn
from veneer.export.gguf.tokenizer import SourceTokenizer

MODEL, MODELFILE = "model.gguf", "Modelfile"
MOST_CONTEXT = 8192
"""Ollama takes a few thousand tokens where nothing is said, and memory for all that is said."""
_PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaReport:
    """Written folder. ``has_template`` is False if Go's language cannot express the chat template."""

    gguf: GgufReport
    has_template: bool


def export_ollama(
    base: str | os.PathLike[str],
    output: Path,
    options: GgufOptions,
    *,
    adapter: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> OllamaReport:
    """Write a folder for ``ollama create NAME -f FOLDER/Modelfile``, all or nothing.

    Raises the errors of `export_gguf`, and FormatError if ``output`` holds anything other than such a folder.
    """
    _require_replaceable(output, options.overwrite)
    export = GgufExport(base, adapter, options)
    shape = _shape(export.tokenizer, export.adds_bos)
    text = modelfile(export, shape)
    with new_folder(output.absolute()) as staging:
        report = export.write(staging / MODEL, on_progress)
        (staging / MODELFILE).write_text(text, encoding="utf-8")
    return OllamaReport(gguf=report, has_template=shape is not None)


def modelfile(export: GgufExport, shape: ChatShape | None) -> str:
    """Return the text of the Modelfile."""
    lines = [f"FROM ./{MODEL}"]
    if shape is not None:
        lines.append(f'TEMPLATE """{shape.go()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(export.tokenizer)]
    lines += [f"PARAMETER {name} {value}" for name, value in _settings(export)]
    return "\n".join(lines) + "\n"


def _stops(source: SourceTokenizer) -> list[str]:
    """Return the tokens that end an answer: those of the template, and the tokenizer's end of text."""
    found = [end_of_turn(source)] if source.template is not None else []
    ids = [*found, source.tokenizer.eos_token_id]
    return list(dict.fromkeys(source.vocabulary[number] for number in ids if number is not None))


def _settings(export: GgufExport) -> Iterator[tuple[str, Any]]:
    for name, value in sampling_settings(export.folder).items():
        yield _PARAMETERS[name], value
    length = getattr(export.plan.config, "max_position_embeddings", MOST_CONTEXT)
    yield "num_ctx", min(length, MOST_CONTEXT)


def _shape(source: SourceTokenizer, adds_bos: bool) -> ChatShape | None:
    """Return the template's shape. Its BOS is left out, since the runtime adds one."""
    if source.template is None:
        return None
    bos = source.tokenizer.bos_token if adds_bos else None

    def render(messages: Messages) -> str:
        text = source.rendered(messages, answer_next=True)
        return text.removeprefix(bos) if bos else text

    found = chat_shape(render)
    return None if found is None or '"""' in found.go() else found


def _require_replaceable(target: Path, overwrite: bool) -> None:
    held = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if held and not overwrite:
        raise FormatError(f"{target} is not empty: choose another folder, or overwrite it (--force)")
    if held - {MODEL, MODELFILE}:
        other = sorted(held - {MODEL, MODELFILE})[0]
        raise FormatError(f"{target} holds {other!r}: only a folder with {MODEL} and {MODELFILE} alone is overwritten")
