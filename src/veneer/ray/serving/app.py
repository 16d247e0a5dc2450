"""Several replicas of a server on Ray Serve: ``serve run veneer.ray.serving.app:app model=MODEL replicas=2``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError
from veneer.ray.serving.arguments import arguments_of

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, Any]) -> Application:
    """Return the application for Ray Serve, by the fields of `RayArguments`.

    Raises ConfigError for wrong arguments, and if Ray is not installed.
    """
    given = arguments_of(args)
    try:
        from veneer.ray.serving.deployments import ROUTER, application  # which import Ray
    except ModuleNotFoundError as error:
        raise ConfigError("Ray Serve is not installed: pip install 'veneer[ray]'") from error
    return application(given, ROUTER)
