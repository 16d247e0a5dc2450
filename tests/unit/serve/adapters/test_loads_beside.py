"""Adapters that are read beside the batch, and one budget of bytes for them and for keys and values."""

from __future__ import annotations

import logging
import mmap
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.serve.conftest import make_model, save_adapter

from patience import PATIENCE
from veneer import LLM, IA3Config, LoraConfig, LoRARequest, SamplingParams
from veneer.errors import ConfigError, FormatError, ServingError
from veneer.model.sites.places import places_of
from veneer.ops.paged_attention import PagedStore, padded
from veneer.plain.tensor_tree import _tensors, bytes_of
from veneer.serve.adapters.loader import Finished, Loader
from veneer.serve.inbox import Inbox
from veneer.serve.program import effects
from veneer.serve.program.effects import UnsaidError, read_effects
from veneer.serve.runners import program_runner

PROMPT = list(b"the cat sat")
GREEDY = SamplingParams(temperature=0, max_tokens=9)


class SlowReader:
    """A runner's `read` that waits until it may go on, and then fails, if it is told to."""

    def __init__(self, runner: Any) -> None:
        self.read, self.may, self.begun = runner.read, threading.Event(), threading.Event()
        self.fails: Exception | None = None
        self.thread_counts: list[int] = []
        runner.read = self

    def __call__(self, folder: Any) -> Any:
        self.begun.set()
        self.thread_counts.append(torch.get_num_threads())
        assert self.may.wait(PATIENCE)
        if self.fails is not None:
            raise self.fails
        return self.read(folder)


@pytest.fixture
def llm(base_folder) -> LLM:
    return LLM(base_folder)


@pytest.fixture
def reader(llm) -> Iterator[SlowReader]:
    made = SlowReader(llm.engine.runner)
    yield made
    made.may.set()
    llm.engine.close()


def one(llm: LLM, lora_request: LoRARequest | None = None) -> list[int]:
    [output] = llm.generate([PROMPT], GREEDY, lora_request=lora_request, use_tqdm=False)
    return output.outputs[0].token_ids


def ask(llm: LLM, *adapters: LoRARequest | None) -> list[str]:
    return llm.enqueue([PROMPT] * len(adapters), GREEDY, lora_request=list(adapters))


def step_until_told(llm: LLM, n: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    while len(told) < n:
        llm.engine.wait(0)
        told |= {output.request_id: output for output in llm.engine.step()}
    return told


def test_others_decode_while_an_adapter_is_read(llm, adapters, base_folder, reader):
    alone = LLM(base_folder)
    expected = [one(alone, adapter) for adapter in (None, adapters["lora"])]
    base, cold = ask(llm, None, adapters["lora"])
    told = step_until_told(llm, 1)
    assert told[base].outputs[0].token_ids == expected[0]
    assert llm.engine.step() == []
    assert not llm.engine.has_work  # so that nobody spins
    assert llm.engine.scheduler.has_work
    assert llm.engine.pool.loading == [v.id for v in llm.engine.pool.names.values()]
    reader.may.set()
    llm._done |= told
    outputs = {output.request_id: output for output in llm.wait_for_completion(use_tqdm=False)}
    assert [outputs[id].outputs[0].token_ids for id in (base, cold)] == expected


def test_generate_sleeps_while_all_wait(llm, adapters, reader, monkeypatch):
    steps: list[int] = []
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: (steps.append(1), step())[1])
    threading.Timer(0.3, reader.may.set).start()
    assert len(one(llm, adapters["lora"])) == 9
    assert len(steps) <= 9 + 3


def test_places_are_looked_up_once_for_equal_configs(tmp_path, tokenizer, monkeypatch):
    """Adapters that differ in values alone share them, and give what they give on an engine of their own."""
    configs = [LoraConfig(r=r, target_modules=["q_proj", "down_proj"]) for r in (3, 3, 5)]
    folders = [save_adapter(tmp_path / str(i), config, seed=i) for i, config in enumerate(configs)]
    asked = [LoRARequest(str(i), i + 1, str(folder)) for i, folder in enumerate(folders)]
    expected = [one(LLM(make_model(), tokenizer=tokenizer), each) for each in asked]
    looked: list[int] = []
    monkeypatch.setattr(effects, "places_of", lambda *given: (looked.append(1), places_of(*given))[1])
    llm = LLM(make_model(), tokenizer=tokenizer)
    assert [one(llm, each) for each in asked] == expected
    assert len({tuple(each) for each in expected}) == len(asked)
    assert len(looked) == 2


def test_torch_computes_on_the_loaders_thread_alone(llm, adapters, reader):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        reader.may.set()
        one(llm, adapters["dora"])
        assert reader.thread_counts == [1]
        found: list[int] = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start(), later.join()
        assert (found, torch.get_num_threads()) == ([3], 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [FormatError("it is broken"), OSError("the disk is gone")])
def test_a_failure_ends_those_that_wait_for_it_alone(llm, adapters, reader, error):
    expected = None
    first, other, second = ask(llm, adapters["lora"], None, adapters["lora"])
    reader.fails = error
    llm.engine.step()
    reader.may.set()
    told = step_until_told(llm, 3)
    assert [told[id].outputs[0].finish_reason for id in (first, other, second)] == ["error", "length", "error"]
    assert all(isinstance(told[id].error, FormatError) and str(error) in str(told[id].error) for id in (first, second))
    assert (llm.engine.pool.known, llm.engine.scheduler.pages.n_lent, llm.llm_engine.list_loras()) == (set(), 0, set())
    reader.fails = expected
    assert len(one(llm, adapters["lora"])) == 9  # the next request looks again


def test_an_error_that_is_a_fault_breaks_the_step_and_not_the_pool(llm, adapters, reader):
    reader.fails = ZeroDivisionError("a fault")
    reader.may.set()
    with pytest.raises(ZeroDivisionError, match="a fault"):
        one(llm, adapters["lora"])
    reader.fails = None
    assert len(one(llm, adapters["lora"])) == 9


def test_aborted_and_dropped_while_it_is_read(llm, adapters, reader):
    [id] = ask(llm, adapters["lora"])
    llm.engine.step()
    assert reader.begun.wait(PATIENCE)
    llm.engine.forget(adapters["lora"].name)
    llm.engine.abort(id)
    [output] = step_until_told(llm, 1).values()
    assert output.outputs[0].finish_reason == "abort"
    assert len(llm.engine.pool.loading) == 1
    reader.may.set()
    assert llm.engine.wait(PATIENCE)
    llm.engine.step()
    assert (llm.engine.pool.known, llm.engine.runner.loaded) == (set(), set())
    assert llm.engine.scheduler.pages.n_lent == 0


def test_aborted_by_the_last_that_waits_it_is_loaded_for_the_next(llm, adapters, reader):
    [id] = ask(llm, adapters["lora"])
    llm.engine.step()
    llm.engine.abort(id)
    reader.may.set()
    assert reader.begun.wait(PATIENCE)
    while llm.engine.pool.loading:
        llm.engine.wait(PATIENCE)
        llm.engine.step()
    assert len(llm.engine.runner.loaded) == 1


def test_replaced_while_it_is_read(llm, reader, tmp_path):
    """Earlier requests get an error, later ones the new adapter."""
    folder = save_adapter(tmp_path / "a", LoraConfig(r=3, target_modules=["q_proj"]), seed=1)
    request = LoRARequest("a", 50, str(folder))
    [old] = ask(llm, request)
    llm.engine.step()
    assert reader.begun.wait(PATIENCE)
    save_adapter(folder, LoraConfig(r=3, target_modules=["q_proj"]), seed=2)
    [new] = ask(llm, request)
    reader.may.set()
    told = {output.request_id: output for output in llm.wait_for_completion(use_tqdm=False)}
    assert "was replaced while a request waited for it" in str(told[old].error)
    assert told[new].outputs[0].finish_reason == "length"
    assert one(llm, request) == told[new].outputs[0].token_ids


def test_a_file_that_is_written_into_leaves_what_is_loaded(llm, tmp_path):
    folder = save_adapter(
        tmp_path / "a", IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    llm.llm_engine.add_lora(LoRARequest("a", 50, str(folder)))
    before = bytes_of(llm.engine.runner.interpreter)
    blocks = [each.linears for each in llm.engine.runner.interpreter.versions.values()]
    ys = [own.records for block in blocks for own in block if own is not None]
    scales = [x.clone() for records in ys for r in records for x in (r.input_scale, r.output_scale) if x is not None]
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        length = len(file.read())
        file.seek(0), file.write(bytes(length))
    after = [x for records in ys for r in records for x in (r.input_scale, r.output_scale) if x is not None]
    assert len(after) == 4
    assert all(torch.equal(x, y) for x, y in zip(scales, after, strict=True))
    assert bytes_of(llm.engine.runner.interpreter) == before


def test_what_is_loaded_keeps_nothing_of_its_file_beside_itself(llm, adapters):
    """Tensors of a file share memory while it is read; its other parts go with the last that is packed."""
    for adapter in adapters.values():
        read = llm.engine.runner.read(Path(adapter.lora_path))
        assert isinstance(read, program_runner.ProgramAdapter)
        held = list(_tensors((read.packed.linears, read.packed.bottlenecks, read.packed.effects, read.prefix)))
        assert held
        assert 0 <= read.n_bytes - bytes_of(held) < mmap.PAGESIZE
        assert not read.packed.effects.linear  # what has been packed is not held twice
        assert not read.packed.effects.residual
        kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held if not x.is_meta}
        assert sum(kept.values()) <= read.n_bytes


def test_adding_waits_for_what_is_being_read(llm, adapters, reader):
    ask(llm, adapters["lora"])
    llm.engine.step()
    threading.Timer(0.2, reader.may.set).start()
    assert llm.llm_engine.add_lora(adapters["lora"])
    assert llm.llm_engine.add_lora(adapters["ia3"])
    assert len(llm.engine.runner.loaded) == 2
    assert [o.outputs[0].finish_reason for o in llm.wait_for_completion(use_tqdm=False)] == ["length"]


def test_an_interrupt_while_all_wait_ends_the_call(llm, adapters, reader, monkeypatch):
    def interrupted(seconds: float | None = None) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one(llm, adapters["lora"])
    assert not llm.engine.scheduler.has_work
    reader.may.set()
    assert len(one(llm, adapters["lora"])) == 9


def test_the_loader_has_a_thread_while_it_reads_and_stops_where_it_is():
    told: list[Finished[str]] = []
    may, begun = threading.Event(), threading.Event()
    loader = Loader[str](told.append)

    def slow() -> str:
        begun.set()
        assert may.wait(PATIENCE)
        return "slow"

    loader.submit("a", slow), loader.submit("b", lambda: "never")
    assert begun.wait(PATIENCE)
    threading.Timer(0.1, may.set).start()
    loader.stop()
    assert [(each.id, each.result) for each in told] == [("a", "slow")]
    loader.submit("c", lambda: str(1 // 0))
    loader.stop(), loader.stop()
    assert not any(thread.name == "veneer loader" for thread in threading.enumerate())
    assert told[1:] == [] or isinstance(told[1].result, ZeroDivisionError)


def test_what_is_put_off_waits_for_all_loads_up_to_a_bound(caplog):
    """A work that fails ends no load."""
    order: list[str] = []
    loader, n = Loader[str](lambda each: order.append(f"told {each.id}")), 12
    may = threading.Event()

    def read(number: int) -> str:
        assert may.wait(PATIENCE)
        loader.later(lambda: order.append(f"kept {number}"))
        if number == 0:
            loader.later(lambda: order.append(str(1 // 0)))
        return "read"

    for number in range(n):
        loader.submit(str(number), lambda number=number: read(number))
    thread = loader._thread
    assert thread is not None
    may.set()
    thread.join(PATIENCE)
    assert order[:8] == [f"told {number}" for number in range(8)]
    assert [each for each in order if each.startswith("kept")] == [f"kept {number}" for number in range(n)]
    assert [each for each in order if each.startswith("told")] == [f"told {number}" for number in range(n)]
    assert order.index("kept 0") < order.index("told 8")
    assert all(order.index(f"told {number}") < order.index(f"kept {number}") for number in range(n))
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no niceness of its own")
@pytest.mark.parametrize(("own", "wanted"), [(0, 4), (3, 4), (9, 9)])
def test_the_loader_gives_way_where_it_may(monkeypatch, own, wanted):
    """A process that is nicer stays so, and one that may not change it reads all the same."""
    told: Inbox[Finished[str]] = Inbox()
    set_to: list[int] = []

    def forbidden(kind: int, thread: int, niceness: int) -> None:
        set_to.append(niceness)
        raise PermissionError("not for you")

    monkeypatch.setattr("os.getpriority", lambda kind, thread: own)
    monkeypatch.setattr("os.setpriority", forbidden)
    loader = Loader[str](told.put)
    loader.submit("a", lambda: "read")
    assert told.wait(PATIENCE)
    loader.stop()
    ended = told.take()
    assert ended is not None
    assert (ended.id, ended.result, set_to) == ("a", "read", [wanted])


@pytest.mark.parametrize("where", ["threading.Thread.start", "veneer.serve.adapters.loader._be_alone"])
def test_loads_without_a_thread_are_told_as_failed(monkeypatch, where):
    """And the next ones are read, where a thread starts again."""
    told: Inbox[Finished[str]] = Inbox()
    loader = Loader[str](told.put)

    def refuse(*given: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(where, refuse)
        for id in ("a", "b"):
            loader.submit(id, lambda: "never")
            ended = _next(told)
            assert ended.id == id
            assert isinstance(ended.result, ServingError)
            assert "can't start new thread" in str(ended.result)
    loader.submit("c", lambda: "read")
    ended = _next(told)
    assert (ended.id, ended.result) == ("c", "read")
    loader.stop()


def _next(told: Inbox[Finished[str]]) -> Finished[str]:
    assert told.wait(PATIENCE)
    while (ended := told.take()) is None:
        assert told.wait(PATIENCE)
    return ended


def test_many_adapters_and_room_for_a_few(tokenizer, tmp_path):
    """64 that differ, memory for some 16 of them: each answer is that of the adapter alone."""
    draw = random.Random(7)
    made = {}
    for number in range(64):
        config = LoraConfig(r=1 + number % 5, target_modules=["q_proj", "up_proj"])
        folder = save_adapter(tmp_path / str(number), config, seed=number)
        made[number] = LoRARequest(f"a{number}", number + 1, str(folder))
    model = make_model()
    alone = LLM(model, tokenizer=tokenizer)
    params = SamplingParams(temperature=0, max_tokens=5)

    def answers(llm: LLM, asked: list[int]) -> list[list[int]]:
        requests = [made[number] for number in asked]
        outputs = llm.generate([PROMPT] * len(asked), params, lora_request=requests, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    expected = {number: answers(alone, [number])[0] for number in made}
    each = sum(alone.engine.runner.read(Path(request.lora_path)).n_bytes for request in made.values()) // 64
    room = 16 * each + 8 * 2**12
    few = LLM(model, tokenizer=tokenizer, max_num_seqs=8, max_model_len=32, kv_cache_memory_bytes=room)
    runner, pages, n_loads = few.engine.runner, few.engine.scheduler.pages, 0
    load = runner.load

    def counted(version: str, adapter: Any) -> None:
        nonlocal n_loads
        load(version, adapter)
        n_loads += 1
        held = sum(each.linears.nbytes for each in runner.interpreter.versions.values())
        assert held <= pages.n_lent <= pages.n_bytes - pages.n_held * pages.page_bytes

    runner.load = counted
    for asked in ([draw.randrange(64) for _ in range(48)] for _ in range(3)):
        assert answers(few, asked) == [expected[number] for number in asked]
    assert n_loads > 64  # some went and came again
    assert 8 < len(few.engine.runner.loaded) < 40


def test_an_adapter_that_can_never_fit_is_one_clear_error(base_folder, adapters, tokenizer):
    position = 2 * 2 * padded(8) * 4
    small = LLM(make_model(), tokenizer=tokenizer, max_model_len=32, kv_cache_memory_bytes=40 * position)
    expected = one(small)
    with pytest.raises(ConfigError, match=r"0 positions of .* are left .* Raise kv_cache"):
        one(small, adapters["lora"])
    assert one(small) == expected


def test_adapters_of_the_general_runner_share_the_pages(adapters, tokenizer, monkeypatch, caplog):
    """In the same steps as others, in the same pages: no second store is made."""
    strange = adapters["dora"]

    def read(lookup: Any, program: Any, folder: Path) -> Any:
        if folder == Path(strange.path):
            raise UnsaidError("something")
        return read_effects(lookup, program, folder)

    monkeypatch.setattr(program_runner, "read_effects", read)
    llm = LLM(make_model(), tokenizer=tokenizer, max_num_batched_tokens=7, max_num_seqs=3)
    general = LLM(make_model(), tokenizer=tokenizer, general_runner=True)
    asked = [strange, None, adapters["lora"], strange, adapters["prefix"], None]
    expected = [one(general, adapter) for adapter in asked]
    prompts = [PROMPT] * len(asked)
    with caplog.at_level(logging.INFO, "veneer"):
        outputs = llm.generate(prompts, GREEDY, lora_request=asked, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert "all requests wait until that is done" in caplog.text
    store, slots = llm.engine.runner.cache.store, llm.engine.runner.general.store
    start, stop = store.data.data_ptr(), store.data.data_ptr() + store.data.nbytes
    assert all(start <= x.data_ptr() < stop for pair in slots.layers.values() for x in pair)


def test_pages_give_their_memory_back():
    store = PagedStore.zeros(9, 16, (2, 3, 32), dtype=torch.float32)
    store.data.fill_(3.0)
    store.discard([2, 3, 4, 7])
    kept = [0, 1, 5, 6, 8]
    assert bool((store.data[kept] == 3.0).all())
    assert not store.data[[2, 3, 4, 7]].any()  # these pages are whole pages of the system


def test_bytes_that_are_shared_count_once():
    x = torch.zeros(7, 3)
    assert bytes_of({"a": x, "b": [x, (x, torch.zeros(5))], "c": LoraConfig(r=3), "d": None}) == 84 + 20


def test_copies_elsewhere_are_one(llm, adapters, tmp_path):
    shutil.copytree(adapters["lora"].path, tmp_path / "copy")
    two = [adapters["lora"], LoRARequest("copy", 60, str(tmp_path / "copy"))]
    first, second = llm.generate([PROMPT] * 2, GREEDY, lora_request=two, use_tqdm=False)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert len(llm.engine.runner.loaded) == 1


def test_a_copy_is_read_where_it_is_when_the_first_folder_has_gone(base_folder, adapters, tmp_path):
    """One place: another adapter takes it, and the folder that the version was first seen in is deleted."""
    copies = [LoRARequest(n, i, shutil.copytree(adapters["lora"].path, tmp_path / n)) for i, n in enumerate("ab", 60)]
    llm = LLM(base_folder, max_loras=1)
    expected = [one(llm, copy) for copy in copies]
    one(llm, adapters["ia3"])
    shutil.rmtree(tmp_path / "a")
    assert [one(llm, copies[1])] * 2 == expected


def test_an_interrupt_while_an_adapter_is_taken_in_leaves_nothing(llm, adapters, monkeypatch):
    """It is read and taken in again when the next request asks for it, at every place that it had."""
    expected = one(llm, adapters["lora"])
    interpreter = llm.engine.runner.interpreter
    before = bytes_of(interpreter)
    llm.engine.remove_adapter(adapters["lora"].adapter_id)
    assert llm.engine.runner.loaded == set()

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(interpreter.native or interpreter, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one(llm, adapters["lora"])
    one(llm)
    assert interpreter.versions == {}
    assert one(llm, adapters["lora"]) == expected
    assert bytes_of(interpreter) == before
