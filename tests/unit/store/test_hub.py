"""Questions to the hub: which names are asked for, what its answers mean, and who gets the token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.store import hub as hub_module
from veneer.store.found import require_found
from veneer.store.hub import on_hub, require_hub


@dataclass
class Hub:
    """A hub that answers with one status and headers; ``asked`` are the paths and tokens of its requests."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def make_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Hub]]:
    """Starts hubs; veneer asks the one that was started last."""
    servers: list[ThreadingHTTPServer] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "get_token", lambda: "secret")
    monkeypatch.setattr(hub_module, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub_module, "try_to_load_from_cache", lambda name, file: None)

    def make(status: int = 200, **headers: str) -> Hub:
        made = Hub(status, headers)

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                made.asked.append((self.path, self.headers["Authorization"]))
                self.send_response(made.status)
                for name, value in made.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        made.address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub_module, "ENDPOINT", made.address)
        return made

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_letters_that_no_id_has_are_not_asked_for(make_hub: Callable[..., Hub]) -> None:
    hub = make_hub()
    for name in ("modèle", "org/modèle", "org/модель"):
        with pytest.raises(ConfigError, match=f"no model '{name}': there is no such folder or file"):
            require_found(name)
    assert not hub.asked


def test_a_mistyped_path_is_not_told_of_the_hub(
    make_hub: Callable[..., Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hub(404, X_Error_Code="RepoNotFound")
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, meant in (("models/bsae", "did you mean 'models/base'?"), ("models/other", "`veneer fetch` knows")):
        with pytest.raises(ConfigError, match=f"no model '{name}': there is no such folder or file; {meant}"):
            on_hub(name)


def test_an_id_like_a_known_name_is_asked_for(make_hub: Callable[..., Hub]) -> None:
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "unsloth/SmolLM2-135M-Instruct"):
        hub = make_hub()
        assert on_hub(name) == name
        assert hub.asked == [(f"/{name}/resolve/main/config.json", "Bearer secret")]
    make_hub(401, X_Error_Code="RepoNotFound")
    with pytest.raises(ConfigError, match=r"has no such model.*did you mean 'smollm2-135m-instruct'"):
        on_hub("SmolLM2/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_an_answer_and_its_target_gets_no_token(make_hub: Callable[..., Hub], status: int) -> None:
    other = make_hub()
    hub = make_hub(status, Location=other.address)
    assert on_hub("org/model") == "org/model"
    assert len(hub.asked) == 1
    assert not other.asked


def test_a_model_that_was_found_is_asked_for_once(make_hub: Callable[..., Hub]) -> None:
    hub = make_hub(404, X_Error_Code="RepoNotFound")
    with pytest.raises(ConfigError, match="has no such model"):
        require_found("org/model")
    hub.status, hub.headers = 200, {}
    for _ in range(2):
        require_found("org/model")
        assert on_hub("org/model") == "org/model"
    assert len(hub.asked) == 2


def test_offline_the_cache_alone_is_asked(
    make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = make_hub()
    monkeypatch.setattr(hub_module, "is_offline_mode", lambda: True)
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE keeps http.* from being asked, and its cache lacks it"):
        require_found("org/model")
    with pytest.raises(ConfigError, match=r"push_to_hub: HF_HUB_OFFLINE keeps"):
        require_hub()
    monkeypatch.setattr(hub_module, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    require_found("org/model")
    assert on_hub("org/model") == tmp_path
    assert not hub.asked
