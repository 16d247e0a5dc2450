"""Handles uploads of a run to the hub, whose failure must not end the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub.errors import HfHubHTTPError

from veneer.errors import VeneerError

log = logging.getLogger(__name__)

# The root of the errors of the hub's HTTP library, whichever it is: lost connections, timeouts.
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__mro__[1])


@contextmanager
def failures_to_push_told(repository: str | None, folder: Path) -> Iterator[None]:
    """Enter a context that turns a failed upload into a warning. The files stay on disk, and the run continues."""
    try:
        yield
    except VeneerError:
        raise
    except (OSError, RuntimeError, ValueError, _HTTP_ERROR) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning(
            "the upload to %s failed (%s). Nothing is lost here, and the run goes on; `hf upload %s %s` sends it later",
            repository, reason, repository, folder,
        )  # fmt: skip
