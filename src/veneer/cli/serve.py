"""Implementation of ``veneer serve``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.errors import CompositionError, ConfigError
from veneer.ops.dispatch import kernel_isa
from veneer.serve.http.app import make_app
from veneer.serve.http.limits import ServerLimits
from veneer.serve.http.models import Catalogue
from veneer.serve.http.server import require_free, run
from veneer.serve.start import EngineOptions, start_engine
from veneer.store.bars import quiet
from veneer.store.merge_record import require_not_merged
from veneer.store.source import resolve

_TOLD = 10  # adapters that are named when the server starts


def serve(
    *,
    model: str,
    adapters: Path | None,
    host: str,
    port: int,
    open_: bool,
    served_model_name: str | None,
    max_model_len: int | None,
    max_loras: int | None,
    kv_gib: float | None,
    general_runner: bool,
    load_in_4bit: bool,
    quantize_head: str | None,
    dtype: str,
    seed: int,
    max_body_mib: float,
    max_choices: int,
    max_in_flight: int,
    trust_request_templates: bool,
) -> None:
    """Load the base and serve it until the process ends."""
    require_free(host, port)
    if adapters is not None and not adapters.is_dir():
        raise ConfigError(f"--adapters {adapters} is no folder: make it, adapters may come later")
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
    with quiet():
        engine = start_engine(model, options)
    if engine.settings.why_general:
        typer.echo(f"slow: transformers' own code computes everything ({engine.settings.why_general})", err=True)
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
    place = resolve(model)
    for folder in sorted(adapters.iterdir()) if adapters is not None else ():
        if all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
            try:
                require_not_merged(place, folder)
            except CompositionError as error:
                yield f"not served: {error}"
