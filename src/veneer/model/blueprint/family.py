"""Differences of a family from the convention, as data; the convention is Llama's. `families` holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from veneer.model.blueprint.names import COMMON, Names


def _always(config: Any, layer: int) -> bool:
    return True


def _never(config: Any) -> bool:
    return False


def _nothing(config: Any) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Model types whose described outputs tests verify, and the facts that names and config keys do not determine.

    - ``names``: the names of parts, `names.COMMON` if they are the common ones.
    - ``interleaved``: q and k are rotated in neighbouring pairs. ``rotates``: whether the layer with an index rotates.
    - ``alibi``: whether attention has a bias that decreases with distance. ``rounds_alibi``: this bias is computed
      in bfloat16, and scaled with the scores.
    - ``norm_eps``: the epsilon of norms whose modules do not store one.
    - ``experts``: experts are chosen and weighted by the softmax of the router's scores, or by their sigmoids. None if
      neither is known. A softmax over the chosen scores alone counts as a softmax whose chosen values are normalized.
    - ``scales_queries``: queries grow with position by ``llama_4_scaling_beta``.
    - ``stretches_theta``: rotation of type dynamic with an ``alpha`` has the base theta · alpha^(d / (d - 2)) at every
      length of a sequence.
    - ``multiplies_logits``: ``logits_scaling`` multiplies the logits, which it otherwise divides (Granite).
    - ``adds_inside``: halves that add to the residual stream themselves. Bottleneck adapters act at their last layer.
    - ``strange``: returns the reason if a config of the family cannot be described, or None.
    """

    model_types: tuple[str, ...]
    names: Names = COMMON
    interleaved: bool = False
    rotates: Callable[[Any, int], bool] = _always
    alibi: Callable[[Any], bool] = _never
    rounds_alibi: bool = False
    norm_eps: float | None = None
    experts: Literal["softmax", "sigmoid"] | None = None
    scales_queries: bool = False
    stretches_theta: bool = False
    multiplies_logits: bool = False
    adds_inside: tuple[Literal["attention", "mlp"], ...] = ()
    strange: Callable[[Any], str | None] = _nothing


CONVENTION = Family(model_types=())
