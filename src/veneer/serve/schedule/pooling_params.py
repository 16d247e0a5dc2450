"""Parameters of embeddings. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from veneer.errors import ConfigError
from veneer.serve.schedule.keywords import Keywords

Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams(metaclass=Keywords):
    """Pooling of a prompt's hidden states: the ``last`` token's, or the ``mean`` of all tokens'.

    ``normalize`` scales the result to the length 1. Raises ConfigError.
    """

    not_offered: ClassVar[tuple[str, ...]] = ("dimensions", "softmax", "step_tag_id", "returned_token_ids", "task")

    pooling: Pooling = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"pooling={self.pooling!r} must be one of {', '.join(get_args(Pooling))}")
        _require_bool(self.normalize)


def _require_bool(given: Any) -> None:
    if not isinstance(given, bool):
        raise ConfigError(f"normalize={given!r} must be True or False")
