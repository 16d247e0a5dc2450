"""Memory besides a base that is served: adapters, tokens of keys and values, and the trade-off between the two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from veneer.contract import MethodConfig
from veneer.errors import ConfigError
from veneer.model.blueprint.describe import describe
from veneer.model.blueprint.parts import Attention
from veneer.plain.units import size
from veneer.plan.model import meta_base
from veneer.recipe.parts import ModelPart
from veneer.serve.start import EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Bytes of the parts of a server.

    ``base``: the model; ``reserve``: left free by the engine; ``room``: for keys, values and adapters; ``page``: a page
    of ``block`` tokens; ``adapter``: one adapter.
    """

    base: int
    reserve: int
    room: int
    page: int
    block: int
    adapter: int

    def tokens(self, n_adapters: int) -> int:
        """Return the number of tokens that fit with this many adapters, in whole pages."""
        return max(0, self.room - n_adapters * self.adapter) // self.page * self.block

    def adapters(self, n_tokens: int) -> int:
        """Return the number of adapters that fit with this many tokens."""
        return max(0, self.room - -(-n_tokens // self.block) * self.page) // self.adapter


def serving_of(
    config: PreTrainedConfig, part: ModelPart, adapter: MethodConfig, memory: int, n_adapter: int
) -> Serving:
    """Return the memory of a server with ``memory`` bytes, by the engine's own settings.

    These are its share of free memory and the tokens of a page. ``n_adapter``: parameters of an adapter, which the
    engine keeps in the base's dtype.

    Raises ConfigError if the base alone does not fit.
    """
    model = meta_base(config, part, prepared=False, frozen=False)  # the engine decodes a GGUF file's blocks
    base = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    options = EngineOptions()
    room = int(options.gpu_memory_utilization * (memory - base))
    if room <= 0:
        raise ConfigError(
            f"the base alone takes {size(base)}, more than {size(memory)}"
            + ("" if part.quantization != "none" else ": --quantization nf4 keeps its matrices in a quarter")
        )
    value = (torch.bfloat16 if model.dtype not in (torch.float32, torch.float16) else model.dtype).itemsize
    heads = [block.attention.heads for block in describe(model).blocks if isinstance(block.attention, Attention)]
    position = sum(2 * h.n_kv_heads * h.head_dim for h in heads) * value
    return Serving(
        base=base,
        reserve=memory - base - room,
        room=room,
        page=position * options.block_size,
        block=options.block_size,
        adapter=n_adapter * value,
    )
