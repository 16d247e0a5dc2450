"""Two replicas on Ray Serve: an adapter has a home, keys hold, and a replica that dies takes its own requests alone."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from models import llama_config, word_tokenizer
from patience import PATIENCE
from veneer import LoraConfig, get_peft_model

pytest.importorskip("ray", reason="Ray is not installed: pip install 'veneer[ray]'")

pytestmark = [pytest.mark.full]
WORDS = [f"w{n}" for n in range(65)]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with two replicas, two adapters and a key that sees one of them."""
    import ray
    from ray import serve

    from veneer.ray.serving.app import app

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(base)
    word_tokenizer(WORDS).save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for name in ("a-sql", "b-sql"):
        model.save_pretrained(tmp_path / "adapters" / name)
    digest = hashlib.sha256(b"secret").hexdigest()
    entry = {"name": "all", "sha256": digest, "scopes": ["infer", "admin"], "adapters": ["a-*"]}
    (tmp_path / "keys.json").write_text(json.dumps([entry]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        serve.start(http_options={"port": port})
        given = {"model": str(base), "served_model_name": "tiny", "adapters": str(tmp_path / "adapters")}
        serve.run(app(given | {"keys": str(tmp_path / "keys.json"), "replicas": 2}))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def ask(url: str, path: str, body: Any = None, key: str = "secret") -> tuple[int, Any, str]:
    """The status, the headers and the text of an answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_two_replicas(served: str) -> None:
    import ray

    asked = {"model": "a-sql", "prompt": "w3 w5", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    status, headers, text = ask(served, "/v1/completions", asked)
    assert (status, len(headers.get_all("x-request-id"))) == (200, 1)
    whole = json.loads(text)["choices"][0]["text"]
    events = ask(served, "/v1/completions", asked | {"stream": True})[2].split("\n\n")
    parts = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole
    assert events[-2:] == ["data: [DONE]", ""]
    assert ask(served, "/v1/completions", asked, key="wrong")[0] == 401
    assert ask(served, "/v1/completions", asked | {"model": "b-sql"})[0] == 404  # the key does not see it
    assert ask(served, "/v1/load_lora_adapter", {"lora_name": "x"})[0] == 400
    assert [ask(served, path)[0] for path in ("/health", "/ready", "/v1/models")] == [200, 200, 200]

    told = ask(served, "/metrics")[2].splitlines()
    served_by = [line for line in told if line.startswith('veneer:adapter_requests_total{adapter="a-sql"')]
    assert [line.rsplit(" ")[-1] for line in served_by] == ["2.0"]  # one home has had both
    replicas = {line.partition('engine="')[2].partition('"')[0] for line in told if "num_requests_running{" in line}
    assert len(replicas) == 2
    home = served_by[0].partition('engine="')[2].partition('"')[0]

    stream = asked | {"max_tokens": 2000, "stream": True}
    request = urllib.request.Request(
        f"{served}/v1/completions", json.dumps(stream).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer secret"},
    )  # fmt: skip
    with urllib.request.urlopen(request) as answer:
        answer.readline()
    aborted = f'veneer:request_success_total{{engine="{home}",finished_reason="abort",model_name="tiny"}} 1.0'
    end_of_patience = time.monotonic() + PATIENCE
    while aborted not in ask(served, "/metrics")[2]:  # the client has left
        assert time.monotonic() < end_of_patience
    with urllib.request.urlopen(request) as answer:
        answer.readline()
        ray.kill(ray.get_actor(f"SERVE_REPLICA::default#engine#{home}", namespace="serve"))
        end = answer.read().decode().rstrip().split("\n\n")
    assert json.loads(end[-2].removeprefix("data: "))["error"]["code"] == 503
    assert end[-1] == "data: [DONE]"
    assert json.loads(ask(served, "/v1/completions", asked)[2])["choices"][0]["text"] == whole  # by the other
