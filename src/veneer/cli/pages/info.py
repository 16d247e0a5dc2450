"""``veneer info``: facts about an adapter or a model, from its headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.facts import AsJson
from veneer.cli.work import verb
from veneer.disk.near import near_paths
from veneer.errors import ConfigError
from veneer.store.found import require_found

_SHOWN = 12  # names in a folder


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """Show facts about an adapter, a model or a run: method and targets, architecture and size, or status and losses.

    Only headers are read: no weight is loaded, and no GGUF file is converted.

    Example: veneer info runs/first/adapter
    """

    what: Annotated[
        str, typer.Argument(metavar="ADAPTER|MODEL|RUN", show_default=False, help="A folder, a .gguf file or a name.")
    ]
    as_json: AsJson = False

    def __post_init__(self) -> None:
        try:
            require_found(self.what)
        except ConfigError as error:
            raise _no_folder(self.what) or error from error


def _no_folder(what: str) -> ConfigError | None:
    """Return an error if a path does not exist but its parent folder does, otherwise None. Such a path cannot be a hub
    id.
    """
    path = Path(what).expanduser()
    if "/" not in what or not path.parent.is_dir() or path.exists():
        return None
    near, there = near_paths(path), sorted(each.name for each in path.parent.iterdir())[:_SHOWN]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it holds {', '.join(there) or 'nothing'}"
    return ConfigError(f"no run, adapter or model {what!r}: there is no such folder or file in {path.parent}; {hint}")


def _place(args: InfoArguments) -> str:
    """Return the name of the module that describes the given path. Runs have their own module, which does not import
    torch.
    """
    is_run = (Path(args.what).expanduser() / "run.json").is_file()
    return "veneer.cli.info_run" if is_run else "veneer.cli.info"


info = verb(InfoArguments, _place, "info")
