"""HTTPS: a certificate of this machine, and those that cannot be used."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from patience import PATIENCE
from veneer.errors import ConfigError
from veneer.serve.http import server as http_server
from veneer.serve.http.listening import require_certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate of this machine, and its private key."""
    certificate, key = (tmp_path_factory.mktemp("tls") / name for name in ("cert.pem", "key.pem"))
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_https(certificate):
    app = FastAPI()
    app.get("/")(lambda: "fine")
    app.state.engine = SimpleNamespace(end_all=lambda: 0)
    app.state.lifecycle = SimpleNamespace(is_draining=False, is_drained=False, n_in_flight=0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        running = http_server.Server(app, ssl_certfile=certificate[0], ssl_keyfile=certificate[1])
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        trusted = ssl.create_default_context(cafile=certificate[0])
        port = listening.getsockname()[1]
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/", context=trusted, timeout=PATIENCE) as answer:
            assert answer.read() == b'"fine"'
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            urllib.request.urlopen(f"https://127.0.0.1:{port}/", timeout=PATIENCE)
        running.should_exit = True
        thread.join()


def test_a_certificate_that_cannot_be_used_is_told(certificate, tmp_path):
    require_certificate(None, None)
    require_certificate(*certificate)
    (tmp_path / "no").write_text("x")
    for cert, key in ((tmp_path / "none", certificate[1]), (certificate[0], tmp_path / "no"), certificate[::-1]):
        with pytest.raises(ConfigError, match=r"cannot be used: .* its own private key, both as PEM"):
            require_certificate(cert, key)
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-in", certificate[1], "-aes256", "-passout", "pass:x", "-out", locked],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="is encrypted"):
        require_certificate(certificate[0], locked)
