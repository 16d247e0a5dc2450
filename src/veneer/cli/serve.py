"""``veneer serve``: a server of a base and its adapters."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli import loading
from veneer.errors import CompositionError, ConfigError
from veneer.plan.presets import require_weights

_TOLD = 10  # adapters that are named when the server starts
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


def serve(
    model: loading.Model,
    adapters: _Adapters = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    open_: _Open = False,
    served_model_name: _ServedName = None,
    max_model_len: _MaxModelLen = None,
    max_loras: _MaxLoras = None,
    kv_gib: _KvGib = None,
    general_runner: _GeneralRunner = False,
    load_in_4bit: loading.FourBit = False,
    quantize_head: _QuantizeHead = None,
    dtype: loading.Dtype = "auto",
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
    from veneer.serve.http.server import require_free, run

    require_free(host, port)
    if adapters is not None and not adapters.is_dir():
        raise ConfigError(f"--adapters {adapters} is no folder: make it, adapters may come later")
    from veneer.serve.http.app import make_app
    from veneer.serve.http.limits import ServerLimits
    from veneer.serve.http.models import Catalogue
    from veneer.serve.start import EngineOptions, start_engine

    limits = ServerLimits(
        body_bytes=int(max_body_mib * 2**20), choices=max_choices, in_flight=max_in_flight,
        trust_request_templates=trust_request_templates,
    )  # fmt: skip
    options = EngineOptions(
        dtype=dtype, quantization="bitsandbytes" if load_in_4bit else None, max_model_len=max_model_len, seed=seed,
        max_loras=max_loras, general_runner=general_runner, quantize_head=quantize_head,
        kv_cache_memory_bytes=None if kv_gib is None else int(kv_gib * 2**30),
    )  # fmt: skip
    for line in _in_base(model, adapters):
        typer.echo(line, err=True)
    with loading.quiet():
        engine = start_engine(model, options)
    if engine.settings.why_general:
        typer.echo(f"slow: transformers' own code computes everything ({engine.settings.why_general})", err=True)
    from veneer.ops.dispatch import kernel_isa

    if not kernel_isa():
        typer.echo("slow: the C++ kernels are not built, plain torch computes everything", err=True)
    catalogue = Catalogue(engine, [served_model_name or model], model, adapters)
    names = list(catalogue.adapters())
    more = f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else ""
    told = f"{', '.join(names[:_TOLD]) or 'none yet'}{more}"
    typer.echo(f"base {catalogue.base}; adapters: {told}; http://{host}:{port}/v1", err=True)
    run(make_app(engine, catalogue, limits), host, port)


def _in_base(model: str, adapters: Path | None) -> Iterator[str]:
    """A line for each adapter in the folder that was merged into the base, and so is refused when it is asked for."""
    from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
    from veneer.store.merge_record import require_not_merged
    from veneer.store.source import resolve

    place = resolve(model)
    for folder in sorted(adapters.iterdir()) if adapters is not None else ():
        if all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
            try:
                require_not_merged(place, folder)
            except CompositionError as error:
                yield f"not served: {error}"


def require_closed(host: str, open_: bool) -> None:
    """Raise ConfigError for an address that others reach, unless that is meant."""
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near and not open_:
        raise ConfigError(
            f"--host {host} lets other machines in, and there are no keys yet: add --open if that is meant"
        )
