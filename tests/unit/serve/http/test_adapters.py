"""Adapters that are loaded, unloaded, pinned and listed over HTTP, and the places from which they may come."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.unit.serve.conftest import save_adapter

from patience import PATIENCE
from veneer import LLM, LoraConfig, LoRARequest, SamplingParams
from veneer.contract import source
from veneer.errors import ConfigError
from veneer.serve.http.adapters import _LOOKS, AdapterRoutes
from veneer.serve.http.roots import Roots

from .test_server import PROMPT, Server

GREEDY = {"temperature": 0, "max_tokens": 9}


@pytest.fixture(scope="module")
def root(adapters, tmp_path_factory) -> Path:
    """A root with adapters, and two folders that are none."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("lora", "rslora", "ia3", "dora", "prefix"):
        shutil.copytree(adapters[name].path, folder / "deep" / name)
    save_adapter(folder / "gpt2", LoraConfig(r=3, target_modules=["c_attn"]), family="gpt2")
    shutil.copytree(adapters["lora"].path, folder / "pickled")
    (folder / "pickled" / "adapter_model.safetensors").rename(folder / "pickled" / "adapter_model.bin")
    return folder


@pytest.fixture(scope="module")
def served(adapters, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(adapters["vera"].path, folder / "vera")
    return folder


@pytest.fixture(scope="module")
def server(base_folder, served, root) -> Iterator[Server]:
    running = Server(base_folder, served, roots=Roots([served, root], ["me/*"]))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def llm(base_folder) -> LLM:
    return LLM(base_folder)


def change(server: Server, verb: str, **body: Any) -> tuple[int, str]:
    """The status of a load or an unload, with the text of the answer or the message of the error."""
    asked = urllib.request.Request(
        f"{server.url}/v1/{verb}_lora_adapter", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def card(server: Server, name: str, verb: str = "") -> dict[str, Any]:
    url = f"{server.url}/v1/adapters/{urllib.parse.quote(name)}{verb}"
    with urllib.request.urlopen(urllib.request.Request(url, method="POST" if verb else "GET")) as answer:
        return json.load(answer)


def listed(server: Server, query: str = "") -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/v1/adapters{query}") as answer:
        return json.load(answer)


def text(server: Server, name: str, **more: Any) -> str:
    return server.client.completions.create(model=name, prompt=PROMPT, **GREEDY, **more).choices[0].text


def expected(llm: LLM, adapter: LoRARequest, **more: Any) -> str:
    params = SamplingParams(**{**GREEDY, **more})
    return llm.generate([PROMPT], params, lora_request=adapter, use_tqdm=False)[0].outputs[0].text


def test_an_adapter_is_loaded_listed_asked_for_and_unloaded(server, root, llm, adapters):
    n_before = len(server.engine.runner.loaded)
    path = root / "deep" / "lora"
    assert change(server, "load", lora_name="a/b", lora_path=str(path)) == (
        200, "Success: LoRA adapter 'a/b' added successfully.",
    )  # fmt: skip
    told = card(server, "a/b")
    assert told["bytes"] > 0
    assert {**told, "bytes": 0} == {
        "id": "a/b", "object": "adapter", "source": "path", "root": str(path), "method": "LORA", "rank": 3, "bytes": 0,
        "residency": "resident", "pinned": False, "requests": 0, "hits": 0, "error": None, "warning": None,
    }  # fmt: skip
    assert text(server, "a/b") == expected(llm, adapters["lora"])
    told = card(server, "a/b")
    assert (told["requests"], told["hits"]) == (1, 1)
    models = {model.id: model for model in server.client.models.list().data}
    assert list(models) == ["tiny", "alias", "a/b", "vera"]
    assert (models["a/b"].root, models["a/b"].parent) == (str(path), "tiny")
    again = change(server, "load", lora_name="a/b", lora_path=str(path))
    assert again[0] == 400
    assert "has already been loaded" in again[1]
    assert change(server, "load", lora_name="a/b", lora_path=str(path), load_inplace=True)[0] == 200
    assert change(server, "unload", lora_name="a/b", lora_int_id=3) == (
        200, "Success: LoRA adapter 'a/b' removed successfully.",
    )  # fmt: skip
    assert server.engine.pool.state("a/b") is None
    server.wait(lambda: len(server.engine.runner.loaded) == n_before)
    assert change(server, "unload", lora_name="a/b")[0] == 404
    assert server.post("/v1/completions", {"model": "a/b", "prompt": "x"})[0] == 404


def test_requests_in_flight_keep_their_version(server, root, llm, adapters, monkeypatch):
    """While their adapter is replaced, and unloaded: each is answered before the stream ends."""
    server.hold(monkeypatch)
    n_before = len(server.engine.runner.loaded)
    assert change(server, "load", lora_name="x", lora_path="deep/lora")[0] == 200
    long = {"max_tokens": 70, "ignore_eos": True}
    right = {name: expected(llm, adapters[name], **long) for name in ("lora", "ia3")}

    def begin() -> tuple[Any, str]:
        stream = server.client.completions.create(
            model="x", prompt=PROMPT, temperature=0, max_tokens=70, stream=True, extra_body={"ignore_eos": True}
        )
        return stream, next(iter(stream)).choices[0].text

    first, first_text = begin()
    assert change(server, "load", lora_name="x", lora_path="deep/ia3", load_inplace=True)[0] == 200
    second, second_text = begin()
    assert change(server, "unload", lora_name="x")[0] == 200
    assert len(server.engine.scheduler.running) == 2
    assert server.post("/v1/completions", {"model": "x", "prompt": "x"})[0] == 404
    monkeypatch.undo()
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200  # the held step begins
    assert first_text + "".join(part.choices[0].text for part in first) == right["lora"]
    assert second_text + "".join(part.choices[0].text for part in second) == right["ia3"]
    server.wait(lambda: len(server.engine.runner.loaded) == n_before)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"lora_path": "nowhere"}, 404, "there is no adapter at lora_path='nowhere'"),
        ({"lora_path": "pickled"}, 404, "adapter_model.safetensors"),
        ({"lora_path": "deep"}, 404, "there is no adapter"),
        ({"lora_path": "gpt2"}, 400, "c_attn"),
        ({"lora_path": "deep/../deep/lora"}, 400, "holds '..'"),
        ({"lora_path": "/etc"}, 400, "lora_path='/etc' is not allowed"),
        ({"lora_path": "you/lora"}, 404, "there is no adapter"),
        ({"lora_path": "deep/lora\0"}, 400, "is no path"),
        ({"lora_path": ""}, 400, "is no path"),
        ({"lora_path": "x" * 5000}, 400, "is no path"),
        ({"lora_path": "deep/lora", "lora_name": ""}, 400, "lora_name='' is no name"),
        ({"lora_path": "deep/lora", "lora_name": "a\nb"}, 400, "is no name"),
        ({"lora_path": "deep/lora", "lora_name": "mix/{}"}, 400, "not beginning with mix/"),
        ({"lora_path": "deep/lora", "lora_name": "tiny"}, 400, "has already been loaded"),
        ({"lora_path": "deep/lora", "lora_name": "tiny", "load_inplace": True}, 400, "has already been loaded"),
        ({"lora_path": "deep/lora", "lora_name": "vera"}, 400, "loaded, from the server's own"),
        ({"lora_path": "deep/lora", "lora_name": "vera", "load_inplace": True}, 400, "own folder. Replace its files"),
        ({}, 400, "give either lora_path or adapter"),
        ({"lora_path": "deep/lora", "adapter": {"vera": 1}}, 400, "give either lora_path or adapter"),
        ({"adapter": {"vera": 0.5, "nobody": 1}}, 404, "no adapter 'nobody'"),
        ({"adapter": {}}, 400, "there are no parts"),
        ({"lora_path": "deep/lora", "in_place": True}, 400, "unknown field 'in_place'; did you mean 'load_inplace'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_loaded_is_told_and_changes_nothing(server, body, status, said):
    names = [model.id for model in server.client.models.list().data]
    found = change(server, "load", **{"lora_name": "bad", **body})
    assert found[0] == status
    assert said in found[1]
    assert [model.id for model in server.client.models.list().data] == names
    assert server.engine.pool.state("bad") is None


def test_a_damaged_adapter_in_place_of_a_good_one_leaves_it(server, root, adapters, llm):
    damaged = root / "damaged"
    shutil.copytree(adapters["lora"].path, damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"\x07" * 31)
    assert change(server, "load", lora_name="x", lora_path="deep/lora")[0] == 200
    found = change(server, "load", lora_name="x", lora_path="damaged", load_inplace=True)
    assert found[0] == 400
    assert "damaged" in found[1]
    assert text(server, "x") == expected(llm, adapters["lora"])
    assert change(server, "unload", lora_name="x")[0] == 200


def test_a_mix_has_a_name_as_long_as_its_parts_are_there(server, root, llm, adapters):
    for name in ("lora", "rslora"):
        assert change(server, "load", lora_name=name, lora_path=f"deep/{name}")[0] == 200
    weights = {"lora": 0.7, "rslora": 0.3}
    assert change(server, "load", lora_name="both", adapter=weights)[0] == 200
    mix = LoRARequest.mix("mix", 1, [(adapters[name], weight) for name, weight in weights.items()])
    assert text(server, "both") == expected(llm, mix)
    told = card(server, "both")
    assert (told["source"], told["method"], told["rank"]) == ("mix", "mix", 5)
    assert json.loads(told["root"]) == weights
    refused = change(server, "load", lora_name="more", adapter={"both": 0.5})
    assert refused[0] == 400
    assert "no mix" in refused[1]
    no_sum = change(server, "load", lora_name="more", adapter={"vera": 0.5, "ia3": 1})
    assert no_sum[0] == 404
    assert change(server, "unload", lora_name="rslora")[0] == 200
    assert server.post("/v1/completions", {"model": "both", "prompt": "x"})[0] == 404
    for name in ("lora", "both"):
        change(server, "unload", lora_name=name)
    assert [model.id for model in server.client.models.list().data] == ["tiny", "alias", "vera"]


def test_one_of_the_folder_is_unloaded_and_comes_back(server, served, root, llm, adapters):
    assert change(server, "unload", lora_name="vera")[0] == 200
    assert server.post("/v1/completions", {"model": "vera", "prompt": "x"})[0] == 404
    assert [model.id for model in server.client.models.list().data] == ["tiny", "alias"]
    assert change(server, "load", lora_name="vera", lora_path=str(served / "vera"))[0] == 200
    assert card(server, "vera")["source"] == "folder"
    assert text(server, "vera") == expected(llm, adapters["vera"])
    assert change(server, "unload", lora_name="vera")[0] == 200
    shutil.rmtree(served / "vera")
    assert server.post("/v1/completions", {"model": "vera", "prompt": "x"})[0] == 404
    shutil.copytree(adapters["vera"].path, served / "vera")
    assert text(server, "vera") == expected(llm, adapters["vera"])


def test_a_pin_outlives_a_replacement_and_ends(server, root):
    assert change(server, "load", lora_name="x", lora_path="deep/lora")[0] == 200
    assert card(server, "x", "/pin")["pinned"] is True
    assert server.engine.pool.pinned_bytes == card(server, "x")["bytes"]
    assert change(server, "load", lora_name="x", lora_path="deep/ia3", load_inplace=True)[0] == 200
    told = card(server, "x")
    assert (told["pinned"], told["method"], told["residency"]) == (True, "IA3", "resident")
    assert card(server, "x", "/unpin")["pinned"] is False
    assert card(server, "vera", "/pin")["residency"] == "resident"  # no request has asked for it
    assert card(server, "vera", "/unpin")["pinned"] is False
    assert change(server, "unload", lora_name="x")[0] == 200
    assert server.post("/v1/adapters/tiny/pin", {})[0] == 404
    assert server.post("/v1/adapters/x/unpin", {})[0] == 404


def test_adapters_are_listed_in_parts(server, served):
    (served / "wrong").mkdir()
    for file, content in (("adapter_config.json", "{"), ("adapter_model.safetensors", "")):
        (served / "wrong" / file).write_text(content)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        card(server, "nobody")
    assert card(server, "wrong")["error"]
    first, rest = listed(server, "?limit=1"), listed(server, "?limit=7&after=vera")
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (["vera"], True)
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (["wrong"], False)
    shutil.rmtree(served / "wrong")
    server.wait(lambda: [each["id"] for each in listed(server)["data"]] == ["vera"])


def test_lists_of_adapters_leave_threads_for_others(server, monkeypatch):
    inside, most = list[int](), list[int]()
    own = AdapterRoutes._card

    def slow(self: AdapterRoutes, name: str, state: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return own(self, name, state)

    monkeypatch.setattr(AdapterRoutes, "_card", slow)
    with ThreadPoolExecutor(8) as clients:
        told = list(clients.map(listed, [server] * 8))
    assert told == [told[0]] * 8
    assert max(most) <= _LOOKS


def test_a_folder_that_lacks_a_file_is_told_where_it_is_missed(server, served):
    (served / "half").mkdir()
    (served / "half" / "adapter_config.json").write_text("{}")
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        card(server, "half")
    lacks = "it holds adapter_config.json and no adapter_model.safetensors"
    assert f"no model 'half': its folder is no adapter, {lacks}" in json.load(refused.value)["error"]["message"]
    server.wait(lambda: listed(server)["incomplete"])
    incomplete = listed(server)["incomplete"]
    assert list(incomplete) == ["half"]
    assert lacks in incomplete["half"]
    shutil.rmtree(served / "half")


def test_one_change_of_a_name_at_a_time(server, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    folder = Roots.folder

    def slow(self: Roots, given: str, hides: Any) -> Path:
        begun.set()
        assert may_end.wait(PATIENCE)
        return folder(self, given, hides)

    monkeypatch.setattr(Roots, "folder", slow)
    found: list[Any] = []
    loading = threading.Thread(
        target=lambda: found.append(change(server, "load", lora_name="x", lora_path="deep/lora"))
    )
    loading.start()
    assert begun.wait(PATIENCE)
    assert change(server, "load", lora_name="x", lora_path="deep/ia3")[0] == 409
    assert change(server, "unload", lora_name="x")[0] == 409
    may_end.set()
    loading.join()
    assert found[0][0] == 200
    assert change(server, "unload", lora_name="x")[0] == 200


def test_an_id_on_the_hub_is_fetched_if_it_is_allowed(server, root, llm, adapters, monkeypatch, tmp_path):
    """A stand-in for the hub's client, which has one repository; a folder of the same name is not looked at."""
    threads = list[threading.Thread]()

    def download(repo: str, **options: Any) -> str:
        threads.append(threading.current_thread())
        if repo != "me/lora":
            raise source.LocalEntryNotFoundError("Got: no connection")
        return str(root / "deep" / "lora")

    monkeypatch.setattr(source, "snapshot_download", download)
    shutil.copytree(adapters["ia3"].path, tmp_path / "me" / "lora")
    monkeypatch.chdir(tmp_path)
    assert change(server, "load", lora_name="x", lora_path="me/lora")[0] == 200
    told = card(server, "x")
    assert (told["source"], told["root"], told["method"]) == ("hub", "me/lora", "LORA")
    assert text(server, "x") == expected(llm, adapters["lora"])
    assert change(server, "unload", lora_name="x")[0] == 200
    refused = change(server, "load", lora_name="x", lora_path="me/other")
    assert refused[0] == 400
    assert "not on the hub: no connection" in refused[1]
    assert change(server, "load", lora_name="x", lora_path="you/lora")[0] != 200
    assert len(threads) == 2
    assert server.thread not in threads


def raises(error: Exception) -> str:
    raise error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_download_that_meets_a_defect_is_answered_and_its_name_free_again(server, monkeypatch):
    monkeypatch.setattr(source, "snapshot_download", lambda repo, **options: raises(ArithmeticError("odd")))
    for _ in range(2):
        refused = change(server, "load", lora_name="x", lora_path="me/lora")
        assert (refused[0], "defect" in refused[1]) == (500, True)


def test_an_adapter_that_names_another_base_is_told(server, root, adapters, caplog):
    shutil.copytree(adapters["rslora"].path, root / "foreign")
    file = root / "foreign" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(root)}))
    said = f"the adapter names the base {root}, and this is {server.engine.settings.base}: the result is wrong"
    status, told = change(server, "load", lora_name="far", lora_path="foreign")
    assert (status, told.startswith(f"Success: LoRA adapter 'far' added successfully. Warning: {said}")) == (200, True)
    assert f"{root / 'foreign'}: {said}" in caplog.text
    cards = {each.id: each for each in server.client.models.list().data}
    for shown in (cards["far"].warning, server.client.models.retrieve("far").warning, card(server, "far")["warning"]):
        assert shown.startswith(said)
    assert not hasattr(cards["vera"], "warning")
    assert change(server, "load", lora_name="both", adapter={"far": 1, "vera": 1})[1].count(said) == 1
    assert card(server, "both")["warning"].startswith(said)
    for name in ("both", "far"):
        assert change(server, "unload", lora_name=name)[0] == 200


def test_a_link_to_a_loaded_adapter_is_shown_as_loaded(server, served):
    assert change(server, "load", lora_name="vera", lora_path=str(served / "vera"), load_inplace=True)[0] == 200
    (served / "linked").symlink_to(served / "vera")
    server.wait(lambda: "linked" in {each.id for each in server.client.models.list().data})
    shown, own = card(server, "linked"), card(server, "vera")
    assert own["residency"] == "resident"
    assert {**shown, "id": 0, "root": 0} == {**own, "id": 0, "root": 0}
    (served / "linked").unlink()


def test_there_is_a_place_or_the_reason_why_not(base_folder, adapters):
    llm = LLM(base_folder, max_loras=1)
    engine = llm.engine
    first, second = engine.preload(adapters["lora"], pins=True), engine.preload(adapters["ia3"])
    while not (first.done() and second.done()):
        if engine.has_work or engine.wait(PATIENCE):
            engine.step()
    assert first.result() is None
    with pytest.raises(ConfigError, match="cannot load the adapter: 1 adapters are loaded, 1 of them pinned"):
        second.result()
    engine.pool.unpin("lora")
    third = engine.preload(adapters["ia3"])
    while not third.done():
        if engine.has_work or engine.wait(PATIENCE):
            engine.step()
    assert third.result() is None
    assert engine.pool.resident == [engine.pool.names["ia3"].id]


def test_a_request_on_its_way_does_not_bring_a_dropped_name_back(base_folder, llm, adapters):
    engine = LLM(base_folder).engine

    def answered(number: int) -> str:
        request = LoRARequest("late", number, adapters["vera"].path)
        asked = engine.asked(PROMPT, list(PROMPT.encode()), SamplingParams(**GREEDY), request)
        if number == 7:
            engine.forget("late", 7)
        engine.submit(asked)
        outputs = list[Any]()
        while not (outputs and outputs[-1].finished):
            if engine.has_work or engine.wait(PATIENCE):
                outputs += engine.step()
        return outputs[-1].outputs[0].text

    assert answered(7) == expected(llm, adapters["vera"])
    assert (engine.pool.names, dict(engine.runner.loaded)) == ({}, {})
    assert answered(8) == expected(llm, adapters["vera"])
    assert (list(engine.pool.names), len(engine.runner.loaded)) == (["late"], 1)


def test_a_name_that_is_dropped_while_it_is_loaded_stays_dropped(base_folder, adapters):
    engine = LLM(base_folder).engine
    told = engine.preload(LoRARequest("gone", 7, adapters["vera"].path), pins=True)
    engine.forget("gone", 7)
    while not told.done():
        if engine.has_work or engine.wait(PATIENCE):
            engine.step()
    engine.step()
    assert (told.result(), engine.pool.names, dict(engine.runner.loaded)) == (None, {}, {})


def test_a_name_that_leads_into_the_servers_folder_is_no_name_of_a_folder_there(server, served):
    shutil.copytree(served / "vera", served / "deep" / "sql")
    for name, path in (("deep/sql", "deep/sql"), ("./vera", "vera")):
        assert change(server, "load", lora_name=name, lora_path=path)[0] == 200
        assert text(server, name) == text(server, "vera")
        assert change(server, "unload", lora_name=name)[0] == 200
    shutil.rmtree(served / "deep")


def test_an_adapter_without_low_rank_parts_has_no_rank(server, served, adapters):
    shutil.copytree(adapters["ia3"].path, served / "still")
    told = card(server, "still")
    assert (told["method"], told["rank"], told["residency"]) == ("IA3", None, "absent")
    assert text(server, "still")
    assert (card(server, "still")["rank"], card(server, "still")["residency"]) == (None, "resident")
