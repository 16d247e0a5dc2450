"""``veneer env``: the installation, the hardware and the kernels in use."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.cli.facts import AsJson
from veneer.cli.work import verb


@dataclass(frozen=True, kw_only=True)
class EnvArguments:
    """Print versions, CPU features, the kernels in use, threads and the cache folder.

    Example: veneer env
    """

    as_json: AsJson = False


env = verb(EnvArguments, "veneer.cli.env", "env")
