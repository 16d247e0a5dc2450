"""Options shared by several verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def unset(metavar: str, help: str, *names: str, **how: Any) -> Any:
    """Return an option whose help shows no default, because it has none or ``help`` names it.

    ``how``: further settings of typer.
    """
    return typer.Option(*names, metavar=metavar, show_default=False, help=help, **how)


_MODEL = typer.Argument(
    metavar="MODEL",
    show_default=False,
    help="A folder, a .gguf file, a fetched name, a hub id, or the folder of an adapter (its base is loaded too).",
)
Model = Annotated[str, _MODEL]
MaybeModel = Annotated[str | None, _MODEL]
Adapter = Annotated[Path | None, unset("FOLDER", "An adapter to put on it.", "--adapter", "-a")]
Adapters = Annotated[
    list[Path] | None, unset("FOLDER", "An adapter to put on it; may be given again.", "--adapter", "-a")
]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Keep the base in NF4 with double quantization.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
System = Annotated[str | None, unset("TEXT", "A system message.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(metavar="X", min=0.0, help="0 takes the likeliest token every time.")]
TopP = Annotated[
    float, typer.Option(metavar="X", min=0.0, max=1.0, help="Sample from the likeliest tokens of this total mass.")
]
TopK = Annotated[int, typer.Option(metavar="N", min=0, help="Sample from this many likeliest tokens; 0 for all.")]
Seed = Annotated[int | None, unset("N", "Makes sampling repeatable.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
