"""``veneer env``: the installation, the hardware and the kernels in use."""

from __future__ import annotations

from veneer.cli.facts import AsJson
from veneer.cli.work import carried_out_by


@carried_out_by("veneer.cli.env")
def env(as_json: AsJson = False) -> None:
    """Print versions, CPU features, the kernels in use, threads and the cache folder.

    Example: veneer env
    """
