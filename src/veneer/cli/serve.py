"""Implementation of ``veneer serve``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import typer

from veneer.cli.pages.serve import GIB, ServeArguments, bytes_of, cache_bytes_of, speculative_of
from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.model.memory.default_device import default_device, told_device
from veneer.ops.dispatch import kernel_isa
from veneer.plain.progress import waits_told
from veneer.serve.adapters.versions import Versions
from veneer.serve.http.app import make_app
from veneer.serve.http.folder import is_adapter, why_incomplete
from veneer.serve.http.key import ANYBODY, NOBODY
from veneer.serve.http.key_file import Keys
from veneer.serve.http.models import Catalogue
from veneer.serve.http.request_record import log_requests
from veneer.serve.http.roots import Roots
from veneer.serve.http.server import run
from veneer.serve.start import EngineOptions, start_engine
from veneer.store.bars import quiet
from veneer.store.merge_record import require_not_merged
from veneer.store.named_base import GivenBase
from veneer.store.source import resolve

_TOLD = 10  # adapters that are named when the server starts, and faults of each kind
_SECONDS = 1.0  # in which their configs and headers are read then


def serve(args: ServeArguments) -> None:
    """Load the base and serve it until the process ends."""
    if args.adapters is not None and is_adapter(args.adapters) and not any(map(is_adapter, args.adapters.iterdir())):
        raise ConfigError(
            f"--adapters {args.adapters} is itself an adapter: a folder of adapters is needed. Give its parent, "
            f"{args.adapters.resolve().parent}"
        )
    keys = None if args.keys is None else Keys(args.keys)
    roots = Roots(args.folders, args.allow_hub or ())
    options = EngineOptions(
        dtype=args.dtype, quantization="bitsandbytes" if args.load_in_4bit else None, seed=args.seed,
        max_model_len=args.max_model_len, max_loras=args.max_loras, general_runner=args.general_runner,
        quantize_head=args.quantize_head, speculative_config=speculative_of(args.speculative_config),
        adapter_cache_dir=args.adapter_cache,
        adapter_cache_bytes=cache_bytes_of(args.adapter_cache_gib, args.adapter_cache),
        kv_cache_memory_bytes=None if args.kv_gib is None else bytes_of("--kv-gib", args.kv_gib, GIB),
        disable_log_stats=False, served_model_name=args.served_model_name,
    )  # fmt: skip
    refused, warnings, n_left = _faults(args)
    _tell(list(refused.values()), "not served")
    _tell(warnings, "warning")
    if n_left:
        typer.echo(f"not read yet: {n_left:,} of the adapters; GET /v1/adapters reports their faults", err=True)
    with quiet(), waits_told(f"loading {args.model}"):
        engine = start_engine(args.model, options)
    if (device := default_device()).type != "cpu":
        typer.echo(f"device: {told_device(device)}", err=True)
    if engine.settings.why_general:
        typer.echo(f"slow: transformers' own code computes everything ({engine.settings.why_general})", err=True)
    if not kernel_isa():
        typer.echo("slow: the C++ kernels are not built, plain torch computes everything", err=True)
    catalogue = Catalogue(
        engine, [args.served_model_name or args.model], args.model, args.adapters, ANYBODY if keys is None else NOBODY
    )
    names = [name for name in catalogue.adapters() if name not in refused]
    more = f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else ""
    told = f"{', '.join(names[:_TOLD]) or 'none yet'}{more}"
    scheme = "http" if args.ssl_certfile is None else "https"
    if keys is None:
        typer.echo(_told_of_access(args.open_), err=True)
    typer.echo(f"base {catalogue.base}; adapters: {told}; {scheme}://{args.host}:{args.port}/v1", err=True)
    if args.log_requests:
        log_requests()
    app = make_app(
        engine, catalogue, args.limits, keys=keys, is_open=args.open_, roots=roots, metrics_prefix=args.metrics_prefix
    )
    run(app, args.host, args.port, args.drain_seconds, ssl_certfile=args.ssl_certfile, ssl_keyfile=args.ssl_keyfile)


def _told_of_access(is_open: bool) -> str:
    """Return a line that says what clients may do at a server without keys."""
    others = "others may ask" if is_open else "others are refused"
    return (
        f"no keys: this machine may do everything, {others}. Clients of a proxy that adds no header count as this "
        "machine: give --keys before you start one"
    )


def _tell(faults: Sequence[str], kind: str) -> None:
    """Print the first faults of a kind, and the number of the others."""
    for fault in faults[:_TOLD]:
        typer.echo(f"{kind}: {fault}", err=True)
    if len(faults) > _TOLD:
        typer.echo(f"{kind}: {len(faults) - _TOLD:,} more, see GET /v1/adapters", err=True)


def _faults(args: ServeArguments) -> tuple[dict[str, str], list[str], int]:
    """Return the reasons why adapters cannot be served, by folder name; warnings about other bases; and how many
    adapters were not read.

    Configs and headers are read for at most `_SECONDS` in all. Every folder is checked for missing files, and for an
    adapter that is already merged into the base.
    """
    place = resolve(args.model)
    names = [str(place), *filter(None, [args.served_model_name])]
    versions = Versions(served=GivenBase(args.model, names, place if isinstance(place, Path) else None))
    refused, warnings = dict[str, str](), list[str]()
    end, n_left = time.monotonic() + _SECONDS, 0
    for folder in sorted(args.adapters.iterdir()) if args.adapters is not None else ():
        if (reason := why_incomplete(folder)) is not None:
            refused[folder.name] = f"{folder} is no adapter: {reason}"
        elif is_adapter(folder):
            try:
                require_not_merged(place, folder)
                if time.monotonic() > end:
                    n_left += 1
                elif warning := versions.unread(folder).warning:
                    warnings.append(f"{folder}: {warning}")
            except (CompositionError, FormatError) as error:
                refused[folder.name] = str(error)
    return refused, warnings, n_left
