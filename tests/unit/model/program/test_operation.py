"""Operations of a program: one that is added in a file of its own, and what each says about itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.unit.model.blueprint.families import model_of
from tests.unit.model.steps import BATCHES, adapted, error, step

from veneer import BottleneckConfig, LoraConfig
from veneer.model.batch.paged import Stretch
from veneer.model.blueprint.describe import blocks_of, describe
from veneer.model.fused.block import FusedBlock, halves_of
from veneer.model.fused.decoder import fuse
from veneer.model.memory.checkpointing import checkpoint_selectively
from veneer.model.program import stretch
from veneer.model.program.acting import Acting
from veneer.model.program.into_stream import IntoStream
from veneer.model.program.operation import Frame, Operation, Register
from veneer.model.program.program import Program, compile_program
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.program.kv_cache import make_cache
from veneer.serve.program.step import Piece, step_of
from veneer.serve.runners.program_runner import proved

CPU, N = torch.device("cpu"), 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(Trained):
    """Bound of the stream: ``stream`` within ± ``limit``."""

    read = written = trains_on = needed = ("stream",)

    stream: Register
    limit: float

    def forward(self, weights: None, rows: PassRows, frame: Frame) -> None:
        frame[self.stream.name] = frame[self.stream.name].clamp(-self.limit, self.limit)

    def acting(self, at: Acting) -> tuple[()]:
        return ()

    def train(self, weights: tuple[()], run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        [x] = self.stream.read(frame)
        self.stream.write(frame, [x.clamp(-self.limit, self.limit)])
        return ()

    def back(self, weights: tuple[()], tape: Tape) -> None:
        [dy], [x] = tape.take(self.stream), tape.value(self.stream)
        tape.give(self.stream, [dy * (x.abs() <= self.limit)])


def clipped(program: Program, limit: float) -> Program:
    """The program with a bound behind each block, whose second half goes into the stream last."""
    found, n_halves = list[Operation](), 0
    for each in program.operations:
        found.append(each)
        if isinstance(each, IntoStream):
            n_halves += 1
            found += [Clip(stream=each.stream, limit=limit)] if n_halves % 2 == 0 else []
    return replace(program, operations=tuple(found))


def clip_block(limit: float) -> Any:
    return lambda module, given, h: h.clamp(-limit, limit)


def test_an_operation_of_a_file_of_its_own_runs_between_those_of_the_step():
    """A stream that is clipped behind each block, as hooks clip the model's own."""
    model, limit = model_of("mistral", torch.float32), 1.7
    whole, ids = proved(model, N), torch.arange(N) * 7 % 97
    interpreter = Interpreter(model, clipped(whole.program, limit), whole._packed)
    cache = make_cache(whole.program, 1, 16, torch.float32, CPU)
    step = step_of([Piece(Stretch((0,), 0, N), None, range(N))], cache, CPU)
    names = [type(getattr(each, "operation", each)).__name__ for each in interpreter._operations(step)]
    assert names == ["NativeStretch", "Clip"] * len(model.model.layers) + ["NativeStretch", "Logits"]
    with torch.no_grad():
        plain = model(ids[None]).logits[0]
        for layer in model.model.layers:
            layer.register_forward_hook(clip_block(limit))
        expected = model(ids[None]).logits[0]
    found = interpreter.run(step, ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (plain - expected).abs().max() > 0.1


def test_an_operation_of_a_file_of_its_own_is_trained_with_those_around_it():
    """In one node with the half in front; with bottlenecks, which act before the sum, that half runs its own code."""
    limit = 1.7
    for family, config, selective in (
        ("llama", LoraConfig(r=3, target_modules="all-linear"), False),
        ("gemma3", LoraConfig(r=3, target_modules="all-linear"), True),
        ("neox", LoraConfig(r=3, target_modules="all-linear"), True),
        ("llama", BottleneckConfig(reduction_factor=7), False),
    ):
        model = adapted(model_of(family, torch.float32), config)
        model.enable_input_require_grads()
        assert fuse(model)
        if selective:
            checkpoint_selectively(model)
        blocks = blocks_of(model)[1]
        handles = [block.register_forward_hook(clip_block(limit)) for block in blocks]
        expected = step(model, BATCHES["packed"])
        for handle in handles:
            handle.remove()
        for block in blocks:
            clip_trained(block, limit)
        found = step(model, BATCHES["packed"])
        if isinstance(config, BottleneckConfig):
            assert {half for block in blocks for half in halves_of(block, torch.float32, torch.float32)[1:]} == {None}
            continue
        assert torch.equal(found[0], expected[0]), family
        assert error(found[2], expected[2]) == 0, family


def clip_trained(block: FusedBlock, limit: float) -> None:
    """Bound the stream behind the second half of a fused block, in its node."""
    program = block.fused_program
    assert program.mlp is not None
    clip = Clip(stream=program.mlp.target, limit=limit)
    block.fused_program = replace(program, mlp=stretch.TrainedStretch((*program.mlp.operations, clip)))


def test_operations_say_what_they_read_write_and_keep():
    """Each register is written before it is read; layers are those of the description, keys those of its heads."""
    for family in ("llama", "gpt2", "gemma3", "neox", "qwen2 experts"):
        decoder = describe(model_of(family, torch.float32))
        program, written = compile_program(decoder, N), set[Register]()
        for each in program.operations:
            assert written >= set(each.reads)
            written |= set(each.writes)
        assert set(program.linears) <= {linear.path for linear in decoder.linears}
        assert [(keys.n_heads, keys.width) for keys in program.states] == [
            (part.heads.n_kv_heads, part.heads.head_dim) for part in decoder.attentions
        ]
