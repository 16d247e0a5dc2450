"""One block of memory for all that a version changes at linear layers: its values, its layout, its objects."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.serve.conftest import METHODS, make_model, save_adapter

from veneer import IA3Config, LoraConfig
from veneer.model.program.linears import VersionPacking
from veneer.model.program.version import Effects
from veneer.ops.linear.layer import NOTHING
from veneer.ops.pairs import Middle
from veneer.plain.tensor_tree import bytes_of, mapped
from veneer.serve.program.block import VersionBlock
from veneer.serve.program.effects import Lookup, read_effects
from veneer.serve.program.form import form_of
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.runners.program_runner import proved

from .test_native_step import Run


def effects_of(interpreter: Interpreter, folder: Path) -> Effects:
    return replace(read_effects(Lookup(make_model().to(interpreter.dtype)), interpreter.program, folder), front=None)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def interpreter(request: pytest.FixtureRequest) -> Interpreter:
    return proved(make_model().to(request.param), 100)


def tensors(held: object) -> list[torch.Tensor]:
    """Return the tensors of an object in order, each as often as it occurs."""
    found = list[torch.Tensor]()
    mapped(held, lambda x: found.append(x) or x)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_block_holds_what_was_packed(interpreter, method, adapters, tmp_path):
    """The same objects with the same values, all of whose memory is the block's."""
    folder = Path(adapters[method].lora_path)
    packing, effects = VersionPacking(), effects_of(interpreter, folder)
    packed = [linears.packed(effects, packing) for linears in interpreter._linears]
    packing.packer.run()
    block = interpreter.packed(effects_of(interpreter, folder)).linears
    assert [form_of(own) for own in block] == [form_of(own) for own in packed]
    found, expected = tensors(list(block)), tensors(packed)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    placed = [x for x in found if x.is_contiguous()]
    assert len(placed) == len(found) or method == "oft"  # whose rotations are transposed
    assert {x.untyped_storage().data_ptr() for x in placed} <= {block.memory.data_ptr()}
    assert all(x.data_ptr() % 64 == 0 for x in placed)
    assert bytes_of(packed) <= block.nbytes <= 2 * bytes_of(packed) + 64 * (len(found) + 1) + mmap.PAGESIZE
    for own, was in zip(block, packed, strict=True):  # plain layers are known by identity
        assert own is None or [r is NOTHING for r in own.records] == [r is NOTHING for r in was.records]


def block_of(interpreter: Interpreter, folder: Path) -> VersionBlock:
    return interpreter.packed(effects_of(interpreter, folder)).linears


def test_equal_layouts_are_one(interpreter, tmp_path):
    """Adapters that differ in values; not those of another rank, method or layer, nor those with other numbers."""
    told: dict[str, Any] = {
        "one": LoraConfig(r=3, target_modules=["q_proj"]),
        "other": LoraConfig(r=3, target_modules=["q_proj"], lora_alpha=77),
        "rank": LoraConfig(r=4, target_modules=["q_proj"]),
        "layer": LoraConfig(r=3, target_modules=["k_proj"]),
        "dora": LoraConfig(r=3, target_modules=["q_proj"], use_dora=True),
        "more dora": LoraConfig(r=3, target_modules=["q_proj"], use_dora=True),
        "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    }
    folders = {name: save_adapter(tmp_path / name, config, seed=len(name)) for name, config in told.items()}
    blocks = {name: block_of(interpreter, folder) for name, folder in folders.items()}
    layouts = {name: block.layout for name, block in blocks.items()}
    assert layouts["one"] is layouts["other"]
    assert layouts["dora"] is layouts["more dora"]
    assert len({id(layout) for layout in layouts.values()}) == 5
    assert not torch.equal(blocks["one"].memory, blocks["other"].memory)


def test_objects_are_made_only_where_torch_needs_them(interpreter, adapters, tmp_path):
    """A pass of which all is in the call makes none, and one by torch those of groups that the version changes."""
    names = ("lora", "dora", "ia3", "vera", "lora_bias")
    for name in names:
        interpreter.take(name, interpreter.packed(effects_of(interpreter, Path(adapters[name].lora_path))))
    fast = Run(interpreter, native=True)
    logits = fast.step(*((s, 0, 2 + s, name) for s, name in enumerate(names)))
    assert not any(interpreter.versions[name].linears._made for name in names)
    slow = Run(interpreter, native=False)
    assert torch.equal(logits, slow.step(*((s, 0, 2 + s, name) for s, name in enumerate(names))))
    for name in names:
        block = interpreter.versions[name].linears
        assert sorted(block._made) == [i for i, change in enumerate(block.layout.changes) if change is not None]
    for name in names:
        interpreter.drop(name)


def test_a_layout_goes_with_the_last_version_that_has_it(interpreter, tmp_path):
    native = interpreter.native
    assert native is not None
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    for name in "abc":
        folder = save_adapter(tmp_path / name, config, seed=ord(name))
        interpreter.take(name, interpreter.packed(effects_of(interpreter, folder)))
    assert [len(layout.versions) for layout in native._layouts.values()] == [3]
    before = Run(interpreter, native=True).step((0, 0, 5, "c"))
    for name in "ab":
        interpreter.drop(name)
    assert torch.equal(Run(interpreter, native=True).step((0, 0, 5, "c")), before)
    assert not torch.equal(Run(interpreter, native=True).step((0, 0, 5, None)), before)
    interpreter.drop("c")
    assert native._layouts == native._taken == native.numbers == {}


def test_a_tensor_that_has_no_place_stays_beside_its_block(interpreter, tmp_path):
    """Its layout belongs to that version alone, and its bytes are counted."""
    folder = save_adapter(tmp_path / "a", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    effects = [effects_of(interpreter, folder) for _ in range(2)]
    for each in effects:
        each.linear = {
            path: mapped(record, lambda x: x[:, None].repeat(1, 2)[:, 0]) for path, record in each.linear.items()
        }
        assert not any(x.is_contiguous() for record in each.linear.values() for x in record.tensors)
    first, second = (interpreter.packed(each).linears for each in effects)
    assert first.layout is not second.layout
    beside = [x for own in first for x in tensors(own) if own is not None]
    assert first.nbytes == first.memory.nbytes + -first.memory.nbytes % mmap.PAGESIZE + bytes_of(beside)


def test_what_two_objects_have_in_common():
    core = torch.zeros(3)
    middle = Middle(core, None, "relu", None, core)
    other = mapped(middle, lambda x: x + 1)
    assert isinstance(other, Middle)
    assert torch.equal(other.core, torch.ones(3))
    assert form_of([middle]) == form_of([other])
    assert form_of(middle) != form_of(middle._replace(activation="tanh"))
    assert form_of(middle) != form_of(middle._replace(core=core.double()))
    assert form_of(middle) != form_of(middle._replace(core=None))
    assert mapped({"a": (middle, 7)}, lambda x: x)["a"] == (middle, 7)
    assert bytes_of([middle, core[1:], core.to("meta")]) == 12
