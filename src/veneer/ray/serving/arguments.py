"""Arguments of the application for Ray Serve, which a command line or a file gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.errors import ConfigError
from veneer.plain.refusals import allowed
from veneer.serve.http.server_limits import ServerLimits
from veneer.serve.start import EngineOptions


class RayArguments(BaseModel):
    """Arguments of `ray.serving.app.app`. Paths must exist on every node.

    ``cpus``: number of cores, and of threads, of a replica. ``limits`` apply to each replica. ``engine_kwargs`` are
    fields of `EngineOptions`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    adapters: Path | None = None
    keys: Path | None = None
    served_model_name: str | None = None
    replicas: int = Field(default=1, ge=1)
    cpus: int = Field(default=1, ge=1)
    metrics_prefix: Literal["veneer", "vllm"] = "veneer"
    log_requests: bool = False
    limits: ServerLimits = ServerLimits()
    engine_kwargs: Mapping[str, Any] = {}

    @property
    def base(self) -> str:
        """Name under which the base is served: ``served_model_name``, or ``model`` if it is None."""
        return self.served_model_name or self.model

    def engine_options(self) -> EngineOptions:
        """Return the options of a replica's engine, which keeps statistics. Raises ConfigError."""
        own = {"disable_log_stats": False, "served_model_name": self.served_model_name}
        return EngineOptions(**{**own, **self.engine_kwargs})


def arguments_of(args: Mapping[str, Any]) -> RayArguments:
    """Return checked arguments. Raises ConfigError that lists all problems."""
    try:
        given = RayArguments.model_validate(args)
    except ValidationError as error:
        said = [f"{'.'.join(map(str, problem['loc']))}: {allowed([problem])}" for problem in error.errors()]
        raise ConfigError(
            f"{'; '.join(said)}. Known: {', '.join(RayArguments.model_fields)}; as limits: "
            f"{', '.join(ServerLimits.__dataclass_fields__)}"
        ) from error
    given.engine_options()
    return given
