"""Address and certificate of a server, checked before anything is loaded. No torch."""

from __future__ import annotations

import asyncio
import errno
import ssl
from pathlib import Path

from veneer.errors import ConfigError


def require_free(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen on a port, for example if another process does."""
    try:
        asyncio.run(_listen(host, port))
    except OSError as error:
        told = f"--host {host} --port {port}: nothing can listen there ({error.strerror})"
        if error.errno == errno.EADDRINUSE:
            told = f"port {port} is taken on {host}: give another with --port, or stop what listens there"
        raise ConfigError(told) from error


def require_certificate(certificate: Path | None, key: Path | None) -> None:
    """Raise ConfigError if a certificate and its private key cannot be used; both may be None."""
    if certificate is None:
        return

    def encrypted() -> str:
        raise ConfigError(f"--ssl-keyfile {key} is encrypted, and nobody is there to type its password: decrypt it")

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, encrypted)
    except OSError as error:
        raise ConfigError(
            f"--ssl-certfile {certificate} with --ssl-keyfile {key} cannot be used: {error.strerror or error}. Give a "
            "certificate and its own private key, both as PEM"
        ) from error


async def _listen(host: str, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
    server.close()
