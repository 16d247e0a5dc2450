"""Windows over texts that are longer than a model's context, for scoring their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of ``context`` tokens over longer texts. Each begins ``stride`` tokens after the one before.

    A token is scored once, in the first window that holds it. A smaller stride gives it more context.
    """

    context: int = 1024
    stride: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.context:
            raise ConfigError(
                f"stride must be 1 or more and less than the context, not {self.stride} of {self.context}"
            )

    @classmethod
    def within(cls, limit: int | None, context: int | None = None, stride: int | None = None) -> Windows:
        """Return windows for a model whose context holds ``limit`` tokens. The default window has 1,024 tokens, or
        ``limit`` if that is less; the default stride is half a window.

        Raises ConfigError if the model's context is smaller than a window, which has at least two tokens.
        """
        if limit is not None and (context or 2) > limit:
            raise ConfigError(
                f"a window of {context or 2} tokens is more than the {limit} that the model's context holds beside the "
                "adapter's virtual tokens: ask for a smaller context"
            )
        size = context or (cls.context if limit is None else min(cls.context, limit))
        return cls(context=size, stride=max(size // 2, 1) if stride is None else stride)

    def spans(self, n_tokens: int) -> list[tuple[int, int, int]]:
        """Return (begin, first scored, end) of each window over a sequence. The first token is never scored."""
        spans, begin, scored = [], 0, 1
        while scored < n_tokens:
            end = min(begin + self.context, n_tokens)
            spans.append((begin, scored, end))
            begin, scored = begin + self.stride, end
        return spans
