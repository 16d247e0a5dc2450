"""Ray cluster that a command names, and the check that it can be used. Ray itself is not imported."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.errors import ConfigError

ANSWER_SECONDS = 10.0
_FORM = re.compile(r"ray(?::(?:(?P<least>[1-9]\d*)-)?(?P<workers>[1-9]\d*)|(?P<address>://[^/\s]+:\d+))?")
_HOST = re.compile(r"(?:ray://)?(?P<host>[^/\s]+):(?P<port>\d+)")


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Ray cluster to train on, and the number of workers to take from it.

    ``address`` is that of its client server. If it is None, the cluster is that of RAY_ADDRESS, else this machine's,
    else a new one. ``n_workers`` is the number of workers; if it is None, all devices are taken. ``least`` is the
    smallest number to train with if fewer devices are available; if it is None, ``n_workers`` are needed.
    """

    address: str | None = None
    n_workers: int | None = None
    least: int | None = None


def place_of(text: str) -> RayCluster:
    """Return the cluster that ``ray``, ``ray:4``, ``ray:2-4`` or ``ray://host:port`` names.

    Raises ConfigError for any other text.
    """
    match = _FORM.fullmatch(text)
    least, workers = (int(match[key]) if match and match[key] else None for key in ("least", "workers"))
    if match is None or (least or 0) > (workers or 0):
        raise ConfigError(
            f"--on {text} is no place to train on: it is ray, ray:N (N workers), ray:M-N (M to N of them) or "
            "ray://host:port. Take one of them."
        )
    return RayCluster(match["address"] and f"ray{match['address']}", workers, least)


def require_ray(place: RayCluster, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if Ray is not installed, or if the cluster's address does not answer within 10 seconds."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed: pip install 'veneer[ray]'")
    address = place.address or environment.get("RAY_ADDRESS", "")
    match = _HOST.fullmatch(address)
    if match is None:  # none, or one of Ray's own words, such as auto
        return
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} within {ANSWER_SECONDS:.0f} s ({error}): start one there (ray start "
            "--head), or give another address (--on ray://host:port)."
        ) from error
