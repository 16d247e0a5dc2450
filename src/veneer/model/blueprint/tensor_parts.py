"""Part of a model to which a tensor of a checkpoint belongs."""

from __future__ import annotations

from veneer.model.blueprint.decoder import Decoder
from veneer.model.blueprint.part_names import TensorPart, part_by_name
from veneer.model.blueprint.parts import Strange


def part_of(name: str, decoder: Decoder | None = None) -> TensorPart:
    """Return the part that a tensor belongs to, by the decoder's description, otherwise by patterns of names.

    Checkpoints of a bare decoder lack the first name of their paths (GPT-2's: ``h.0.attn``), which is prepended.
    """
    if decoder is not None:
        root = decoder.embedding.path.partition(".")[0]
        for path in (name, f"{root}.{name}"):
            found = [(len(place), part) for place, part in _places(decoder) if path.startswith(f"{place}.")]
            if found:
                return max(found)[1]
    return part_by_name(name)


def _places(decoder: Decoder) -> list[tuple[str, TensorPart]]:
    """Return paths, each with its part of the model. A tensor whose name begins with a path belongs to that part."""
    table = decoder.embedding
    found: list[tuple[str, TensorPart]] = [(table.path, "embeddings")]
    found += [(table.positions.path, "embeddings")] if table.positions else []
    found += [(norm.path, "norms") for norm in decoder.norms]
    found += [(decoder.head.linear.path, "output head")] if decoder.head else []
    for block in decoder.blocks:
        if not isinstance(block.attention, Strange):
            found.append((block.attention.path, "attention"))
        if not isinstance(block.feed_forward, Strange):
            inside = (linear.path for linear in block.feed_forward.linears)
            whole = () if block.feed_forward.path == block.path else (block.feed_forward.path,)
            found += [(path, "feed-forward") for path in (*whole, *inside)]
    return found
