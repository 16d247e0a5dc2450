"""Serving on a device that is no CPU: all that an adapter brings is there, and a step waits for nothing but its end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor

from interpreter import mended_interpreter
from stand_in import DEVICE, EVERY, Crossings, put_on_device, stand_in
from veneer import LLM, LoRARequest, SamplingParams
from veneer.plain.tensor_tree import mapped
from veneer.serve.adapters.loader import Finished, Loader, _result
from veneer.serve.program.kv_cache import PageCache
from veneer.serve.runners import program_runner
from veneer.serve.runners.program_runner import ProgramRunner
from veneer.serve.schedule.sampling_params import StructuredOutputsParams

from .conftest import METHODS, SHAPE, byte_tokenizer, make_model, save_adapter

PROMPTS = [[7 * i * i % 251 + 1 for i in range(1, n + 1)] for n in (5, 9, 2, 3)]
OPTIONS = {"kv_cache_memory_bytes": 1 << 22, "max_num_batched_tokens": 23, "enable_prefix_caching": False}
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def mended() -> Any:
    with mended_interpreter():
        yield


@pytest.fixture
def one_thread(monkeypatch: Any) -> None:
    """All is read on the thread of the test, which has the device, and no model is held against its own code."""

    def read_here(self: Any, id: str, read: Any) -> None:
        self._tell(Finished(id, _result(read), 0.0))

    monkeypatch.setattr(Loader, "submit", read_here)
    monkeypatch.setattr(Loader, "later", lambda self, work: None)
    monkeypatch.setattr(program_runner, "_own_logits", lambda *given: None)
    monkeypatch.setattr(program_runner, "_problem", lambda *given: None)


@pytest.fixture
def device(one_thread: None) -> Any:
    with stand_in() as crossings:
        yield crossings


def engine_on(device: bool, **options: Any) -> LLM:
    model = make_model()
    if device:
        put_on_device(model)
    return LLM(model, tokenizer=byte_tokenizer(), **OPTIONS | options)


def move_weights(monkeypatch: Any) -> None:
    """Let engines move the weights of layers into one memory, as they do with a model that they have loaded."""
    pack = program_runner.pack_group
    monkeypatch.setattr(program_runner, "pack_group", lambda *given, give_up: pack(*given, give_up=True))


def answers(llm: LLM, asked: Any, adapters: Any) -> list[tuple[int, ...]]:
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(len(adapters))]
    outputs = llm.generate(prompts, asked, lora_request=adapters, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def counted(llm: LLM, crossings: Crossings, monkeypatch: Any) -> list[tuple[int, int]]:
    """Copies to the device and back, of every step from now on."""
    found, run = list[tuple[int, int]](), llm.engine.runner.run

    def watched(plan: Any) -> Any:
        crossings.clear()
        sampled = run(plan)
        found.append((crossings.sent, crossings.read))
        return sampled

    monkeypatch.setattr(llm.engine.runner, "run", watched)
    return found


KINDS = (
    "lora", "dora", "lora_bias", "ia3", "vera", "loha", "oft", "lokr", "bottleneck", "prefix", "prompt", "saved",
    "head",
)  # fmt: skip


def of_every_kind(adapters: dict[str, LoRARequest]) -> list[LoRARequest | None]:
    mix = LoRARequest.mix("mix", 99, [(adapters["lora"], 0.7), (adapters["lora_bias"], -0.4)])
    return [None, *(adapters[name] for name in KINDS), mix]


def test_a_step_of_adapters_of_every_kind(device: Crossings, adapters: Any, monkeypatch: Any) -> None:
    """Nothing of the host meets anything of the device; one copy of numbers goes there, and the tokens come back."""
    asked = of_every_kind(adapters)
    expected = answers(engine_on(False), GREEDY, asked)
    assert len(set(expected)) == len(expected)
    move_weights(monkeypatch)
    llm = engine_on(True)
    steps = counted(llm, device, monkeypatch)
    assert answers(llm, GREEDY, asked) == expected
    assert set(steps) == {(1, 1)}
    runner = llm.engine.runner
    assert isinstance(runner, ProgramRunner)
    assert runner.general is None
    held = list[Tensor]()
    for version in runner.interpreter.versions.values():
        mapped((version.effects, version.bottlenecks, list(version.linears)), lambda x: _noted(x, held))
    assert len(held) > 50
    assert {x.device for x in held} == {DEVICE}
    pages, cache = llm.engine.scheduler.pages, runner.cache
    assert isinstance(cache, PageCache)
    taken = cache.store.data.nbytes
    assert pages.n_lent > 0
    assert taken + pages.n_lent + pages.lendable <= OPTIONS["kv_cache_memory_bytes"] + pages.n_pages


def _noted(x: Tensor, held: list[Tensor]) -> Tensor:
    held.append(x)
    return x


def test_draws_of_every_kind_come_back_by_one_read(device: Crossings, adapters: Any, monkeypatch: Any) -> None:
    """Their settings go to the device by one copy more, masks of a grammar among them."""
    common = {"max_tokens": 2, "ignore_eos": True, "seed": 7}
    asked = [
        SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.3, presence_penalty=0.4, **common),
        SamplingParams(temperature=1.1, logit_bias={5: 4.0}, logprobs=2, **common),
        SamplingParams(temperature=0.9, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), **common),
        SamplingParams(temperature=0, **common),
    ]
    rows = [None, adapters["lora"], adapters["ia3"], None]
    expected = answers(engine_on(False), asked, rows)
    llm = engine_on(True)
    steps = counted(llm, device, monkeypatch)
    assert answers(llm, asked, rows) == expected
    assert set(steps) == {(2, 1)}


HELD = {"none": 9, "lora": 17, "dora": 16}
"""Launches of a block in a decode step, those of DoRA for two adapters. The aim is 12, whatever the adapters.

Fewer are written here, more are a fault.
"""


def decoded(n_blocks: int, kind: str, folder: Path, monkeypatch: Any) -> Counter[str]:
    """Launches of the last step, in which three requests decode a token each, by two adapters and by none."""
    config = transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": n_blocks})
    asked: list[LoRARequest | None] = [None] * 3
    if kind in METHODS:
        paths = [save_adapter(folder / f"{n_blocks}.{n}", METHODS[kind](), config, n) for n in (1, 2)]
        asked[1:] = [LoRARequest(path.name, n, str(path)) for n, path in enumerate(paths, start=1)]
    model = make_model(config)
    put_on_device(model)
    move_weights(monkeypatch)
    llm = LLM(model, tokenizer=byte_tokenizer(), **OPTIONS)
    found, run = list[Counter[str]](), llm.engine.runner.run

    def watched(plan: Any) -> Any:
        Crossings.now.clear()
        sampled = run(plan)
        found.append(Crossings.now.launched.copy())
        return sampled

    monkeypatch.setattr(llm.engine.runner, "run", watched)
    answers(llm, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), asked)
    return found[-1]


@pytest.mark.parametrize("kind", HELD)
def test_a_decode_block_launches_no_more_than_it_may(
    one_thread: None, tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    with stand_in(EVERY):
        one, two = (decoded(n, kind, tmp_path, monkeypatch) for n in (1, 2))
    launched = two - one
    assert launched.total() == HELD[kind], launched.most_common()


def test_a_step_takes_more_tokens_on_a_device(device: Crossings) -> None:
    for on_device, most in ((False, 512), (True, 2048)):
        assert engine_on(on_device, max_num_batched_tokens=None).engine.scheduler.limits.max_batched_tokens == most
    assert engine_on(True).engine.scheduler.limits.max_batched_tokens == OPTIONS["max_num_batched_tokens"]
