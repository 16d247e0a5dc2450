"""Training step as the trainer makes it, on a model whose tensors are real or traced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.errors import DescriptionError
from veneer.model.blueprint.describe import blocks_of
from veneer.plan.losses import Loss, trained_tokens

Mark = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of ``length`` tokens; each holds ``n_sequences`` packed ones, or is a single unpacked one.

    The last ``n_trained`` tokens of a row are trained (None: all). Rows begin with one of ``n_prompts`` prompts of
    ``n_shared`` tokens, which the step computes once if the model can. A teacher reads ``n_taught`` tokens before each
    row.
    """

    n_rows: int
    length: int
    n_sequences: int = 1
    packed: bool = False
    n_trained: int | None = None
    n_prompts: int = 0
    n_shared: int = 0
    n_taught: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows; those of a prompt count once."""
        return self.n_rows * self.length - max(0, self.n_rows - self.n_prompts) * self.n_shared

    def with_rows(self, n_rows: int) -> Batch:
        """Return this batch with another number of rows, and as many rows to each prompt as now."""
        return replace(self, n_rows=n_rows, n_prompts=-(-n_rows * self.n_prompts // self.n_rows))

    def inputs(self, vocabulary: int, first: Sequence[int] = ()) -> dict[str, Tensor]:
        """Return a batch as the collator makes it; every token is trained except the first ``length - n_trained``.

        Each row begins with the tokens ``first``.
        """
        ids = (torch.arange(self.n_rows * self.length).view(self.n_rows, self.length) * 7 + 3) % vocabulary
        if self.n_prompts:
            ids[:, : self.n_shared] = ids[torch.arange(self.n_rows) % self.n_prompts, : self.n_shared]
        ids[:, : len(first)] = torch.tensor(first, dtype=ids.dtype)
        labels = ids.clone()
        if self.n_trained is not None:
            labels[:, : self.length - self.n_trained] = -100
        if not self.packed:
            return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        bounds = [self.length * k // self.n_sequences for k in range(self.n_sequences + 1)]
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(self.n_rows, -1).contiguous()
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


@contextmanager
def as_accelerate(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Wrap the model's forward as accelerate does, while the context is open: autocast to ``dtype``, outputs in
    float32.
    """
    if dtype is None:
        yield
        return
    cast_forward = torch.autocast("cpu", dtype=dtype)(type(model).forward)
    vars(model)["forward"] = MethodType(convert_outputs_to_fp32(cast_forward), model)
    try:
        yield
    finally:
        del model.forward


class Step:
    """Training steps of a model. `run` and `evaluate` call ``mark`` with the name of each phase as it begins.

    The phases of `run` are forward, loss, backward and optimizer; `evaluate` is one phase.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        inputs: Mapping[str, Tensor],
        mark: Mark,
        *,
        loss: Loss = trained_tokens,
        max_grad_norm: float = 0.0,
        offload: Any = None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.optimizer, self.inputs, self.mark = model, optimizer, inputs, mark
        self.loss, self.max_grad_norm, self.offload = loss, max_grad_norm, offload
        self.after_backward = after_backward
        self.reaches_all = False  # in the last backward pass each trained parameter had a gradient
        self._phase: str | None = None
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(self) -> None:
        """Let the optimizer allocate its state without a pass: it updates once with gradients of zero.

        A real step must give gradients to all trained parameters too.
        """
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.after_backward()
        self.mark("optimizer")
        self._update()

    def run(self, n_batches: int = 1) -> None:
        """Run forward, loss and backward of ``n_batches`` micro-batches, and the update."""
        for _ in range(n_batches):
            with self._forward("forward"), self.offload or nullcontext():
                loss = self.loss(self.model, dict(self.inputs))
            self.mark("backward.loss")
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            self.reaches_all = all(p.grad is not None for p in self._parameters)
            self.after_backward()
        self.mark("optimizer")
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        self._update()

    def _update(self) -> None:
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.mark("done")

    def evaluate(self, inputs: Mapping[str, Tensor], phase: str = "evaluation") -> None:
        """Compute the loss of a batch without gradients, in a phase of that name."""
        self.model.eval()
        with self._forward(phase), torch.no_grad():
            self.loss(self.model, dict(inputs))
        self.model.train()
        self.mark("done")

    @contextmanager
    def _forward(self, phase: str) -> Iterator[None]:
        self.mark(f"{phase}.embeddings")
        self._phase = phase
        try:
            yield
        finally:
            self._phase = None

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Enter a context in which each block of the model calls ``mark`` in the forward and the backward pass."""
        found = blocks(self.model)
        handles = [block.register_forward_pre_hook(self._enters(k)) for k, block in enumerate(found)]
        handles += [block.register_forward_hook(self._leaves(k, len(found))) for k, block in enumerate(found)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enters(self, k: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if self._phase is not None:
                self.mark(f"{self._phase}.block.{k}")

        return hook

    def _leaves(self, k: int, n_blocks: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._phase is None:
                return
            hidden = output[0] if isinstance(output, tuple | list) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.mark(f"backward.block.{k}"))
            if k == n_blocks - 1:
                self.mark("loss" if self._phase == "forward" else f"{self._phase}.loss")

        return hook


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks of a model. Return an empty list if veneer has no description of the model."""
    try:
        return list(blocks_of(model)[1])
    except DescriptionError:
        return []
