"""Files in llama.cpp itself, through cyllama: logits, greedy tokens, tokens of a text. Tests skip without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

llama = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama is not installed")
llama.disable_logging()


class _Model(llama.LlamaModel):  # type: ignore[misc,name-defined]
    """With the width of logits, which cyllama 0.2.18 asks of it in vain."""

    @property
    def n_vocab(self) -> int:
        return int(self.get_vocab().n_vocab)


class LlamaCpp:
    """A file, loaded; F32 keys and values, no flash attention, so that logits compare."""

    def __init__(self, path: Path, n_context: int = 256) -> None:
        params = llama.LlamaModelParams()
        params.n_gpu_layers = 0
        params.use_mmap = False
        self.model = _Model(path_model=str(path), params=params, verbose=False)
        self.vocab = self.model.get_vocab()
        self._n_context = n_context

    def _context(self) -> Any:
        params = llama.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = self._n_context
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = 0
        params.flash_attn_type = 0
        return llama.LlamaContext(model=self.model, params=params, verbose=False)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits of every position (n, vocabulary)."""
        context = self._context()
        batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1, verbose=False)
        for position, token in enumerate(ids):
            batch.add(token, position, [0], True)
        assert context.decode(batch) == 0
        n = self.vocab.n_vocab
        return torch.stack([torch.tensor(list(context.get_logits_ith(i))[:n]) for i in range(len(ids))])

    def tokens(self, text: str, special: bool = True) -> list[int]:
        return list(self.vocab.tokenize(text, add_special=False, parse_special=special))
