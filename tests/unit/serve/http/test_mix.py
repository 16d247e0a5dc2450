"""Mixes of adapters over HTTP: the field ``adapter``, and the names that the catalogue keeps for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from veneer import LLM, LoRARequest, SamplingParams
from veneer.contract.file import CONFIG_FILE, WEIGHTS_FILE
from veneer.errors import ConfigError
from veneer.serve.http.models import Catalogue

from .test_server import PROMPT, TURN, Server

WEIGHTS = {"lora": 0.7, "rslora": 0.3}
GREEDY = {"temperature": 0, "max_tokens": 9}


@pytest.fixture(scope="module")
def served(adapters, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("lora", "rslora", "dora", "prefix"):
        shutil.copytree(adapters[name].path, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(base_folder, served) -> Iterator[Server]:
    running = Server(base_folder, served)
    yield running
    running.stop()


def test_a_body_names_a_mix(server, base_folder, adapters):
    mix = LoRARequest.mix("mix", 1, [(adapters[name], weight) for name, weight in WEIGHTS.items()])
    prompts = [PROMPT, f"user: {TURN['content']}\nassistant: "]
    outputs = LLM(base_folder).generate(prompts, SamplingParams(**GREEDY), lora_request=mix, use_tqdm=False)
    text, turn = (output.outputs[0].text for output in outputs)
    for weights in (WEIGHTS, dict(reversed(WEIGHTS.items()))):
        answer = server.client.completions.create(
            model="tiny", prompt=PROMPT, extra_body={"adapter": weights}, **GREEDY
        )
        assert (answer.choices[0].text, answer.model) == (text, "tiny")
    status, answer = server.post("/v1/completions", {"prompt": PROMPT, "adapter": WEIGHTS, **GREEDY})
    assert (status, answer["choices"][0]["text"]) == (200, text)
    chat = server.client.chat.completions.create(
        model="alias", messages=[TURN], extra_body={"adapter": WEIGHTS}, stream=True, **GREEDY
    )
    assert "".join(part.choices[0].delta.content or "" for part in chat) == turn
    assert len(server.engine.runner.loaded) == 1
    alone = server.client.completions.create(model="lora", prompt=PROMPT, **GREEDY).choices[0].text
    assert alone != text


@pytest.mark.parametrize(
    ("body", "status", "said", "param"),
    [
        ({"adapter": {"lora": 0.7, "nobody": 0.3}}, 404, "no adapter 'nobody'. Known: dora, lora, ", "adapter"),
        ({"adapter": {"tiny": 1}}, 404, "no adapter 'tiny'", "adapter"),
        ({"adapter": {"lora": 0.7}, "model": "rslora"}, 400, "model='rslora' is an adapter", None),
        ({"adapter": {"lora": 0.7}, "model": "nobody"}, 404, "no model 'nobody'", "model"),
        ({"adapter": {}}, 400, "there are no parts", None),
        ({"adapter": {"lora": "much"}}, 400, "adapter.lora: must be a number", "adapter.lora"),
        ({"adapter": {"lora": float("inf")}}, 400, "Infinity is not a JSON number", None),
        ({"adapter": "lora"}, 400, "adapter: must be an object (keys with values)", "adapter"),
        ({"adapter": {"lora": 0.7, "dora": 0.3}}, 400, "dora scales the inputs or outputs", None),
        ({"adapter": {"lora": 0.7, "prefix": 0.3}}, 400, "prefix has virtual tokens", None),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_a_mix_is_told(server, body, status, said, param):
    found, answer = server.post("/v1/completions", {"prompt": "x", **body})
    assert (found, answer["error"]["param"]) == (status, param)
    assert said in answer["error"]["message"]
    server.wait(lambda: server.is_idle)


def test_a_weight_beyond_all_floats_is_told(server):
    status, answer = server.post("/v1/completions", b'{"prompt": "x", "adapter": {"lora": 1e999}}')
    assert (status, "the weight inf of 'lora' must be a finite number" in answer["error"]["message"]) == (400, True)


def test_a_mix_that_has_no_sum_ends_its_stream_with_the_reason(server):
    stream = server.client.completions.create(
        model="tiny", prompt="x", stream=True, extra_body={"adapter": {"lora": 0.7, "dora": 0.3}}
    )
    with pytest.raises(openai.APIError, match="ask for this adapter by itself"):
        list(stream)


class Forgetful:
    """An engine as a catalogue sees it: the names that are to be forgotten."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def forget(self, name: str, up_to: int) -> None:
        self.forgotten.append(name)


def test_the_catalogue_keeps_the_mixes_that_were_asked_for_last(adapters, tmp_path):
    engine: Any = Forgetful()
    catalogue = Catalogue(engine, ["tiny"], "", tmp_path)
    for name in WEIGHTS:
        shutil.copytree(adapters[name].path, tmp_path / name)
    made = [catalogue.mix({"lora": i / 10, "rslora": 0.3}).name for i in range(64)]
    assert len(set(made)) == 64
    assert catalogue.mix({"rslora": 0.3, "lora": 0.0}).name == made[0]  # used again, so that it stays
    assert engine.forgotten == []
    last = catalogue.mix({"rslora": 0.3}).name
    assert engine.forgotten == [made[1]]
    shutil.rmtree(tmp_path / "lora")
    assert list(catalogue.adapters()) == ["rslora"]
    assert set(engine.forgotten) == {"lora", *made}
    assert last not in engine.forgotten
    with pytest.raises(ConfigError, match="no adapter 'lora'"):
        catalogue.mix(WEIGHTS)


def test_an_unknown_name_is_told_with_the_nearest_and_with_few_of_many(tmp_path):
    engine: Any = Forgetful()
    catalogue = Catalogue(engine, ["tiny"], "", tmp_path)
    with pytest.raises(ConfigError, match=r"^no adapter 'x'\. Known: none$"):
        catalogue.mix({"x": 0.7})
    for number in range(13):
        (tmp_path / f"tenant-{number:02}").mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            (tmp_path / f"tenant-{number:02}" / file).touch()
    assert len(catalogue.adapters()) == 13
    with pytest.raises(ConfigError) as told:
        catalogue.find("tenant12")
    first = ", ".join(f"tenant-{number:02}" for number in range(9))
    assert str(told.value) == (
        f"no model 'tenant12'. Did you mean 'tenant-12'? Known: tiny, {first} and 4 more, see /v1/models"
    )


def test_a_part_that_is_replaced_changes_the_mix_and_one_that_goes_lets_it_go(server, served, adapters):
    def answer() -> tuple[int, Any]:
        return server.post("/v1/completions", {"prompt": PROMPT, "adapter": {"part": 0.9, "rslora": 0.3}, **GREEDY})

    texts = []
    for name in ("lora", "vera"):
        shutil.rmtree(served / "part", ignore_errors=True)
        shutil.copytree(adapters[name].path, served / "part")
        texts.append(answer()[1]["choices"][0]["text"])
    assert texts[0] != texts[1]
    n_loaded = len(server.engine.runner.loaded)
    shutil.rmtree(served / "part")
    assert answer()[0] == 404
    server.post("/v1/completions", {"prompt": "x"})
    server.wait(lambda: len(server.engine.runner.loaded) < n_loaded)
