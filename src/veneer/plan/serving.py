"""Memory besides a base that is served: adapters, tokens of keys and values, and the trade-off between the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.contract import MethodConfig
from veneer.errors import ConfigError, DescriptionError, TargetError
from veneer.evaluate.scoring import context_length
from veneer.model.batch.encoded import encoded_bytes
from veneer.model.batch.own_cache import KeptBytes, Way, kept_bytes
from veneer.model.batch.paged import UNFIT, position_bytes, require_paged_layers
from veneer.model.blueprint.describe import describe
from veneer.model.program.program import compile_program
from veneer.ops.traced import Traced, tracing
from veneer.plain.units import size
from veneer.plan.model import CPU, make_traced, meta_base
from veneer.recipe.parts import ModelPart
from veneer.serve.program.kv_cache import kept_in_pages, page_size
from veneer.serve.start import EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Bytes of the parts of a server.

    ``base``: the model; ``reserve``: left free by the engine; ``room``: for keys, values and adapters; ``page``: a page
    of ``block`` tokens, 0 if a token takes nothing; ``sequence``: what each sequence takes beside its tokens;
    ``adapter``: one adapter.
    """

    base: int
    reserve: int
    room: int
    page: int
    block: int
    sequence: int
    adapter: int

    def tokens(self, n_adapters: int) -> int | None:
        """Return the number of tokens of one sequence that fit with this many adapters, in whole pages.

        If a token takes no memory, return None for any number, or 0 if the adapters alone do not fit.
        """
        left = self.room - n_adapters * self.adapter - self.sequence
        if not self.page:
            return None if left >= 0 else 0
        return max(0, left) // self.page * self.block

    def sequences(self, n_tokens: int) -> int:
        """Return the number of sequences of ``n_tokens`` tokens that fit if no adapter is loaded."""
        return self.room // max(1, self.sequence + -(-n_tokens // self.block) * self.page)

    def adapters(self, n_tokens: int) -> int:
        """Return the number of adapters that fit in memory beside one sequence of ``n_tokens`` tokens.

        If ``n_tokens`` is 0, no memory is kept for a sequence.
        """
        taken = self.sequence + -(-n_tokens // self.block) * self.page if n_tokens else 0
        return max(0, self.room - taken) // self.adapter


def serving_of(
    config: PreTrainedConfig, part: ModelPart, adapter: MethodConfig, memory: int, n_adapter: int
) -> Serving:
    """Return the memory of a server on a machine with ``memory`` bytes. The share of free memory and the size of a page
    are the engine's defaults.

    ``n_adapter``: parameters of an adapter, which the engine keeps in the base's dtype. Raises ConfigError if the base
    alone does not fit.
    """
    model = meta_base(
        config, part, prepared=False, frozen=False, encodes=True
    )  # the engine decodes a GGUF file's blocks
    base = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    options = EngineOptions()
    room = int(options.gpu_memory_utilization * (memory - base))
    if room <= 0:
        raise ConfigError(
            f"the base alone takes {size(base)}, more than {size(memory)}"
            + (
                ""
                if part.quantization != "none"
                else ": --quantization nf4 stores its matrices in a quarter of the bytes"
            )
        )
    value = (torch.bfloat16 if model.dtype not in (torch.float32, torch.float16) else model.dtype).itemsize
    kept, block = kept_in_serving(model)
    return Serving(
        base=base,
        reserve=memory - base - room,
        room=room,
        page=kept.position * block + kept.page,
        block=block,
        sequence=kept.sequence,
        adapter=n_adapter * value,
    )


def kept_in_engine(config: PreTrainedConfig, part: ModelPart) -> tuple[KeptBytes, int]:
    """Return the bytes that an engine on a recipe's base keeps, and the tokens of a page, as `kept_in_serving` does."""
    return kept_in_serving(meta_base(config, part, prepared=False, frozen=False))


def kept_in_serving(model: PreTrainedModel) -> tuple[KeptBytes, int]:
    """Return the bytes that a served sequence of a model on the meta device keeps, and the tokens of a page by default.

    They are the bytes of the engine's program, of layers in pages, or of transformers' own cache, whichever the engine
    chooses for this model. Each is measured on tensors without values. The model has traced tensors from then on.

    Raises ConfigError for a model that computes nothing from token ids alone.
    """
    try:
        program = compile_program(describe(model), context_length(model) or 2048)
        block = page_size(program, None)
        return kept_in_pages(program, block, model.dtype, CPU), block
    except DescriptionError:
        with tracing(), torch.no_grad(), _each_expert_taken():
            make_traced(model)
            return _of_own_code(model), page_size(None, None)


@contextmanager
def _each_expert_taken() -> Iterator[None]:
    """Enter a context for tracing tensors without values: every expert gets tokens, and every index that the model's
    code reads is 0.
    """
    with cast(Any, fx_config).patch(meta_nonzero_assume_all_nonzero=True), _FirstIndex():  # type: ignore[no-untyped-call]
        yield


class _FirstIndex(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_index = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.long
        return 0 if is_index and isinstance(args[0], Traced) else func(*args, **(kwargs or {}))


def _of_own_code(model: PreTrainedModel) -> KeptBytes:
    try:
        if not model.config.is_encoder_decoder:
            require_paged_layers(model)
            return KeptBytes(position_bytes(model, torch.arange(_SHORT))[0])
    except TargetError:
        pass
    try:
        encodes = model.config.is_encoder_decoder
        return encoded_bytes(model, Way.AT_ONCE) if encodes else kept_bytes(model, Way.AT_ONCE)
    except UNFIT as error:
        if not model.config.is_encoder_decoder and _computes_whole(model):
            return kept_bytes(model, Way.ANEW)
        raise ConfigError(
            f"{type(model).__name__} keeps a state whose bytes cannot be counted without weights ({error}). Start the "
            "server, which reports the bytes of a sequence and of a token"
        ) from error


def _computes_whole(model: PreTrainedModel) -> bool:
    """Return True if the model can compute a whole sequence without a cache."""
    try:
        model(input_ids=torch.arange(_SHORT)[None], use_cache=False)
    except UNFIT:
        return False
    return True


_SHORT = 13  # tokens
