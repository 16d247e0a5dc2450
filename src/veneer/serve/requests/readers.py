"""Prompt reader of each adapter: training saves a tokenizer and a chat template with its weights."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.adapters.tokenizer import TOKENIZER_FILES, larger, read_tokenizer, template_in
from veneer.contract.source import adapter_folder
from veneer.disk.stamp import stamp_of
from veneer.errors import ConfigError, FormatError
from veneer.plain.lru import LruCache
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.schedule.lora_request import LoRARequest

_LOG = logging.getLogger(__name__)
_KEPT = 64  # readers; adapters of equal files share one
_FOLDERS = 1 << 16  # whose files are remembered, about half a kilobyte each
_Stamps = tuple[tuple[int, ...] | None, ...]


class Readers:
    """Prompt readers of adapters, by request. Files are read again if they have changed. Any thread may call it.

    An adapter's own tokenizer is used if it has more tokens than the base's. Otherwise the base's tokenizer is used,
    with the adapter's chat template and end token. A chat template saved without a tokenizer is used too. If
    ``template`` is given, it is used instead of the chat templates of all adapters. If an adapter's files cannot be
    read, the base's tokenizer reads its plain prompts, and its conversations are refused.
    """

    def __init__(self, base: PromptReader, template: str | None = None) -> None:
        self.base, self._template = base, template
        self._fetched: dict[str, Path] = {}  # from the hub
        self._keys: LruCache[Path, tuple[_Stamps, str]] = LruCache(_FOLDERS)
        self._readers: LruCache[str, PromptReader] = LruCache(_KEPT)
        self._lock = threading.Lock()

    def of(self, request: LoRARequest | None) -> PromptReader:
        """Return the prompt reader of an adapter or of a mix; if ``request`` is None, that of the base.

        Raises ConfigError for a mix of adapters that add different tokens.
        """
        if request is None or request.version is not None:
            return self.base
        if request.parts:
            return _joined(request, [self.of(part) for part, _ in request.parts])
        folder = self._folder(request.lora_path)
        stamps = tuple(_stamp(folder / name) for name in TOKENIZER_FILES)
        if None in stamps[:2] and stamps[2] is None:  # without a chat template there is the base's
            return self.base
        known = self._keys.get(folder)
        if known is None or known[0] != stamps:
            known = (stamps, _digest(folder))
            self._keys.put(folder, known)
        return self._readers.get(known[1]) or self._added(folder, *known)

    def _added(self, folder: Path, stamps: _Stamps, key: str) -> PromptReader:
        """Read an adapter's files, and cache the reader. Meanwhile other threads may use other readers.

        Folders with equal files share a reader. If the files cannot be used, the reader is cached for this folder
        alone.
        """
        made = self._read(folder)
        if made.no_chat:
            key = f"{key.partition(' ')[0]} {folder}"
            self._keys.put(folder, (stamps, key))
        with self._lock:  # of those that read equal files at once one is kept
            reader = self._readers.get(key) or made
            self._readers.put(key, reader)
            return reader

    def _folder(self, path: str) -> Path:
        if Path(path).is_dir():
            return Path(path)
        if path not in self._fetched:
            self._fetched[path] = adapter_folder(path)
        return self._fetched[path]

    def _read(self, folder: Path) -> PromptReader:
        base = self.base.tokenizer
        try:
            if not all((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
                template = self._template or template_in(folder)
                return self._reader(base, template)
            own = read_tokenizer(folder)
        except FormatError as error:
            _LOG.warning("%s. Until then plain prompts for this adapter are read by the base's tokenizer", error)
            if self._template is not None:
                return self._reader(base, self._template)
            return self._reader(base, None, no_chat=str(error))
        template = self._template or _template_of(own)
        ends = set() if own.eos_token_id is None else {int(own.eos_token_id)}
        return self._reader(larger(base, own), template, ends=ends)

    def _reader(self, tokenizer: Any, template: str | None, **how: Any) -> PromptReader:
        """Return a reader that renders within the limits for untrusted templates, as the base's reader does."""
        templates = () if template is None else (template,)
        return PromptReader(tokenizer, self.base.most, templates, rendering=self.base.rendering, **how)


def _joined(mix: LoRARequest, readers: Sequence[PromptReader]) -> PromptReader:
    """Return the reader of a weighted sum of adapters (a mix), joined from its adapters' readers.

    Raises ConfigError if the adapters add different tokens to the tokenizer.
    """
    tokenizer = max((reader.tokenizer for reader in readers), key=len)
    others = [reader for reader in readers if reader.tokenizer.get_added_vocab() != tokenizer.get_added_vocab()]
    if others:
        raise ConfigError(
            f"the adapters of {mix.lora_name!r} were trained with different tokenizers: ask for one at a time"
        )
    templates = [reader.templates or (_template_of(reader.tokenizer),) for reader in readers]
    own = dict.fromkeys(template for each in templates for template in each if template is not None)
    ends = frozenset[int]().union(*(reader.ends for reader in readers))
    no_chat = next((reader.no_chat for reader in readers if reader.no_chat), "")
    return PromptReader(tokenizer, readers[0].most, tuple(own), ends, no_chat, readers[0].rendering)


def _template_of(tokenizer: Any) -> str | None:
    """Return the tokenizer's chat template; if it has several, the default one."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        told = path.stat()
    except OSError:
        return None
    return stamp_of(told)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        try:
            content = path.read_bytes() if path.is_file() else b""
        except OSError as error:  # names the path, and so equals no other folder's
            content = str(error).encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
