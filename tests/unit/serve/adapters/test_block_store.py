"""A folder of packed adapters: its blocks are what reading an adapter gives, and what is wrong with it costs speed."""

from __future__ import annotations

import gc
import json
import os
import struct
import threading
import weakref
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.serve.conftest import METHODS, make_model, save_adapter

from patience import PATIENCE
from veneer import LLM, LoraConfig, LoRARequest, RandLoraConfig, SamplingParams
from veneer.errors import ConfigError, DescriptionError
from veneer.methods.randlora import Draw, bases
from veneer.serve import start
from veneer.serve.adapters import block_store
from veneer.serve.adapters.block_store import BlockStore
from veneer.serve.program.block import Blocks
from veneer.serve.program.block_layout import BlockLayout
from veneer.serve.runners import program_runner
from veneer.serve.runners.program_runner import ProgramAdapter, ProgramRunner, proved

PROMPT = [5, 99, 41, 7, 18, 61]
BESIDE = {"saved", "head", "tokens", "bottleneck", "prefix", "prompt", "multitask", "ptuning"}
UNSAID = {"fourierft"}  # its change is an object of its own


def runner_of(folder: Path, most: int = 1 << 30, base: str = "base", dtype: torch.dtype = torch.float32) -> Any:
    model = make_model().to(dtype)
    interpreter = proved(model, 64)
    store = BlockStore.open(folder, most, base, interpreter.maker)
    return ProgramRunner(model, interpreter, 5, 16, store=store)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def runners(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two of one folder, as if of two processes."""
    folder = tmp_path_factory.mktemp("cache") / "new" / "folder"
    return [runner_of(folder, dtype=request.param) for _ in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_another_process_reads_what_was_packed(runners, method, adapters):
    read = runners[0].read(Path(adapters[method].lora_path))
    runners[0].keep(method, read)
    kept = runners[1].kept(method)
    if method in BESIDE | UNSAID:
        assert kept is None
        return
    assert isinstance(kept, ProgramAdapter)
    assert kept.n_bytes == read.n_bytes
    mine, other = read.packed.linears, kept.packed.linears
    assert torch.equal(mine.memory, other.memory)
    assert mine.layout.text == other.layout.text
    assert mine.layout is not other.layout
    assert runners[1].kept(method).packed.linears.layout is other.layout


def test_what_layers_share_beside_a_block_is_counted_and_goes_with_it(tmp_path):
    config = RandLoraConfig(r=5, projection_prng_key=707, save_projection=False, target_modules=["q_proj", "down_proj"])
    folder, runner = save_adapter(tmp_path / "randlora", config), runner_of(tmp_path / "cache")
    read = runner.read(folder)
    layer = runner.model.model.layers[0].mlp.down_proj
    small, large = sorted((layer.out_features, layer.in_features))
    shared = bases(Draw(seed=707, r=5, small=small, large=large))
    assert read.packed.linears.layout.n_beside == sum(each.nbytes for each in shared.on(torch.device("cpu"))) > 0
    runner.keep("randlora", read)
    assert runner.kept("randlora") is None
    shared = weakref.ref(shared)
    del read
    gc.collect()
    assert shared() is None


@pytest.fixture
def base_folder(tmp_path: Path, tokenizer: Any) -> Path:
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def read_anew(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of adapters that were read."""
    found, read = list[Path](), ProgramRunner.read

    def counted(self: ProgramRunner, folder: Path) -> Any:
        found.append(folder)
        return read(self, folder)

    monkeypatch.setattr(program_runner.ProgramRunner, "read", counted)
    return found


def answers(llm: LLM, adapters: list[LoRARequest]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate([PROMPT] * len(adapters), params, lora_request=adapters, use_tqdm=False)
    llm.engine.close()  # waits for what is written
    return [output.outputs[0].token_ids for output in outputs]


KEPT = ("lora", "dora", "ia3", "vera", "lora_bias", "oft", "lokr")


def test_a_later_engine_answers_from_the_folder(base_folder, adapters, read_anew, tmp_path):
    """Of every kind, and a mix; not one that was replaced, nor on other weights."""
    cache, mine = tmp_path / "cache", [adapters[name] for name in KEPT]
    folder = save_adapter(tmp_path / "changing", LoraConfig(r=3, target_modules=["q_proj"]), seed=1)
    changing = LoRARequest("changing", 70, str(folder))
    mix = LoRARequest.mix("mix", 71, [(adapters["lora"], 0.4), (adapters["vera"], -0.7)])
    asked = [*mine, changing, mix]
    expected = answers(LLM(base_folder), asked)
    assert len({tuple(each) for each in expected}) > 4
    read_anew.clear()
    assert answers(LLM(base_folder, adapter_cache_dir=cache), asked) == expected
    assert len(read_anew) == len(mine) + 1
    read_anew.clear()
    assert answers(LLM(base_folder, adapter_cache_dir=cache), asked) == expected
    assert read_anew == []
    save_adapter(folder, LoraConfig(r=3, target_modules=["q_proj"]), seed=2)
    [other] = answers(LLM(base_folder), [changing])
    read_anew.clear()
    assert answers(LLM(base_folder, adapter_cache_dir=cache), asked) == [*expected[:-2], other, expected[-1]]
    assert read_anew == [folder]
    make_model(seed=8).save_pretrained(base_folder)
    read_anew.clear()
    expected = answers(LLM(base_folder), asked)
    assert answers(LLM(base_folder, adapter_cache_dir=cache), asked) == expected
    assert len(read_anew) == 2 * (len(mine) + 1)


def test_a_model_without_files_keeps_nothing(tokenizer, adapters, tmp_path, caplog):
    llm = LLM(make_model(), tokenizer=tokenizer, adapter_cache_dir=tmp_path / "cache")
    answers(llm, [adapters["lora"]])
    assert not (tmp_path / "cache").exists()
    assert "was not loaded from a folder" in caplog.text


@pytest.mark.parametrize("how", ["general", "no program"])
def test_an_engine_that_packs_nothing_says_that_the_folder_is_not_used(how, base_folder, tmp_path, caplog, monkeypatch):
    def refused(*given: Any, **more: Any) -> None:
        raise DescriptionError("its norm is odd")

    if how == "no program":
        monkeypatch.setattr(start, "proved", refused)
    LLM(base_folder, adapter_cache_dir=tmp_path / "cache", general_runner=how == "general")
    assert not (tmp_path / "cache").exists()
    [said] = [each.getMessage() for each in caplog.records if "adapter_cache_dir" in each.getMessage()]
    assert str(tmp_path / "cache") in said
    assert "transformers' own code" in said


def test_a_folder_without_a_name_is_not_the_working_folder(base_folder):
    with pytest.raises(ConfigError, match="adapter_cache_dir='' names no folder"):
        LLM(base_folder, adapter_cache_dir="")


def test_a_cache_has_room_for_something(base_folder, tmp_path):
    with pytest.raises(ConfigError, match="adapter_cache_bytes=0 must be at least 1"):
        LLM(base_folder, adapter_cache_dir=tmp_path, adapter_cache_bytes=0)


def damage(file: Path, how: str) -> None:
    raw = bytearray(file.read_bytes())
    if how == "cut":
        raw = raw[:-4096]
    elif how == "nearly gone":
        raw = raw[:40]
    elif how == "longer":
        raw += bytes(4096)
    else:
        raw[{"magic": 3, "key": 20, "layout": 60, "text": 150, "value": len(raw) - 70}[how]] ^= 4
    scratch = file.with_suffix(".new")
    scratch.write_bytes(raw)
    scratch.chmod(0o600)
    scratch.replace(file)


@pytest.mark.parametrize("how", ["cut", "nearly gone", "longer", "magic", "key", "layout", "text", "value"])
def test_a_damaged_file_is_read_anew_and_written_again(how, adapters, tmp_path, caplog):
    first, second = runner_of(tmp_path), runner_of(tmp_path)
    read = first.read(Path(adapters["dora"].lora_path))
    first.keep("v1", read)
    [file] = files(tmp_path)
    damage(file, how)
    assert second.kept("v1") is None
    assert second.kept("v1") is None
    assert len(caplog.records) == 1
    assert str(file) in caplog.text
    second.keep("v1", read)
    assert torch.equal(second.kept("v1").packed.linears.memory, read.packed.linears.memory)


def test_a_block_is_memory_of_its_own(adapters, tmp_path):
    """No descriptor stays with it, and a change of its file is none of it."""
    runner = runner_of(tmp_path)
    read = runner.read(Path(adapters["dora"].lora_path))
    runner.keep("v1", read)
    runner.kept("v1")  # whatever is opened once
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    blocks = [runner.kept("v1").packed.linears for _ in range(5)]
    assert not before or len(os.listdir("/proc/self/fd")) == before
    [file] = files(tmp_path)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    os.truncate(file, 0)
    assert all(torch.equal(block.memory, read.packed.linears.memory) for block in blocks)


def tensor(*shape: int, dtype: str = "torch.float32") -> list[Any]:
    return ["tensor", dtype, *shape]


def own(records: Any = None, whole: Any = None, pairs: Any = None) -> list[Any]:
    module = "veneer.model.program.version.OwnChanges"
    return [module, records or ["builtins.tuple"], whole or ["mapping"], pairs, ["builtins.tuple"], ["builtins.tuple"]]


def change(own: Any, step: Any = None) -> list[Any]:
    return ["veneer.serve.program.block_layout.GroupChange", own, step]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


SCALE = ["veneer.records.terms.scale.Scale", tensor(3)]
SCALED = ["veneer.records.deltas.LinearDelta", ["builtins.tuple"], SCALE, None, None]
RIGHT = [[change(own(["builtins.tuple", SCALED])), None], [[64], []], 128]
PAIRS = ["veneer.ops.pairs.PackedPairs", tensor(3), 3, ["builtins.tuple", 3], ["builtins.tuple", 1], False, None]
ODD = {
    "a tensor": [[tensor(3)], [[]], 64],
    "an empty form": [[[]], [[]], 64],
    "a negative size": [[tensor(-3)], [[64]], 128],
    "deep lists": f"[[{nested(5_000)}], [[]], 64]",
    "very deep lists": nested(200_000),
    "a number": [[1], [[]], 64],
    "no list": 5,
    "nothing": [],
    "no JSON": "{",
    "no text": b"\xff\xfe",
    "a mapping": {"a": 1, "b": 2, "c": 3},
    "a kind in the place of another": [[SCALED], [[64]], 128],
    "no own": [[change(None)], [[]], 64],
    "a record that is none": [[change(own(["builtins.tuple", 5]))], [[]], 64],
    "a scale of a text": [[change(own(["builtins.tuple", [*SCALED[:2], "x", None, None]]))], [[]], 64],
    "a vector of a number": [[change(own(["builtins.tuple", [*SCALED[:2], [SCALE[0], 3], None, None]]))], [[]], 64],
    "a matrix for a vector": [
        [change(own(["builtins.tuple", [*SCALED[:2], [SCALE[0], tensor(3, 3)], None, None]]))], [[64]], 128,
    ],
    "a key of a list": [[change(own(whole=["mapping", [["builtins.list"], None]]))], [[]], 64],
    "a key of a text": [[change(own(whole=["mapping", ["x", tensor(3)]]))], [[64]], 128],
    "a rank of a half": [[change(own(pairs=[*PAIRS[:4], ["builtins.tuple", 0.5], *PAIRS[5:]]))], [[64]], 128],
    "one field too few": [[change(own(pairs=PAIRS[:3]))], [[64]], 128],
    "no such dtype": [[change(own(["builtins.tuple", [*SCALED[:2], [SCALE[0], tensor(3, dtype="int8")], None, None]]))],
                      [[64]], 128],
    "a size beyond all": [[change(own(["builtins.tuple", [*SCALED[:2], [SCALE[0], tensor(10**30)], None, None]]))],
                          [[64]], 128],
    "a step that is none": [[change(own(), 7)], [[]], 64],
    "an offset too few": [*RIGHT[:1], [[], []], 128],
    "an offset beside": [*RIGHT[:1], [[-1], []], 128],
    "an offset too many": [*RIGHT[:1], [[64, 64], []], 128],
    "an offset outside": [*RIGHT[:1], [[128], []], 128],
    "an odd offset": [*RIGHT[:1], [[66], []], 128],
    "an offset of a half": [*RIGHT[:1], [[64.5], []], 128],
    "offsets of a group too few": [*RIGHT[:1], [[64]], 128],
    "offsets of a number": [*RIGHT[:1], [5, 6], 128],
    "bytes of a text": [*RIGHT[:2], "128"],
    "bytes of a half": [*RIGHT[:2], 128.5],
    "bytes beyond all": [*RIGHT[:2], 10**30],
    "negative bytes": [*RIGHT[:2], -128],
    "another part": [*RIGHT, 1],
}  # fmt: skip


def text_of(said: Any) -> bytes:
    return said if isinstance(said, bytes) else (said if isinstance(said, str) else json.dumps(said)).encode()


@pytest.mark.parametrize("what", ODD)
def test_an_odd_layout_is_a_value_error_alone(what, tmp_path, caplog):
    """Though its checksums are right."""
    assert BlockLayout.parse(text_of(RIGHT)).n_bytes == 128
    text = text_of(ODD[what])
    with pytest.raises(ValueError, match="its layout describes no block"):
        BlockLayout.parse(text)
    store = BlockStore.open(tmp_path, 1 << 30, "base", Blocks(3))
    values = bytes(128)
    key, check = store._key("v1"), zlib.crc32(values, zlib.crc32(text))
    head = struct.pack("<16s32s32sQQI", block_store._MAGIC, key, sha256(text).digest(), len(text), len(values), check)
    path = store._path("v1")
    path.touch(mode=0o600)
    path.write_bytes(head + text + values)
    assert store.find("v1") is None
    assert "its layout describes no block" in caplog.text


def test_another_version_of_veneer_finds_nothing(adapters, tmp_path, monkeypatch):
    runner = runner_of(tmp_path)
    runner.keep("v1", runner.read(Path(adapters["lora"].lora_path)))
    monkeypatch.setattr(block_store, "_VENEER", "77.7")
    assert runner.kept("v1") is None


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_what_others_can_write_to_is_not_used(adapters, tmp_path, caplog, monkeypatch):
    runner, cache = runner_of(tmp_path / "cache"), tmp_path / "cache"
    runner.keep("v1", runner.read(Path(adapters["lora"].lora_path)))
    assert cache.stat().st_mode & 0o777 == 0o700
    [file] = files(cache)
    file.chmod(0o620)
    assert runner.kept("v1") is None
    file.chmod(0o600)
    assert runner.kept("v1") is not None
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert runner.kept("v1") is None
    assert len(caplog.records) == 1
    cache.chmod(0o777)
    assert runner_of(cache).store is None
    cache.chmod(0o700)
    assert runner_of(cache).store is not None
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert runner_of(cache).store is None
    assert len(caplog.records) == 3


def test_a_folder_that_cannot_be_one_is_not_used(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    assert runner_of(tmp_path / "file").store is None
    assert runner_of(tmp_path / "file" / "below").store is None
    assert len(caplog.records) == 2


@pytest.mark.parametrize("how", ["full", "half written", "read-only"])
def test_a_disk_that_takes_nothing_costs_nothing_but_speed(how, adapters, tmp_path, caplog, monkeypatch):
    runner, folder = runner_of(tmp_path), Path(adapters["lora"].lora_path)
    read = runner.read(folder)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, values: Any) -> int:
            if how == "full":
                raise OSError(28, "No space left on device")
            return self.file.write(values[: len(values) // 2])

    with monkeypatch.context() as patched:
        if how == "read-only":

            def refused(**given: Any) -> None:
                raise OSError(30, "Read-only file system")

            patched.setattr(block_store.tempfile, "mkstemp", refused)
        else:
            fdopen = os.fdopen
            patched.setattr(block_store.os, "fdopen", lambda *given, **more: Full(fdopen(*given, **more)))
        for version in ("v1", "v2"):
            runner.keep(version, read)
            assert runner.kept(version) is None
    assert files(tmp_path) == []
    assert len(caplog.records) == 1
    runner.keep("v1", read)
    assert runner.kept("v1") is not None


def test_a_system_that_moves_few_bytes_a_call(adapters, tmp_path, monkeypatch):
    """Linux moves less than 2 GiB."""
    runner, fdopen, opened = runner_of(tmp_path), os.fdopen, open
    read = runner.read(Path(adapters["lora"].lora_path))

    class Few:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Few:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, values: Any) -> int:
            return self.file.write(values[:1001])

        def readinto(self, values: Any) -> int:
            return self.file.readinto(values[:1001])

    monkeypatch.setattr(block_store.os, "fdopen", lambda *given, **more: Few(fdopen(*given, **more)))
    monkeypatch.setattr(block_store, "open", lambda *given, **more: Few(opened(*given, **more)), raising=False)
    runner.keep("v1", read)
    assert torch.equal(runner.kept("v1").packed.linears.memory, read.packed.linears.memory)
    monkeypatch.setattr(Few, "readinto", lambda self, values: 0)
    assert runner.kept("v1") is None


def test_a_slow_disk_delays_no_answer(base_folder, adapters, tmp_path, monkeypatch):
    """An adapter answers before its block is written. That goes on when it is out of memory."""
    [expected] = answers(LLM(base_folder), [adapters["lora"]])
    cache, may, keep = tmp_path / "cache", threading.Event(), ProgramRunner.keep
    with monkeypatch.context() as patched:
        patched.setattr(ProgramRunner, "keep", lambda *given: (may.wait(PATIENCE), keep(*given))[1])
        llm = LLM(base_folder, adapter_cache_dir=cache)
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        [output] = llm.generate([PROMPT], params, lora_request=adapters["lora"], use_tqdm=False)
        assert output.outputs[0].token_ids == expected
        assert files(cache) == []
        llm.llm_engine.remove_lora(adapters["lora"].adapter_id)
        assert not llm.engine.runner.loaded
        may.set()
        llm.engine.close()
    assert len(files(cache)) == 1
    monkeypatch.setattr(ProgramRunner, "read", None)
    assert answers(LLM(base_folder, adapter_cache_dir=cache), [adapters["lora"]]) == [expected]


def test_files_of_others_stay(adapters, tmp_path):
    """Files that no store wrote are neither counted nor removed; those left half written are."""
    runner = runner_of(tmp_path)
    read = runner.read(Path(adapters["lora"].lora_path))
    runner.keep("v0", read)
    [file] = files(tmp_path)
    each = file.stat().st_size
    left = tmp_path / f".{file.stem}.ab_9x0cd.block"
    others = [tmp_path / name for name in ("mine.block", f"{file.stem}.block.block", f"{file.stem[1:]}.block", "x")]
    for path in (left, *others):
        path.write_bytes(bytes(each))
        os.utime(path, (1, 1))
    os.utime(file, (2, 2))
    small = runner_of(tmp_path, most=each)
    small.keep("v1", read)
    assert all(path.exists() for path in others)
    assert not left.exists()
    assert not file.exists()
    assert small.kept("v1") is not None


def test_the_folder_has_a_bound_and_those_used_last_stay(adapters, tmp_path):
    runner, names = runner_of(tmp_path), [f"v{number}" for number in range(7)]
    read = runner.read(Path(adapters["lora"].lora_path))
    runner.keep("v0", read)
    [file] = files(tmp_path)
    each = file.stat().st_size
    small = runner_of(tmp_path, most=5 * each + each // 2)

    def age(runner: Any, order: list[str]) -> None:
        for second, name in enumerate(order):
            path = runner.store._path(name)
            if path.exists():
                os.utime(path, (second, second))

    for name in names[1:5]:
        small.keep(name, read)
    age(small, names)
    assert small.kept("v0") is not None  # used now
    for name in names[5:]:
        small.keep(name, read)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 5 * each + each // 2
    assert [small.kept(name) is not None for name in names] == [True, False, False, True, True, True, True]
    tiny = runner_of(tmp_path, most=each - 1)
    tiny.keep("v9", read)
    assert tiny.kept("v9") is None
    assert len(files(tmp_path)) == 5


def test_a_block_of_another_program_is_read_anew(adapters, tmp_path):
    """A key says the weights' files; a program of other layers has another number of groups, or other sizes."""
    runner = runner_of(tmp_path)
    runner.keep("v1", runner.read(Path(adapters["lora"].lora_path)))
    model = make_model("wide")
    interpreter = proved(model, 64)
    other = ProgramRunner(
        model, interpreter, 5, 16, store=BlockStore.open(tmp_path, 1 << 30, "base", interpreter.maker)
    )
    assert other.kept("v1") is None
    assert runner.kept("v1") is not None
    assert BlockStore.open(tmp_path, 1 << 30, "other base", Blocks(3)).find("v1") is None
