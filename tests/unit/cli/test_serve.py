"""`veneer serve`: what it refuses before it starts. Its routes are tested in tests/unit/serve."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from launch import forked
from patience import PATIENCE
from veneer.cli.app import app
from veneer.cli.pages.serve import cache_bytes_of, require_closed, speculative_of
from veneer.errors import ConfigError
from veneer.export.merged import merge_checkpoint
from veneer.serve.http import listening, server


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_others_are_let_in_only_where_that_is_meant(host: str) -> None:
    with pytest.raises(ConfigError, match="add --open"):
        require_closed(host, False)
    require_closed(host, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is_always_let_in(host: str) -> None:
    require_closed(host, False)


def test_a_folder_that_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(model_folder), "--adapters", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "is no folder" in result.stderr


def test_cheap_refusals_come_before_torch_is_imported(tmp_path: Path) -> None:
    """In a process of its own, since it is about imports."""
    (tmp_path / "keys.yaml").write_text("[{name: x}]")
    (tmp_path / "cert.pem").write_text("none")
    cases = {
        "--adapters": "no folder", "--adapter-root": "no folder", "--keys keys.yaml": "no list of keys",
        "--port 99999": "65535", "--dtype float8": "unknown", "--quantize-head int4": "unknown",
        "--max-in-flight 5 --max-choices 7": "in_flight=5 is below choices=7", "--max-body-mib 0": "no size",
        "--ssl-certfile cert.pem --ssl-keyfile cert.pem": "--ssl-certfile", "--seed 3": "no model '/no/m'",
    }  # fmt: skip
    program = """
import json, sys
from typer.testing import CliRunner
from veneer.cli.app import app
for given in sys.argv[1:]:
    options = given.split() if " " in given else [given, "nowhere"]
    done = CliRunner().invoke(app, ["serve", "/no/m", *(() if "--port" in given else ("--port", "0")), *options])
    print(json.dumps([done.exit_code, " ".join(done.stderr.split()), "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *cases], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(code, has_torch) for code, _, has_torch in told] == [(2, False)] * len(cases)
    assert [said for said, (_, text, _) in zip(cases.values(), told, strict=True) if said not in text] == []


def test_an_adapter_in_place_of_a_folder_of_them(model_folder: Path, adapter_folder: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(model_folder), "--adapters", str(adapter_folder)])
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert "is itself an adapter: a folder of adapters is needed. Give its parent" in told


def test_a_context_that_the_model_has_not(model_folder: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(model_folder), "--max-model-len", "132"])
    assert result.exit_code == 2
    assert "context of 131" in result.stderr


def test_an_adapter_that_is_in_the_base_is_told_at_the_start(
    model_folder: Path, adapter_folder: Path, other_adapter: Path, tmp_path: Path
) -> None:
    merge_checkpoint(model_folder, adapter_folder, tmp_path / "merged")
    for name, folder in (("in_it", adapter_folder), ("other", other_adapter)):
        (tmp_path / "served").mkdir(exist_ok=True)
        (tmp_path / "served" / name).symlink_to(folder)
    options = ["--adapters", str(tmp_path / "served"), "--max-model-len", "132"]
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "merged"), *options])
    told = " ".join(result.stderr.split())
    # a busy machine tells first what it waits for
    assert f"not served: {tmp_path / 'merged'} has {tmp_path / 'served' / 'in_it'} in it already" in told
    assert "other in it" not in told


def test_a_folder_that_lacks_a_file_of_an_adapter_is_told_at_the_start(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "served" / "half").mkdir(parents=True)
    shutil.copy(adapter_folder / "adapter_config.json", tmp_path / "served" / "half")
    options = ["--adapters", str(tmp_path / "served"), "--max-model-len", "132"]
    result = CliRunner().invoke(app, ["serve", str(model_folder), *options])
    lacks = "it holds adapter_config.json and no adapter_model.safetensors. Copy that there"
    assert f"not served: {tmp_path / 'served' / 'half'} is no adapter: {lacks}" in " ".join(result.stderr.split())


def test_adapters_that_are_damaged_or_of_another_base_are_told_at_the_start(
    model_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    for name in ("cut", "far", "sound"):
        shutil.copytree(adapter_folder, served / name)
    weights, config = served / "cut" / "adapter_model.safetensors", served / "far" / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-7])
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(served)}))
    options = ["serve", str(model_folder), "--adapters", str(served), "--max-model-len", "132"]
    told = " ".join(CliRunner().invoke(app, options).stderr.split())
    assert f"not served: {weights} is damaged or was cut off" in told
    assert f"warning: {served / 'far'}: the adapter names the base {served}, and this is {model_folder}: " in told
    assert str(served / "sound") not in told
    for name in ("cut2", "far2"):
        shutil.copytree(served / name[:3], served / name)
    monkeypatch.setattr("veneer.cli.serve._TOLD", 1)
    told = " ".join(CliRunner().invoke(app, options).stderr.split())
    assert told.count("not served: ") == told.count("warning: ") == 2
    assert "not served: 1 more, see GET /v1/adapters" in told
    assert "warning: 1 more, see GET /v1/adapters" in told
    for name in ("cut2", "far2"):
        shutil.rmtree(served / name)
    monkeypatch.setattr("veneer.cli.serve._SECONDS", -1.0)  # thousands of adapters do not hold up the start
    told = " ".join(CliRunner().invoke(app, options).stderr.split())
    assert "not read yet: 3 of the adapters; GET /v1/adapters reports their faults" in told


def test_an_adapter_that_this_user_may_not_read_is_told_at_the_start(
    model_folder: Path, adapter_folder: Path, other_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_checkpoint(model_folder, adapter_folder, tmp_path / "merged")
    weights = shutil.copytree(other_adapter, tmp_path / "served" / "locked") / "adapter_model.safetensors"
    opens = Path.open

    def locked(path: Path, *how: Any, **more: Any) -> Any:
        if path == weights:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opens(path, *how, **more)

    monkeypatch.setattr(Path, "open", locked)
    for base in (model_folder, tmp_path / "merged"):
        options = ["--adapters", str(tmp_path / "served"), "--max-model-len", "132"]
        told = " ".join(CliRunner().invoke(app, ["serve", str(base), *options]).stderr.split())
        assert f"not served: {weights} cannot be read (Permission denied): give a file that" in told
        assert "context of 131" in told  # the start went on


@pytest.mark.parametrize("size", [math.nan, math.inf, 0.0, -1.0, 1e-12, 1e300])
def test_the_size_of_packed_adapters_is_one(size: float) -> None:
    with pytest.raises(ConfigError, match=r"--adapter-cache-gib .* is no size: give a number of GiB above 0"):
        cache_bytes_of(size, "folder")


def test_the_size_of_packed_adapters_is_that_of_a_folder() -> None:
    assert (cache_bytes_of(None, None), cache_bytes_of(None, "folder")) == (2**33, 2**33)
    assert cache_bytes_of(1.5, "folder") == 3 * 2**29
    with pytest.raises(ConfigError, match=r"--adapter-cache-gib 1\.5 is the size of no folder: give --adapter-cache"):
        cache_bytes_of(1.5, None)
    with pytest.raises(ConfigError, match="--adapter-cache '' names no folder"):
        cache_bytes_of(None, "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--adapter-cache-gib", "nan"], "'--adapter-cache-gib': nan must be a finite number."),
        (["--adapter-cache-gib", "1.5"], "--adapter-cache-gib 1.5 is the size of no folder"),
        (["--adapter-cache", ""], "--adapter-cache '' names no folder"),
    ],
)
def test_a_folder_of_packed_adapters_is_checked_before_a_model_is_looked_at(options: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["serve", "no-such-model", "--port", str(free_port()), *options])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {told}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_a_port_that_is_taken_is_told_before_a_model_is_looked_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "no-such-model", "--port", port])
    assert result.exit_code == 2
    assert result.stderr.split() == (
        f"error: port {port} is taken on 127.0.0.1: give another with --port, or stop what listens there".split()
    )


def test_limits_that_do_not_go_together_are_told_before_a_model_is_looked_at() -> None:
    command = ["serve", "no-such-model", "--port", str(free_port()), "--max-in-flight", "5", "--max-choices", "7"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "in_flight=5 is below choices=7" in result.stderr


@pytest.mark.parametrize(
    ("options", "others"), [([], "others are refused"), (["--open"], "others may ask"), (None, "")]
)
def test_a_server_without_keys_says_who_may_do_what(
    options: list[str] | None, others: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.cli.serve.run", lambda *_, **__: None)
    (tmp_path / "keys.yaml").write_text(f"[{{name: alice, sha256: {'a' * 64}}}]")
    given = ["--keys", str(tmp_path / "keys.yaml")] if options is None else options
    told = " ".join(CliRunner().invoke(app, ["serve", str(model_folder), "--port", "0", *given]).stderr.split())
    assert "base " in told
    assert ("no keys: " in told) == (options is not None)
    assert others in told
    assert ("a proxy that adds no header" in told) == (options is not None)


def test_an_address_that_is_not_this_machines_is_told() -> None:
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 --port 0: nothing can listen there"):
        listening.require_free("192.0.2.1", 0)


def test_a_port_that_is_taken_while_the_model_is_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(self: object) -> None:
        raise SystemExit(3)

    app: Any = SimpleNamespace(state=SimpleNamespace(sandboxes=()))
    monkeypatch.setattr(server.Server, "__init__", lambda *args, **options: None)
    monkeypatch.setattr(uvicorn.Server, "run", leaves)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="is taken on"):
        server.run(app, "127.0.0.1", taken.getsockname()[1], 0.0)
    with pytest.raises(SystemExit):
        server.run(app, "127.0.0.1", 0, 0.0)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        server.run(app, "127.0.0.1", 0, 0.0)


def test_an_interrupt_ends_it_with_its_code(model_folder: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    process = forked(["serve", str(model_folder), "--port", str(port)], log, {})
    try:
        while not answers(port):
            assert process.is_alive(), log.read_text()
            time.sleep(0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(PATIENCE)
    finally:
        process.kill()
    assert (process.exitcode, log.read_text().partition("/v1\n")[2]) == (130, "interrupted\n")


def answers(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200)
    except OSError:
        return False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ngram", "--speculative-config 'ngram' is no JSON object"),
        ("[3]", r"--speculative-config '\[3\]' is no JSON object"),
        ('{"method": "medusa", "num_speculative_tokens": 3}', "method='medusa' is not offered: 'ngram' is"),
    ],
)
def test_drafts_that_are_not_offered_are_told(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        speculative_of(text)


def test_drafts_are_given_in_vllms_words() -> None:
    given = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    assert speculative_of(json.dumps(given)) == given
    assert speculative_of(None) is None
