"""Collection of an importance matrix: sums of squares of every linear layer's inputs, over windows of a text.

Experts in one parameter each have their own sums, over the tokens routed to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import DataError
from veneer.export.gguf.plan import family_of
from veneer.model.adapted.experts import project
from veneer.model.adapted.parameters import acting_record
from veneer.model.blueprint.names import STACKS
from veneer.model.quantized.stack import CodedStack
from veneer.quant.stack import DenseStack
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.importance import write_importance
from veneer.store.gguf.names import gguf_name, places_of, text_name


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """Windows of ``chunk_size`` tokens, of which the first ``n_chunks`` are used; all of them if it is None."""

    chunk_size: int = 512
    n_chunks: int | None = None
    overwrite: bool = False


@dataclass(slots=True)
class _Sums:
    squares: dict[str, Tensor] = field(default_factory=dict)  # (experts, columns)
    rows: dict[str, Tensor] = field(default_factory=dict)  # (experts,)

    def add(self, name: str, inputs: Tensor, expert: int = 0, n_experts: int = 1) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if name not in self.squares:
            self.squares[name] = torch.zeros(n_experts, rows.shape[1], dtype=torch.float64)
            self.rows[name] = torch.zeros(n_experts, dtype=torch.float64)
        self.squares[name][expert] += rows.square().sum(0, dtype=torch.float64).cpu()
        self.rows[name][expert] += len(rows)


def collect_importance(
    model: Any,
    tokenizer: Any,
    text: Path,
    output: Path,
    options: CollectOptions | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the importance matrix of a model, adapted or not, over a text. Return the number of windows.

    The head and the embeddings have no entry, as in llama.cpp. Raises DataError for a text shorter than a window.
    """
    options = options or CollectOptions()
    family = family_of(model.config.get_text_config())
    windows = _windows(tokenizer, text, options)
    sums = _Sums()
    with _watched(model, family, sums), torch.no_grad():
        for done, window in enumerate(windows):
            model(window[None].to(model.device), use_cache=False)
            on_progress(done + 1, len(windows))
    write_importance(
        output,
        sums.squares,
        sums.rows,
        data_sets=[text.name],
        n_chunks=len(windows),
        chunk_size=options.chunk_size,
        overwrite=options.overwrite,
    )
    return len(windows)


def _windows(tokenizer: Any, text: Path, options: CollectOptions) -> list[Tensor]:
    """Cut a text into windows of tokens. Each starts with the token that the tokenizer puts in front of a text."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text} cannot be read as text: {error}. Give a file in UTF-8") from error
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    front = whole[:1] if tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id] else []
    width = options.chunk_size - len(front)
    found = [torch.tensor(front + ids[at : at + width]) for at in range(0, len(ids) - width + 1, width)]
    if not found:
        raise DataError(
            f"{text} has {len(ids)} tokens, less than a window of {options.chunk_size}: give a longer text, or a "
            "smaller window (--chunk-size)"
        )
    return found[: options.n_chunks]


@contextmanager
def _watched(model: Any, family: GgufFamily, sums: _Sums) -> Iterator[None]:
    """Enter a context in which each linear layer and each expert adds the squares of its inputs to ``sums``."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            text = text_name(f"{path}.weight")
            name = text and gguf_name(family, config, text, model.base_model_prefix)
            if name is not None:
                handles.append(module.register_forward_pre_hook(_adder(name, sums)))
        elif family.experts and all(hasattr(module, stack) for stack in STACKS):
            inner, down = (_places(family, config, f"{path}.{stack}", model.base_model_prefix) for stack in STACKS)
            handles.append(module.register_forward_pre_hook(_expert_adder(inner, down, sums)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(name: str, sums: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.add(name, inputs[0])

    return add


def _places(family: GgufFamily, config: Any, path: str, prefix: str) -> list[str]:
    """Return the GGUF names of the tensors into which a parameter of stacked experts is split."""
    text = text_name(path)
    return [name for name, _ in places_of(family, config, text, prefix)] if text else []


def _expert_adder(inner: list[str], down: list[str], sums: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that adds the squares of the experts' inputs to ``sums``, under the names ``inner`` (gate, up) and
    ``down``.

    The hooked experts are called with tokens (n, d), ids (n, k) and weights (n, k).
    """

    def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
        tokens, chosen = inputs[:2]
        own = getattr(module, STACKS[0])  # as adapters change it, where it is no stack in codes
        coded = isinstance(own, CodedStack)
        stack, record = (own.stack(), acting_record(module, STACKS[0])) if coded else (DenseStack(own), None)
        n_experts = stack.shape[0]
        for expert in torch.unique(chosen).tolist():
            sent = tokens[torch.where(chosen == expert)[0]]
            let_through = module._apply_gate(project(module, STACKS[0], sent, expert, stack, record))
            for names, reaching in ((inner, sent), (down, let_through)):
                for name in names:
                    sums.add(name, reaching, expert, n_experts)

    return add
