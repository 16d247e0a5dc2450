"""The tokenizer and the chat template that training saved with an adapter write the prompts of its requests."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.unit.serve.conftest import END, byte_tokenizer
from tests.unit.serve.http.test_server import TURN, Server
from transformers import AutoTokenizer

from patience import PATIENCE
from veneer import LLM, LoRARequest, SamplingParams
from veneer.errors import ConfigError, FormatError
from veneer.serve.requests.prompts import PromptReader
from veneer.serve.requests.readers import Readers

OWN = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
OTHER = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
GREEDY = {"temperature": 0, "max_tokens": 9}
MOST = 127


def with_tokenizer(request: LoRARequest, folder: Path, template: str | None = OWN, more: tuple[str, ...] = ()) -> Path:
    """A copy of an adapter with a tokenizer beside it, as training saves one."""
    shutil.copytree(request.path, folder)
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.add_tokens(list(more), special_tokens=False)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(adapters, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    with_tokenizer(adapters["lora"], folder / "own")
    with_tokenizer(adapters["rslora"], folder / "other", OTHER)
    with_tokenizer(adapters["lora"], folder / "longer", OWN, ("<new>",))
    shutil.copytree(adapters["lora"].path, folder / "plain")
    return folder


@pytest.fixture(scope="module")
def llm(base_folder) -> LLM:
    return LLM(base_folder)


@pytest.fixture(scope="module")
def server(base_folder, served) -> Iterator[Server]:
    running = Server(base_folder, served)
    yield running
    running.stop()


def of(served: Path, name: str) -> LoRARequest:
    return LoRARequest(name, 1 + sorted(path.name for path in served.iterdir()).index(name), str(served / name))


PROMPTS = {
    None: [*b"user: x\nassistant: "], "plain": [*b"user: x\nassistant: "], "own": [*b"<x>"], "other": [*b"[x]"],
    "longer": [*b"<x>"],
}  # fmt: skip


@pytest.mark.parametrize("name", [None, "plain", "own", "other", "longer"])
def test_a_conversation_is_written_as_the_adapter_was_trained(llm, server, served, name):
    adapter = None if name is None else of(served, name)
    right = llm.generate([PROMPTS[name]], SamplingParams(**GREEDY), lora_request=adapter, use_tqdm=False)[0]
    chat = llm.chat([TURN], SamplingParams(**GREEDY), lora_request=adapter, use_tqdm=False)[0]
    assert chat.prompt_token_ids == PROMPTS[name]
    assert chat.outputs[0].text == right.outputs[0].text
    answer = server.client.chat.completions.create(model=name or "tiny", messages=[TURN], **GREEDY)
    assert answer.choices[0].message.content == right.outputs[0].text
    assert answer.usage.prompt_tokens == len(PROMPTS[name])


def test_each_conversation_has_the_template_of_its_adapter(llm, served):
    names = ["own", None, "other"]
    outputs = llm.chat(
        [[TURN]] * 3, SamplingParams(**GREEDY), use_tqdm=False,
        lora_request=[None if name is None else of(served, name) for name in names],
    )  # fmt: skip
    assert [output.prompt_token_ids for output in outputs] == [PROMPTS[name] for name in names]


def test_a_template_that_is_given_comes_first(base_folder, llm, served):
    given = llm.chat(
        [TURN], SamplingParams(**GREEDY), lora_request=of(served, "own"), chat_template=OTHER, use_tqdm=False
    )
    assert given[0].prompt == "[x]"
    everywhere = LLM(base_folder, chat_template=OTHER)
    for adapter in (None, of(served, "own"), of(served, "plain")):
        assert (
            everywhere.chat([TURN], SamplingParams(**GREEDY), lora_request=adapter, use_tqdm=False)[0].prompt == "[x]"
        )


def test_tokens_that_training_added_are_read_and_written(llm, server, served):
    asked = SamplingParams(temperature=0, max_tokens=2, allowed_token_ids=[257], logprobs=0, bad_words=["<old>"])
    output = llm.generate(["a<new>"], asked, lora_request=of(served, "longer"), use_tqdm=False)[0]
    assert (output.prompt_token_ids, output.outputs[0].text) == ([97, 257], "<new><new>")
    assert output.outputs[0].logprobs[0][257].decoded_token == "<new>"
    answer = server.client.completions.create(
        model="longer", prompt="a<new>", temperature=0, max_tokens=2, extra_body={"allowed_token_ids": [257]}
    )
    assert (answer.choices[0].text, answer.usage.prompt_tokens) == ("<new><new>", 2)
    assert llm.generate(["a<new>"], asked, use_tqdm=False)[0].prompt_token_ids == [*b"a<new>"]


def test_the_end_token_that_training_taught_ends_an_answer(llm, adapters, tmp_path):
    shutil.copytree(adapters["lora"].path, tmp_path / "taught")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "z"
    tokenizer.save_pretrained(tmp_path / "taught")
    asked = SamplingParams(temperature=0, max_tokens=5, allowed_token_ids=[ord("z")])
    for folder, reason in ((adapters["lora"].path, "length"), (str(tmp_path / "taught"), "stop")):
        found = llm.generate(["x"], asked, lora_request=LoRARequest("taught", 9, folder), use_tqdm=False)[0]
        assert found.outputs[0].finish_reason == reason


def test_a_mix_has_one_template_and_the_same_tokens(llm, server, served):
    def mix(*names: str) -> LoRARequest:
        return LoRARequest.mix("both", 17, [(of(served, name), 0.5) for name in names])

    same = llm.chat([TURN], SamplingParams(**GREEDY), lora_request=mix("own", "own"), use_tqdm=False)[0]
    assert same.prompt == "<x>"
    for names in (("own", "other"), ("own", "plain")):
        assert llm.generate(["x"], SamplingParams(**GREEDY), lora_request=mix(*names), use_tqdm=False)
        with pytest.raises(ConfigError, match="were trained with different chat templates"):
            llm.chat([TURN], SamplingParams(**GREEDY), lora_request=mix(*names), use_tqdm=False)
    with pytest.raises(ConfigError, match="'both' were trained with different tokenizers"):
        llm.generate(["x"], SamplingParams(**GREEDY), lora_request=mix("own", "longer"), use_tqdm=False)
    status, answer = server.post("/v1/chat/completions", {"messages": [TURN], "adapter": {"own": 1, "other": 1}})
    assert (status, answer["error"]["type"]) == (400, "BadRequestError")


def test_a_template_that_is_replaced_is_used_from_the_next_request_on(adapters, tmp_path):
    readers = Readers(PromptReader(byte_tokenizer(), MOST))
    request = LoRARequest("one", 1, str(with_tokenizer(adapters["ia3"], tmp_path / "one")))
    assert readers.of(request).chat([TURN], {})[0] == "<x>"
    (tmp_path / "one" / "chat_template.jinja").write_text(OTHER)
    assert readers.of(request).chat([TURN], {})[0] == "[x]"


def test_a_template_in_a_file_alone_is_the_adapters(adapters, tmp_path):
    """transformers writes chat templates there, and tokenizer_config.json without them."""
    folder = shutil.copytree(adapters["ia3"].path, tmp_path / "one")
    base = byte_tokenizer()
    readers, request = Readers(PromptReader(base, MOST)), LoRARequest("one", 1, str(folder))
    assert readers.of(request) is readers.base
    (folder / "chat_template.jinja").write_text(OTHER)
    assert readers.of(request).chat([TURN], {})[0] == "[x]"
    assert readers.of(request).tokenizer is base
    assert Readers(PromptReader(base, MOST), OWN).of(request).chat([TURN], {})[0] == "<x>"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"the chat template .*jinja cannot be read: .* Save it again, or remove it"):
        readers.of(request).chat([TURN], {})
    assert readers.of(request).ids("x", add_special_tokens=True) == [120]
    (folder / "chat_template.jinja").unlink()
    assert readers.of(request) is readers.base


def test_every_template_of_an_adapter_is_rendered_within_the_limits_of_a_strangers(adapters, tmp_path):
    folders = {name: with_tokenizer(adapters["ia3"], tmp_path / name) for name in ("whole", "damaged")}
    (folders["damaged"] / "tokenizer_config.json").write_text("{")
    folders["alone"] = shutil.copytree(adapters["ia3"].path, tmp_path / "alone")
    (folders["alone"] / "chat_template.jinja").write_text(OTHER)
    requests = [LoRARequest(name, 1 + i, str(folder)) for i, (name, folder) in enumerate(folders.items())]
    requests.append(LoRARequest.mix("both", 9, [(requests[0], 0.5), (requests[0], 0.5)]))
    for template in (None, OWN):
        readers = Readers(PromptReader(byte_tokenizer(), MOST), template)
        for request in requests:
            assert readers.of(request).rendering is readers.base.rendering, (template, request.lora_name)


def test_adapters_of_equal_files_share_a_reader_and_the_last_ones_are_kept(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("veneer.serve.requests.readers._KEPT", 2)
    readers = Readers(PromptReader(byte_tokenizer(), MOST))
    made: list[Any] = []
    for number, template in enumerate((OWN, OTHER, OWN, OWN + "!", OTHER)):
        folder = with_tokenizer(adapters["ia3"], tmp_path / str(number), template)
        made.append(readers.of(LoRARequest(str(number), 1 + number, str(folder))))
    assert made[0] is made[2]
    assert made[1] is not made[4]
    assert made[0].tokenizer is made[1].tokenizer is readers.base.tokenizer
    assert made[0].ends == {END}


def test_conversations_are_refused_and_plain_prompts_answered_if_a_tokenizer_is_damaged(
    llm, adapters, tmp_path, monkeypatch, caplog
):
    paths = [with_tokenizer(adapters["ia3"], tmp_path / name) for name in ("damaged", "too")]
    tried: list[Path] = []
    own = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: tried.append(path) or own(path))
    asked = SamplingParams(**GREEDY)
    right = llm.generate(["x"], asked, lora_request=adapters["ia3"], use_tqdm=False)[0].outputs[0].text
    for number, folder in enumerate(paths):
        (folder / "tokenizer_config.json").write_text("{")
        request = LoRARequest(folder.name, 5 + number, str(folder))
        for prompt in ("x", [*b"x"]):
            assert llm.generate([prompt], asked, lora_request=request, use_tqdm=False)[0].outputs[0].text == right
        for adapter in (request, LoRARequest.mix("both", 17 + number, [(request, 0.5), (adapters["lora"], 0.5)])):
            with pytest.raises(FormatError, match=rf"tokenizer in the adapter's folder .*{folder.name} cannot be read"):
                llm.chat([TURN], asked, lora_request=adapter, use_tqdm=False)
        given = llm.chat([TURN], asked, lora_request=request, chat_template=OTHER, use_tqdm=False)[0]
        assert given.prompt == "[x]"
    assert tried == paths
    assert [record.name for record in caplog.records].count("veneer.serve.requests.readers") == 2
    byte_tokenizer().save_pretrained(paths[0])
    assert llm.chat([TURN], asked, lora_request=LoRARequest("damaged", 5, str(paths[0])), use_tqdm=False)[0].prompt


def test_a_tokenizer_is_read_while_others_answer(adapters, tmp_path, monkeypatch):
    folders = [with_tokenizer(adapters["ia3"], tmp_path / name, name) for name in ("slow", "known")]
    slow, known = (LoRARequest(folder.name, 1 + i, str(folder)) for i, folder in enumerate(folders))
    readers = Readers(PromptReader(byte_tokenizer(), MOST))
    kept = readers.of(known)
    begun, may_end = threading.Event(), threading.Event()
    own = AutoTokenizer.from_pretrained

    def waits(path: Path) -> Any:
        begun.set()
        assert may_end.wait(PATIENCE)
        return own(path)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", waits)
    with ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(readers.of, slow)
            assert begun.wait(PATIENCE)
            second = pool.submit(readers.of, slow)
            assert pool.submit(readers.of, known).result(PATIENCE / 2) is kept
        finally:
            may_end.set()
        assert first.result() is second.result()
        assert first.result().templates == ("slow",)
