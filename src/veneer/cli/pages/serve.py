"""``veneer serve``: a server of a base and its adapters."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.pages import options
from veneer.cli.work import carried_out_by
from veneer.errors import ConfigError
from veneer.plan.presets import require_weights

_Adapters = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", show_default=False, help="Serve each adapter in this folder, by its folder's name."),
]
_Host = Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")]
_Port = Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="The port there.")]
_Open = Annotated[bool, typer.Option("--open", help="Let other machines in: there are no keys yet, anybody may ask.")]
_ServedName = Annotated[
    str | None, typer.Option(metavar="NAME", show_default=False, help="The base's name; by default MODEL.")
]
_MaxModelLen = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, show_default=False, help="Longest prompt with its answer, in tokens."),
]
_MaxLoras = Annotated[
    int | None, typer.Option(metavar="N", min=1, show_default=False, help="Adapters kept loaded at most.")
]
_KvGib = Annotated[
    float | None, typer.Option(metavar="X", show_default=False, help="Memory for keys and values, in GiB.")
]
_GeneralRunner = Annotated[
    bool,
    typer.Option("--general-runner", help="Compute by transformers' own code: slow, and what all else must equal."),
]
_QuantizeHead = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default=False, help="int8: keep the head in 8 bits, for half of its bytes."),
]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of requests that bring no seed.")]
_MaxBodyMib = Annotated[float, typer.Option(metavar="X", help="Largest body of a request, in MiB; beyond it 413.")]
_MaxChoices = Annotated[int, typer.Option(metavar="N", min=1, help="Prompts × n of one request; beyond it 400.")]
_MaxInFlight = Annotated[
    int, typer.Option(metavar="N", min=1, help="Choices of all requests that have not ended; beyond it 429.")
]
_TrustTemplates = Annotated[
    bool,
    typer.Option("--trust-request-templates", help="Run the chat template of a request, which may never end."),
]


@carried_out_by("veneer.cli.serve")
def serve(
    model: options.Model,
    adapters: _Adapters = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    open_: _Open = False,
    served_model_name: _ServedName = None,
    max_model_len: _MaxModelLen = None,
    max_loras: _MaxLoras = None,
    kv_gib: _KvGib = None,
    general_runner: _GeneralRunner = False,
    load_in_4bit: options.FourBit = False,
    quantize_head: _QuantizeHead = None,
    dtype: options.Dtype = "auto",
    seed: _Seed = 0,
    max_body_mib: _MaxBodyMib = 4.0,
    max_choices: _MaxChoices = 128,
    max_in_flight: _MaxInFlight = 1024,
    trust_request_templates: _TrustTemplates = False,
) -> None:
    """Answer OpenAI's API for a base and many adapters of every method, all in one batch.

    Example: veneer serve smollm2-135m-instruct --adapters runs/adapters
    """
    require_closed(host, open_)
    require_weights(model)


def require_closed(host: str, open_: bool) -> None:
    """Raise ConfigError for an address that other machines can reach, unless this is intended."""
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near and not open_:
        raise ConfigError(
            f"--host {host} lets other machines in, and there are no keys yet: add --open if that is meant"
        )
