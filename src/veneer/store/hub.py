"""Look-up of models on the Hugging Face hub and in its cache, without torch."""

from __future__ import annotations

import difflib
import functools
import re
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT

from veneer.disk.near import near_paths
from veneer.errors import ConfigError
from veneer.store.known import KNOWN

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_SECONDS = 5
_CLOSE = 0.75


@functools.cache
def on_hub(name: str) -> Path | str:
    """Return a model's id if the hub answers for it. If the hub does not answer, return its folder in the hub's cache.

    The request fails after five seconds; the hub's own client tries for a minute. Results are kept in this process.
    With HF_HUB_OFFLINE the hub is not asked. Raises ConfigError, with similar names, for a name that cannot be an id
    and for an id that is unknown. Raises it too if the hub does not answer and its cache lacks the model.
    """
    if "/" not in name and difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=_CLOSE):
        raise ConfigError(_no_model(name))
    if not _HUB_ID.fullmatch(name) or Path(name).suffix == ".gguf":
        raise ConfigError(_no_model(name))
    answer = _asked(f"{ENDPOINT}/{name}/resolve/main/config.json")
    if answer is not None and answer.get("X-Error-Code") == "RepoNotFound":
        raise ConfigError(_no_model(name, f"{ENDPOINT} has no such model, or it is private (hf auth login)"))
    if answer is not None:
        return name
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    raise ConfigError(_no_model(name, f"{_silence()}, and its cache lacks it"))


def require_hub() -> None:
    """Raise ConfigError if a push is impossible: the hub does not answer, or nobody is logged in."""
    if _asked(ENDPOINT) is None:
        raise ConfigError(f"push_to_hub: {_silence()}: leave it out, and push the saved folder later")
    if get_token() is None:
        raise ConfigError("push_to_hub: nobody is logged in: run `hf auth login`, or leave it out")


def _no_model(name: str, of_hub: str = "") -> str:
    """Return the message for a model that was not found, with similar names, or the names that `veneer fetch` knows."""
    path = Path(name).expanduser()
    paths = near_paths(path)
    near = [*difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=_CLOSE), *paths]
    if paths or ("/" in name and path.parent.is_dir()):
        of_hub = ""  # a path is meant
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"`veneer fetch` knows {', '.join(sorted(KNOWN))}"
    )
    said = f", and {of_hub}" if of_hub else ""
    return f"no model {name!r}: there is no such folder or file{said}; {hint}"


class _RedirectsAreAnswers(urllib.request.HTTPRedirectHandler):
    """Handler that follows no redirect, because urllib would send the token to whatever host the redirect names."""

    def redirect_request(self, *args: Any) -> None:
        """Return no other request, so that the redirect is raised as an HTTPError."""


def _asked(address: str) -> Message | None:
    """Return the headers of the hub's response to a HEAD request, whatever its status. Return None in offline mode, or
    if the hub does not respond.
    """
    if is_offline_mode():
        return None
    request = urllib.request.Request(address, method="HEAD", headers=_authorization())
    opener = urllib.request.build_opener(_RedirectsAreAnswers)
    try:
        with opener.open(request, timeout=_SECONDS) as answer:
            headers: Message = answer.headers
            return headers
    except urllib.error.HTTPError as error:
        return error.headers
    except OSError:
        return None


def _silence() -> str:
    """Return the reason why the hub did not respond, as part of a message: offline mode, or no connection."""
    return f"HF_HUB_OFFLINE keeps {ENDPOINT} from being asked" if is_offline_mode() else f"{ENDPOINT} cannot be reached"


def _authorization() -> dict[str, str]:
    token = get_token()
    return {} if token is None else {"Authorization": f"Bearer {token}"}
