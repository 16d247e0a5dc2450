"""Limits on a client's requests. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits of requests. Raises ConfigError for a limit below 1, and if ``in_flight`` is below ``choices``.

    ``body_bytes``: the size of a body. ``choices``: the prompts of a request times its ``n``. ``in_flight``: the
    choices of all requests that have not ended. ``trust_request_templates``: a body may contain a chat template, a
    program that runs here.
    """

    body_bytes: int = 4 * 2**20
    choices: int = 128
    in_flight: int = 1024
    trust_request_templates: bool = False

    def __post_init__(self) -> None:
        for name in ("body_bytes", "choices", "in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.in_flight < self.choices:
            raise ConfigError(
                f"in_flight={self.in_flight} is below choices={self.choices}, so that some requests could never run: "
                "raise the first or lower the second"
            )
