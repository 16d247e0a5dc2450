"""Plan of a whole file before a weight is read: every tensor with its type, shape and sources, and every pair."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.export.folded import FoldedCheckpoint
from veneer.export.gguf.metadata import file_pairs, general_pairs
from veneer.export.gguf.mix import MixFacts, MixOptions, chosen_types
from veneer.export.gguf.mixes import Mix
from veneer.export.gguf.special import special_pairs
from veneer.export.gguf.tokenizer import SourceTokenizer
from veneer.export.gguf.tokens import vocabulary_pairs
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.importance import Importance
from veneer.store.gguf.keys import KeyValue, Said, said_of
from veneer.store.gguf.names import leaf_of, places_of, text_name
from veneer.store.gguf.registry import by_model_type
from veneer.store.gguf.rows import places_of_rows
from veneer.store.gguf.writer import TensorSpec, file_nbytes

_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
_HEAD_UNREAD = (
    "it has a head apart from its embeddings, which the runtime never reads: it would use the embeddings instead, and "
    "give no error. Train an adapter that leaves lm_head alone"
)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Tensor of the checkpoint, and the part of it to use."""

    name: str
    part: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """Plan of a file: ``specs`` in the file's order, and ``sources`` of each by its name, several if they are stacked.

    ``factors`` are tensors computed from the config. ``left_out`` are tensors of the checkpoint that no model uses.
    ``notes`` are for the file's user.
    """

    family: GgufFamily
    config: Any
    pairs: Sequence[KeyValue]
    specs: Sequence[TensorSpec]
    sources: Mapping[str, Sequence[TensorSource]]
    factors: Mapping[str, Tensor]
    left_out: Sequence[str]
    notes: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the file in one part."""
        return file_nbytes(self.pairs, self.specs)


@dataclass(frozen=True, slots=True)
class Described:
    """Checkpoint's family and config, its GGUF form, and the sources of the file's tensors."""

    family: GgufFamily
    config: Any
    said: Said
    sources: Mapping[str, list[TensorSource]]
    shapes: Mapping[str, tuple[int, ...]]
    left_out: list[str]


def describe_checkpoint(source: FoldedCheckpoint, folder: Path) -> Described:
    """Return the description of a checkpoint's file. Raises FormatError with everything that the format cannot hold."""
    config = _config(source).get_text_config()
    family = family_of(config)
    said = said_of(family, config)
    sources, left_out, problems = _placed(source, family, config)
    shapes = {name: _shape(source, found, family, config, name) for name, found in sources.items()}
    problems = [*said.problems, *problems]
    if problems:
        raise FormatError(
            f"a GGUF file of the architecture {family.architecture!r} cannot describe {folder} ({config.model_type}): "
            + f"{'; '.join(problems)}. Serve the model with `veneer serve`"
        )
    _complete_head(family, sources, shapes)
    shapes |= {name: tuple(factors.shape) for name, factors in said.factors.items()}
    return Described(family, config, said, sources, shapes, left_out)


def plan_file(
    described: Described,
    mix: Mix,
    options: MixOptions,
    tokenizer: SourceTokenizer,
    *,
    folder: Path,
    name: str,
    importance: Importance | None = None,
) -> FilePlan:
    """Return the plan of a checkpoint's file.

    Raises FormatError if the format cannot hold the tokenizer, ConfigError if the mix needs an importance matrix.
    """
    specs = chosen_types(described.shapes, mix, _facts(described), options, weighed=importance is not None)
    if mix.name == "Q2_K_S" and importance is None and any(spec.kind == "Q2_K" for spec in specs):
        raise ConfigError("Q2_K_S needs an importance matrix: collect one with `veneer export importance`")
    pairs = [
        *general_pairs(folder, name, described.family.architecture, described.shapes),
        *described.said.pairs,
        *vocabulary_pairs(tokenizer, described.shapes[_EMBEDDINGS][0]),
        *special_pairs(tokenizer, described.config),
        *file_pairs(mix.number),
        *(importance.pairs() if importance else ()),
    ]
    return FilePlan(
        family=described.family,
        config=described.config,
        pairs=pairs,
        specs=specs,
        sources=described.sources,
        factors=described.said.factors,
        left_out=described.left_out,
        notes=described.said.notes,
    )


def _facts(described: Described) -> MixFacts:
    config = described.config
    return MixFacts(
        architecture=described.family.architecture,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        n_experts=next((shape[0] for key, shape in described.shapes.items() if "_exps." in key), 0),
    )


def family_of(config: Any) -> GgufFamily:
    """Return the family of a config. Raises FormatError if it does not support writing."""
    found = by_model_type().get(config.model_type)
    if found is None:
        known = ", ".join(sorted(by_model_type()))
        raise FormatError(
            f"models of the type {config.model_type!r} are not written as GGUF; known types: {known}. Serve the model "
            "with `veneer serve`"
        )
    return found


def laid_out(family: GgufFamily, config: Any, name: str, tensor: Tensor) -> Tensor:
    """Return a model's tensor, given in torch's layout, in the file's layout."""
    leaf = leaf_of(name)
    if leaf in family.turned:
        tensor = tensor.mT
    return _valued(family, leaf, family.rows(leaf, tensor, config))


def _valued(family: GgufFamily, leaf: str, tensor: Tensor) -> Tensor:
    """Return the tensor with the values that the GGUF file stores: some families store norm weights with 1 added.
    ``leaf`` is the end of its name.
    """
    if family.plus_one and leaf.endswith("norm.weight"):
        return (tensor if tensor.dtype == torch.float16 else tensor.float()) + 1
    return tensor


def laid_out_rows(family: GgufFamily, config: Any, name: str, tensor: Tensor) -> Tensor:
    """Return the rows (o, …) of an update in the order that the file's tensor ``name`` has."""
    return family.rows(leaf_of(name), tensor, config)


def _config(source: FoldedCheckpoint) -> Any:
    content = dict(source.config)
    return AutoConfig.for_model(content.pop("model_type"), **content)


def _placed(
    source: FoldedCheckpoint, family: GgufFamily, config: Any
) -> tuple[dict[str, list[TensorSource]], list[str], list[str]]:
    sources: dict[str, list[TensorSource]] = {}
    left_out, problems = [], []
    for stored in source.specs:
        name = text_name(source.model_name(stored))
        if name is None:
            left_out += [] if stored.endswith(_BUFFERS) else [stored]
            continue
        found = places_of(family, config, name, source.prefix)
        if not found:
            problems.append(_HEAD_UNREAD if name == "lm_head.weight" else f"GGUF has no name for the tensor {name}")
        for target, part in found:
            sources.setdefault(target, []).append(TensorSource(stored, part))
    return sources, left_out, problems


def _shape(
    source: FoldedCheckpoint, found: Sequence[TensorSource], family: GgufFamily, config: Any, name: str
) -> tuple[int, ...]:
    return tuple(assembled(family, config, name, found, lambda stored: _empty(source.specs[stored][1])).shape)


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def assembled(
    family: GgufFamily, config: Any, name: str, sources: Sequence[TensorSource], read: Callable[[str], Tensor]
) -> Tensor:
    """Return a tensor of the file, assembled from its sources."""
    parts = [each.part(read(each.name)) for each in sources]
    tensor = parts[0] if len(parts) == 1 else torch.stack(parts)
    return laid_out(family, config, name, tensor)


def assembled_blocks(
    plan: FilePlan, name: str, read: Callable[[str], Tensor], blocks: Callable[[str], Iterator[Tensor]]
) -> Iterator[Tensor]:
    """Yield the tensor of `assembled` in blocks of rows, or expert by expert. ``blocks`` gives the rows of a source.

    A vector, a transposed matrix, and a matrix whose rows are reordered come whole.
    """
    family, leaf, sources = plan.family, leaf_of(name), plan.sources[name]
    shape = next(spec.shape for spec in plan.specs if spec.name == name)
    if len(shape) == 1:
        yield assembled(family, plan.config, name, sources, lambda stored: torch.cat(list(blocks(stored))))
        return
    parts: Iterator[Tensor]
    if len(sources) > 1:
        parts = (each.part(read(each.name))[None] for each in sources)
    else:
        parts = (sources[0].part(block) for block in blocks(sources[0].name))
        places = places_of_rows(family, leaf, shape[0], plan.config)
        if len(shape) == 3 and leaf in family.turned:
            parts = (part.mT for part in parts)
        elif leaf in family.turned or not torch.equal(places, torch.arange(shape[0])):
            parts = iter((_gathered(parts, shape, None if leaf in family.turned else places),))
    for part in parts:
        yield _valued(family, leaf, part)


def _gathered(blocks: Iterator[Tensor], shape: tuple[int, ...], places: Tensor | None) -> Tensor:
    """Assemble a matrix of this shape from blocks of rows.

    Row k of the blocks becomes row ``places[k]``. If ``places`` is None, the matrix is transposed: row k becomes column
    k.
    """
    start = next(blocks)
    out = torch.empty(shape, dtype=start.dtype)
    first = 0
    for block in itertools.chain((start,), blocks):
        last = first + len(block)
        if places is None:
            out[:, first:last] = block.T
        else:
            out[places[first:last]] = block
        first = last
    return out


def _complete_head(
    family: GgufFamily, sources: dict[str, list[TensorSource]], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Complete the embeddings and the head in ``sources`` and ``shapes``, if they are tied and the checkpoint stores
    one of them.

    A single tensor gets the embeddings' name. The head gets an entry too if llama.cpp requires one for this family.
    Raises CompositionError if the checkpoint has neither.
    """
    if _EMBEDDINGS not in sources and _HEAD in sources:  # a file may hold the head's name alone
        sources[_EMBEDDINGS], shapes[_EMBEDDINGS] = sources.pop(_HEAD), shapes.pop(_HEAD)
    if _EMBEDDINGS not in sources:
        raise CompositionError("the checkpoint has no embeddings: give the folder of a whole model")
    if family.head == "must" and _HEAD not in sources:
        sources[_HEAD], shapes[_HEAD] = sources[_EMBEDDINGS], shapes[_EMBEDDINGS]
