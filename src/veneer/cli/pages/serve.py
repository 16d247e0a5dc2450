"""``veneer serve``: a server of a base and its adapters."""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_model
from veneer.cli.pages import options
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.errors import ConfigError
from veneer.serve.http.key_file import read_keys
from veneer.serve.http.listening import require_certificate, require_free
from veneer.serve.http.server_limits import ServerLimits
from veneer.serve.schedule.speculation import SpeculativeConfig

MIB, GIB = 2**20, 2**30
_Open = Annotated[
    bool, typer.Option("--open", help="Answer other machines and proxies too, without keys: anybody may ask.")
]
_AdapterRoots = Annotated[
    list[Path] | None, unset("FOLDER", "Let admins load adapters from below this folder too; may be given again.")
]
_AllowHub = Annotated[
    list[str] | None, unset("PATTERN", "Let admins load adapters from the hub, such as 'me/*'; may be given again.")
]
_GeneralRunner = Annotated[
    bool,
    typer.Option("--general-runner", help="Compute by transformers' own code: slow, and what all else must equal."),
]
_MaxBodyMib = Annotated[float, typer.Option(metavar="X", help="Largest body of a request, in MiB; beyond it 413.")]
_MaxChoices = Annotated[int, typer.Option(metavar="N", min=1, help="Prompts × n of one request; beyond it 400.")]
_MaxInFlight = Annotated[
    int, typer.Option(metavar="N", min=1, help="Choices of all requests that have not ended; beyond it 429.")
]
_TrustTemplates = Annotated[
    bool,
    typer.Option("--trust-request-templates", help="Run chat templates of requests, 5 s at most."),
]


class MetricsPrefix(StrEnum):
    """Prefix of the names of metrics."""

    VENEER = "veneer"
    VLLM = "vllm"


_MetricsPrefix = Annotated[
    MetricsPrefix,
    typer.Option(metavar="NAME", help="First part of the names in /metrics: veneer, or vllm for routers."),
]
_LogRequests = Annotated[
    bool, typer.Option("--log-requests", help="Write a line of JSON to stderr for each request, without its text.")
]
_DrainSeconds = Annotated[
    float, typer.Option(metavar="X", min=0.0, help="Time that requests in flight have to end after SIGTERM.")
]


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Answer OpenAI's API for a base and many adapters of every method, all in one batch.

    Example: veneer serve smollm2-135m-instruct --adapters runs/adapters
    """

    model: options.Model
    adapters: Annotated[Path | None, unset("FOLDER", "Serve each adapter in this folder, by its folder's name.")] = None
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="The port there.")] = 8000
    open_: _Open = False
    keys: Annotated[Path | None, unset("FILE", "Keys of the clients, of which each needs one; see veneer add-key.")] = (
        None
    )
    ssl_certfile: Annotated[Path | None, unset("FILE", "Certificate for HTTPS.")] = None
    ssl_keyfile: Annotated[Path | None, unset("FILE", "Private key of the certificate.")] = None
    adapter_root: _AdapterRoots = None
    allow_hub: _AllowHub = None
    served_model_name: Annotated[str | None, unset("NAME", "The base's name; by default MODEL.")] = None
    max_model_len: Annotated[int | None, unset("N", "Longest prompt with its answer, in tokens.", min=1)] = None
    max_loras: Annotated[int | None, unset("N", "Adapters kept loaded at most.", min=1)] = None
    kv_gib: Annotated[float | None, unset("X", "Memory for keys, values and adapters, in GiB.")] = None
    adapter_cache: Annotated[str | None, unset("FOLDER", "Keep packed adapters here, and load them from here.")] = None
    adapter_cache_gib: Annotated[float | None, unset("X", "Largest size of that folder, in GiB; by default 8.")] = None
    general_runner: _GeneralRunner = False
    speculative_config: Annotated[str | None, unset("JSON", "Tokens to try at once: vLLM's fields, for n-grams.")] = (
        None
    )
    load_in_4bit: options.FourBit = False
    quantize_head: Annotated[str | None, unset("NAME", "int8: keep the head in 8 bits, for half of its bytes.")] = None
    dtype: options.Dtype = "auto"
    seed: Annotated[int, typer.Option(metavar="N", help="Of requests that bring no seed.")] = 0
    max_body_mib: _MaxBodyMib = 4.0
    max_choices: _MaxChoices = 128
    max_in_flight: _MaxInFlight = 1024
    trust_request_templates: _TrustTemplates = False
    metrics_prefix: _MetricsPrefix = MetricsPrefix.VENEER
    log_requests: _LogRequests = False
    drain_seconds: _DrainSeconds = 20.0

    def __post_init__(self) -> None:
        require_closed(self.host, self.open_ or self.keys is not None)
        require_pair(self.ssl_certfile, self.ssl_keyfile)
        require_certificate(self.ssl_certfile, self.ssl_keyfile)
        require_free(self.host, self.port)
        for folder in self.folders:
            if not folder.is_dir():
                option = "--adapters" if folder is self.adapters else "--adapter-root"
                raise ConfigError(f"{option} {folder} is no folder: make it, adapters may come later")
        if self.keys is not None:
            read_keys(self.keys)
        require_one_of("--dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        require_one_of("--quantize-head", self.quantize_head, (None, "int8"))
        speculative_of(self.speculative_config)
        _ = self.limits
        if self.kv_gib is not None:
            bytes_of("--kv-gib", self.kv_gib, GIB)
        cache_bytes_of(self.adapter_cache_gib, self.adapter_cache)
        require_model(self.model)

    @property
    def folders(self) -> list[Path]:
        """Folders from which adapters are served or loaded."""
        return [*([] if self.adapters is None else [self.adapters]), *(self.adapter_root or ())]

    @property
    def limits(self) -> ServerLimits:
        """Limits of requests. Raises ConfigError for an invalid ``--max-body-mib``."""
        return ServerLimits(
            body_bytes=bytes_of("--max-body-mib", self.max_body_mib, MIB), choices=self.max_choices,
            in_flight=self.max_in_flight, trust_request_templates=self.trust_request_templates,
        )  # fmt: skip


serve = verb(ServeArguments, "veneer.cli.serve", "serve", hears=False)


def speculative_of(text: str | None) -> dict[str, object] | None:
    """Return the fields of ``--speculative-config``. Raises ConfigError for a text that is not a JSON object, and for
    values that are not supported.
    """
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(
            f"--speculative-config {text!r} is no JSON object: its fields are vLLM's, for n-grams. Give for example "
            '\'{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}\'.'
        )
    SpeculativeConfig(**fields)
    return fields


def cache_bytes_of(gib: float | None, folder: str | None) -> int:
    """Return the number of bytes that ``--adapter-cache-gib`` allows, by default 8 GiB. Raises ConfigError for an
    invalid size, an empty folder name, and a size without a folder.
    """
    if folder == "":
        raise ConfigError("--adapter-cache '' names no folder: give one, or leave the option out")
    if folder is None and gib is not None:
        raise ConfigError(f"--adapter-cache-gib {gib} is the size of no folder: give --adapter-cache FOLDER too")
    return bytes_of("--adapter-cache-gib", 8.0 if gib is None else gib, GIB)


def bytes_of(option: str, given: float, unit: int) -> int:
    """Return the number of bytes that an option's value means in ``unit`` (`MIB` or `GIB`). Raises ConfigError for an
    invalid size.
    """
    size = given * unit
    if not 1 <= size < math.inf:
        raise ConfigError(
            f"{option} {given} is no size: give a number of {'GiB' if unit == GIB else 'MiB'} above 0, for example 8"
        )
    return int(size)


def require_one_of(option: str, given: str | None, allowed: Sequence[str | None]) -> None:
    """Raise ConfigError for a value that an option does not allow."""
    if given not in allowed:
        raise ConfigError(f"{option} {given} is unknown: give {', '.join(filter(None, allowed))}")


def require_closed(host: str, open_: bool) -> None:
    """Raise ConfigError for an address that other machines can reach, unless ``open_`` is set."""
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near and not open_:
        raise ConfigError(
            f"--host {host} lets other machines in, and without keys anybody may ask: give --keys FILE, or add --open "
            "if that is meant"
        )


def require_pair(certificate: Path | None, key: Path | None) -> None:
    """Raise ConfigError if only one of the two files for HTTPS is given."""
    if (certificate is None) != (key is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile belong together: give both, or neither for HTTP")
