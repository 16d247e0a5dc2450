"""Family of models in GGUF files: its keys, and the layout of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from veneer.store.gguf.fields import Field

if TYPE_CHECKING:
    from torch import Tensor

    Rows = Callable[[str, Tensor, Any], Tensor]
    Parts = Callable[[str], Iterable[tuple[str, Callable[[Tensor], Tensor]]]]


def as_they_are(leaf: str, tensor: Tensor, config: Any) -> Tensor:
    """Return the tensor unchanged, with its rows in transformers' order."""
    return tensor


def nothing_refused(config: Any) -> Iterable[str]:
    """Return no problems: every config of the family can be written."""
    return ()


def no_parts(name: str) -> Iterable[tuple[str, Callable[[Tensor], Tensor]]]:
    """Return no parts: each parameter is one tensor of the file, under the name in gguf's map."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """Model family in GGUF files: the keys of one architecture (``general.architecture``), and the layout of its
    tensors.

    Law: write a config's keys, let transformers read the file, and apply these keys to its config. Every field then
    equals that of the first config.

    - ``rotary``: path of the dict that ``rope.scaling`` fills; None without rotary embedding.
    - ``sliding_rotary``: the same for layers with sliding windows.
    - ``partial_rotary``: ``rope.dimension_count`` may be less than a head.
    - ``biases``: the config's switches for biases. Each key is a tensor that a layer has if the switch is on.
    - ``fixed``: values of keys without which the family's tensors have another layout.
    - ``query_width_layers``: the number of layers of the one model whose queries are scaled by the root of hidden_size
      / heads. The scale has no key; all other models scale by the root of head_dim.
    - ``windows``: some layers have sliding windows. Without a key, these are all but every ``window_step``-th; a step
      of 0 means that the key is always there.
    - ``cut_to_window``: every layer has a window that the runtime ignores, so texts must not be longer than the window.
    - ``experts``: tensors that hold a layer's experts, stacked.
    - ``silent``: keys that add nothing to the shapes of the tensors.
    - ``reads``: transformers reads such files.
    - ``marked_by``: a key that only this family's files have, if several share an architecture.

    For writing:

    - ``model_types``: transformers' names of the models; none if the family is only read.
    - ``only``: attributes of the config without a key, with the values that the runtime computes.
    - ``refuses``: a function that returns further reasons why a config cannot be written.
    - ``scalings``: rotary scalings that the runtime computes.
    - ``rotary_width``: ``rope.dimension_count`` is written.
    - ``rows(leaf, tensor, config)``: puts the output rows of a tensor, or of LoRA's B of it, in the file's order.
    - ``turned``: names of tensors whose weights the model has as (in, out), or of experts as (n, in, out).
    - ``plus_one``: norms are stored as their difference from one.
    - ``parts(name)``: the tensors that hold a parameter, if it is split into several, or is stacked with others in one,
      each with the function that returns a view of its values in the parameter.
    - ``head``: a file "may" hold an untied head, "must" hold the head even if it is tied, or the head is "never" read.
    """

    architecture: str
    fields: tuple[Field, ...]
    rotary: str | None = "rope_parameters"
    sliding_rotary: str | None = None
    partial_rotary: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    query_width_layers: int | None = None
    windows: bool = False
    window_step: int | None = None
    cut_to_window: bool = False
    experts: tuple[str, ...] = ()
    silent: frozenset[str] = frozenset()
    reads: bool = True
    marked_by: str | None = None

    model_types: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    refuses: Callable[[Any], Iterable[str]] = nothing_refused
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    rotary_width: bool = False
    rows: Rows = as_they_are
    turned: tuple[str, ...] = ()
    plus_one: bool = False
    parts: Parts = no_parts
    head: Literal["may", "must", "never"] = "may"
