"""``veneer add-key``: a key of a server's clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.pages.options import unset
from veneer.cli.work import verb


@dataclass(frozen=True, kw_only=True)
class AddKeyArguments:
    """Make a key for a server, add its digest to a file of keys, and print the key, which is kept nowhere.

    Example: veneer add-key alice --file keys.yaml --sees 'sql-*'
    """

    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="Whose key it is.")]
    file: Annotated[Path, unset("FILE", "The file of keys, made if it is not there.", "--file", "-f")]
    scope: Annotated[list[str] | None, unset("NAME", "infer (the default) or admin; may be given again.")] = None
    sees: Annotated[list[str] | None, unset("PATTERN", "Adapters that it may see; may be given again.")] = None
    weight: Annotated[float | None, unset("X", "Its share among clients that wait, 1 by default.")] = None
    max_requests: Annotated[int | None, unset("N", "Choices in flight at most.", min=1)] = None
    max_tokens: Annotated[int | None, unset("N", "Tokens in flight at most.", min=1)] = None


add_key = verb(AddKeyArguments, "veneer.cli.add_key", "add_key")
