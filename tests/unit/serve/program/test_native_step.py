"""The step in C++: the same bits as instruction by instruction, for models, versions and batches of every kind."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.unit.model.blueprint.families import FAMILIES as DESCRIBED
from tests.unit.model.blueprint.families import model_of
from tests.unit.serve.conftest import make_model, save_adapter

from veneer import BottleneckConfig, LoraConfig, VeraConfig
from veneer.errors import ShapeError
from veneer.model.batch.paged import Stretch
from veneer.model.program.operation import STREAM, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.version import Effects
from veneer.ops.cpu.module import kernels
from veneer.ops.cpu.step import StepNorm, StepProgram, StepRows, layer_parts, norm_parts, places
from veneer.ops.int8 import quantize_int8
from veneer.ops.norm import rms_norm_forward
from veneer.ops.packed import BLOCK as OUTPUTS
from veneer.ops.packed import PackedWeight, over_rows
from veneer.ops.packed_codes import PackedCodes
from veneer.serve.program.block import Blocks, PackedEffects
from veneer.serve.program.effects import Lookup, read_effects
from veneer.serve.program.interpreter import Interpreter
from veneer.serve.program.kv_cache import make_cache
from veneer.serve.program.native import NativeStep, NativeStretch
from veneer.serve.program.step import Piece, step_of
from veneer.serve.runners.program_runner import proved

from .test_program import LEFT

CPU, BLOCK = torch.device("cpu"), 16
TERMS = ("oft", "lokr", "shira", "c3a", "hira")
ALONE = ("lora", "dora", "ia3", "lora_bias", "adalora", "vera", "bottleneck", "saved", "head", *TERMS)


@pytest.fixture(params=kernels().isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels().isa()
    kernels().use_isa(request.param)
    yield request.param
    kernels().use_isa(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Run:
    """Sequences through an interpreter, step after step."""

    def __init__(self, interpreter: Interpreter, *, native: bool) -> None:
        self.interpreter, self.native = interpreter, interpreter.native if native else None
        self.cache = make_cache(interpreter.program, 64, BLOCK, interpreter.dtype, CPU)

    def step(self, *chunks: tuple[int, int, int, str | None]) -> torch.Tensor:
        """Logits of all rows of chunks: sequence, first position, rows, version."""
        pieces = [Piece(Stretch((3 * s, 3 * s + 1), at, n), version, range(n)) for s, at, n, version in chunks]
        ids = [(7 * s + 13 * position) % 97 for s, at, n, _ in chunks for position in range(at, at + n)]
        own, self.interpreter.native = self.interpreter.native, self.native
        self.interpreter._plans.clear()
        logits = self.interpreter.run(step_of(pieces, self.cache, CPU), torch.tensor(ids))
        self.interpreter.native = own
        return logits


def pair_of(interpreter: Interpreter) -> tuple[Run, Run]:
    return Run(interpreter, native=True), Run(interpreter, native=False)


def stretches(interpreter: Interpreter, step: PassRows) -> list[Any]:
    return [each for each in interpreter._operations(step) if isinstance(each, NativeStretch)]


def kinds(interpreter: Interpreter, step: PassRows) -> list[str]:
    """The kinds of what a pass calls."""
    return [type(getattr(each, "operation", each)).__name__ for each in interpreter._operations(step)]


def step_with(interpreter: Interpreter, *versions: str | None) -> PassRows:
    cache = make_cache(interpreter.program, 64, BLOCK, interpreter.dtype, CPU)
    return step_of([Piece(Stretch((s,), 0, 1), v, (0,)) for s, v in enumerate(versions)], cache, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_chunks_and_decoding_on_every_instruction_set(isa, threads, dtype):
    fast, slow = pair_of(proved(make_model().to(dtype), 100))
    for chunks in (
        ((0, 0, 17, None), (1, 0, 2, None)),
        ((0, 17, 1, None), (1, 2, 9, None), (2, 0, 1, None)),
        ((0, 18, 1, None), (1, 11, 1, None), (2, 1, 1, None), *((s, 0, 1, None) for s in range(3, 20))),
    ):
        assert torch.equal(fast.step(*chunks), slow.step(*chunks))


@pytest.mark.parametrize("family", [family for family in DESCRIBED if family not in LEFT])
def test_families(family):
    """Norms, joined projections, heads by head, biases, windows, caps, norms of heads, parallel halves."""
    fast, slow = pair_of(proved(model_of(family, torch.float32), 11 if family == "llama, dynamic" else 20))
    for chunks in (((0, 0, 9, None), (1, 0, 3, None)), ((0, 9, 1, None), (1, 3, 7, None))):
        assert torch.equal(fast.step(*chunks), slow.step(*chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(  # norms of heads, of all heads at once, turned pairs, heads in groups, a bias by position
    "family", ["gemma3", "hunyuan", "olmo2", "glm4", "falcon, groups", "bloom"]
)
@pytest.mark.parametrize("threads", [2, 5], indirect=True)
def test_many_sequences_are_shared_out_among_threads(family, threads, dtype):
    """Sequences of like work, each through attention on one thread; then one beside which the others are little."""
    fast, slow = pair_of(proved(model_of(family, dtype), 40))
    alike = [(s, 0, 11 + s % 3, None) for s in range(20)]
    uneven = [(0, 11, 21, None), *((s, 11 + s % 3, 1, None) for s in range(1, 20))]
    for chunks in (alike, uneven):
        assert torch.equal(fast.step(*chunks), slow.step(*chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3 experts", "qwen2 experts"])  # with a shared expert and its gate
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_a_row_through_experts_is_the_same_alone_and_in_a_crowd(family, threads, dtype, isa):
    """Threads share out experts if there are many of them, and products otherwise."""
    interpreter = proved(model_of(family, dtype), 40)
    fast, slow = pair_of(interpreter)
    crowd = [(s, 0, 7 + s % 3, None) for s in range(12)]
    together = fast.step(*crowd)
    assert torch.equal(together, slow.step(*crowd))
    at = 0
    for s, _, n, _ in crowd:
        assert torch.equal(Run(interpreter, native=True).step((s, 0, n, None)), together[at : at + n])
        at += n


@pytest.mark.parametrize("family", ["bloom", "falcon, by positions", "falcon, groups"])
def test_heads_in_groups_and_biases_are_native(family, isa):
    fast, slow = pair_of(proved(model_of(family, torch.bfloat16), 40))
    assert kinds(fast.interpreter, step_with(fast.interpreter, None)) == ["NativeStretch", "Logits"]
    for chunks in (((0, 0, 19, None), (1, 0, 3, None)), ((0, 19, 1, None), (1, 3, 7, None))):
        assert torch.equal(fast.step(*chunks), slow.step(*chunks))


def test_positions_without_a_bias_are_refused():
    fast, slow = pair_of(proved(model_of("mpt, clipped by 0, which is not at all", torch.float32), 16))
    with pytest.raises(IndexError, match="beyond those that have a bias"):
        fast.step((0, 0, 17, None))
    with pytest.raises(ShapeError, match="bias must be"):
        slow.step((0, 0, 17, None))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mixtral"])
def test_a_decoder_is_one_call(family):
    interpreter = proved(make_model(family), 100)
    assert kinds(interpreter, step_with(interpreter, None)) == ["NativeStretch", "Logits"]


def loaded(dtype: torch.dtype, folders: dict[str, Path], family: str = "llama") -> Interpreter:
    model = make_model(family).to(dtype)
    interpreter = proved(model, 100)
    for name, folder in folders.items():
        effects = replace(read_effects(Lookup(model), interpreter.program, folder), front=None)
        interpreter.take(name, interpreter.packed(effects))
    return interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_versions_of_every_method(dtype, isa, adapters):
    """Alone in their batch, all together, and beside the base: the same bits, whatever the companions."""
    folders = {name: Path(adapters[name].lora_path) for name in ALONE}
    fast, slow = pair_of(loaded(dtype, folders))
    everyone = [None, *ALONE, "lora", None, "dora"]
    together = [(s, 0, 3 + s % 5, version) for s, version in enumerate(everyone)]
    both = fast.step(*together)
    assert torch.equal(both, slow.step(*together))
    at = 0
    for chunk in together:
        n = chunk[2]
        alone = Run(fast.interpreter, native=True).step(chunk)
        assert torch.equal(both[at : at + n], alone)
        assert chunk[3] is None or not torch.equal(alone, Run(fast.interpreter, native=True).step((*chunk[:3], None)))
        at += n


def test_every_method_is_one_call(adapters):
    interpreter = loaded(torch.float32, {name: Path(adapters[name].lora_path) for name in ALONE})
    for each in ALONE:
        assert len(stretches(interpreter, step_with(interpreter, None, each))) == 1
    assert len(stretches(interpreter, step_with(interpreter, *ALONE))) == 1


def test_what_is_done_by_instruction(tmp_path):
    """An update of the embeddings; and nothing any more when it has gone."""
    config = LoraConfig(r=2, target_modules=["v_proj", "embed_tokens"])
    interpreter = loaded(torch.float32, {"table": save_adapter(tmp_path / "table", config)})
    assert kinds(interpreter, step_with(interpreter, None, "table")) == ["Embed", "NativeStretch", "Logits"]
    fast, slow = pair_of(interpreter)
    chunks = ((0, 0, 5, None), (1, 0, 3, "table"))
    assert torch.equal(fast.step(*chunks), slow.step(*chunks))
    interpreter.drop("table")
    assert len(interpreter._operations(step_with(interpreter, None))) == 2


NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gemma2": ["input_layernorm", "post_feedforward_layernorm", "norm"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NORMS)
def test_norms_of_versions(family, dtype, isa, tmp_path):
    """Beside the base and each other, of the halves and of the head, of which the likeliest token is asked too."""
    target = ["c_attn"] if family == "gpt2" else ["v_proj"]
    configs = {
        "few": LoraConfig(r=2, target_modules=target, modules_to_save=NORMS[family][:1]),
        "all": LoraConfig(r=2, target_modules=target, modules_to_save=NORMS[family]),
    }
    folders = {name: save_adapter(tmp_path / name, config, family) for name, config in configs.items()}
    fast, slow = pair_of(loaded(dtype, folders, family))
    chunks = [(s, 0, 2 + s, version) for s, version in enumerate((None, "few", "all", None, "all"))]
    logits = fast.step(*chunks)
    assert torch.equal(logits, slow.step(*chunks))
    last = torch.tensor([n for _, _, n, _ in chunks]).cumsum(0) - 1
    expected = torch.cat([logits[last[:1]], logits[last[2:]]]).argmax(dim=1)
    assert torch.equal(picked_of(fast.interpreter, *chunks).tokens, expected)
    for chunk, rows in zip(chunks, logits.split([n for _, _, n, _ in chunks]), strict=True):
        assert torch.equal(rows, Run(fast.interpreter, native=True).step(chunk))
    assert len(stretches(fast.interpreter, step_with(fast.interpreter, None, *configs))) == 1
    before = fast.step(chunks[0])
    fast.interpreter.drop("all")
    assert torch.equal(fast.step(chunks[0]), before)


BOTTLENECKS = {
    "houlsby": BottleneckConfig.houlsby(reduction_factor=5, non_linearity="swish"),
    "pfeiffer": BottleneckConfig(reduction_factor=3, non_linearity="gelu_new"),
    "parallel": BottleneckConfig.parallel(reduction_factor=7, non_linearity="tanh"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bottlenecks_of_every_kind(family, dtype, isa, tmp_path):
    """Where halves go right into the stream, where they have a bias or a norm first; beside LoRA and the base."""
    configs = BOTTLENECKS | {"lora": LoraConfig(r=3, target_modules="all-linear")}
    folders = {name: save_adapter(tmp_path / name, config, family) for name, config in configs.items()}
    fast, slow = pair_of(loaded(dtype, folders, family))
    together = [(s, 0, 2 + s, version) for s, version in enumerate((None, *configs, "houlsby"))]
    both = fast.step(*together)
    assert torch.equal(both, slow.step(*together))
    rows = both.split([n for _, _, n, _ in together])
    for chunk, given in zip(together, rows, strict=True):
        assert torch.equal(given, Run(fast.interpreter, native=True).step(chunk))
        base = Run(fast.interpreter, native=True).step((*chunk[:3], None))
        assert chunk[3] is None or not torch.equal(given, base)
    assert len(stretches(fast.interpreter, step_with(fast.interpreter, *configs))) == 1


def test_layers_share_the_matrices_of_vera(tmp_path):
    """They are packed once for layers of one shape, and what the version takes does not grow with the layers."""
    folder = save_adapter(tmp_path / "vera", VeraConfig(r=64, target_modules="all-linear"))
    model = make_model()
    interpreter = proved(model, 100)
    packed = interpreter.packed(read_effects(Lookup(model), interpreter.program, folder))
    owns = [own for own in packed.linears if own is not None]
    per_layer = len(owns) // 2
    assert [own.pairs.factors.data_ptr() for own in owns[:per_layer]] == [
        own.pairs.factors.data_ptr() for own in owns[per_layer:]
    ]
    assert owns[0].pairs.shares_a
    assert not torch.equal(owns[0].pairs.middle.core, owns[per_layer].pairs.middle.core)


def test_a_version_takes_the_place_of_one_that_went(adapters):
    folders = {name: Path(adapters[name].lora_path) for name in ("lora", "ia3")}
    interpreter = loaded(torch.float32, folders)
    fast, slow = pair_of(interpreter)
    before = fast.step((0, 0, 5, "ia3"))
    interpreter.drop("lora")
    effects = read_effects(Lookup(make_model()), interpreter.program, Path(adapters["dora"].lora_path))
    interpreter.take("dora", interpreter.packed(effects))
    assert torch.equal(fast.step((1, 0, 5, "dora")), slow.step((1, 0, 5, "dora")))
    assert not torch.equal(fast.step((1, 0, 5, "dora")), fast.step((1, 0, 5, None)))
    assert torch.equal(fast.step((0, 0, 5, "ia3")), before)


def test_biases_of_versions_and_of_the_base(tmp_path):
    """GPT-2's layers have biases, which some versions replace, beside rows that keep them."""
    folders = {}
    for name, config in {
        "all": LoraConfig(r=2, bias="all", target_modules=["c_attn", "c_proj"]),
        "dora": LoraConfig(r=3, use_dora=True, target_modules=["c_attn", "c_fc"]),
        "plain": LoraConfig(r=3, target_modules=["c_attn"]),
    }.items():
        folders[name] = save_adapter(tmp_path / name, config, family="gpt2")
    fast, slow = pair_of(loaded(torch.float32, folders, "gpt2"))
    chunks = [(s, 0, 3 + s, version) for s, version in enumerate((None, "dora", "plain", "all", None))]
    assert torch.equal(fast.step(*chunks), slow.step(*chunks))


def test_sums_of_the_stream(isa):
    for dtype in (torch.float32, torch.bfloat16):
        half, h = torch.randn(7, 2, 37, dtype=torch.float32).to(dtype).unbind(1)
        expected = h + half * 0.37
        got = h.clone()
        kernels().stream_add(
            7, 37, 0 if dtype == torch.float32 else 1, 0.37, half.data_ptr(), half.stride(0), got.data_ptr(), 37
        )
        assert torch.equal(got, expected)


def test_threads_that_wait_for_each_other_again_and_again():
    """More than there are cores, so that they sleep; calls from several threads, each with a team of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    runs = [Run(proved(make_model(seed=seed), 100), native=True) for seed in (3, 4)]
    chunks = tuple((s, 0, 3, None) for s in range(16))
    expected = [run.step(*chunks) for run in runs]
    assert not torch.equal(*expected)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(9):
            found = list(pool.map(lambda run: run.step(*chunks), runs))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "spoilt", [lambda x: x.to(torch.bfloat16), lambda x: x.double(), lambda x: x[:-1], lambda x: x[:, :-1]]
)
def test_rows_that_do_not_fit_are_told(spoilt):
    """Registers that an instruction between two stretches leaves are looked at before C++ reads them."""
    interpreter = proved(make_model(), 100)
    operations = interpreter._operations(step_with(interpreter, None), by_ids=False)
    [stretch] = [each for each in operations if isinstance(each, NativeStretch)]
    rows, [stream] = torch.ones(5, 24), stretch.reads
    given = {stream: stretch._given({STREAM: rows}, stream, 5)}
    assert stretch._registers({STREAM: rows}, 5, given)[0] == rows.data_ptr()
    with pytest.raises(ShapeError, match=r"register 'h' .*\(5, 24\) in float32"):
        stretch._given({STREAM: spoilt(rows)}, stream, 5)


def test_rows_that_are_read_live_until_the_end():
    """A stretch that also writes a register of their name, with another width, takes them out of the frame."""
    read, written = Register("y", (8,)), Register("y", (5,))
    seen: list[float] = []

    def run(place, registers, pages, rows, runs):
        torch.full((3, 8), -1.0)  # takes the memory of rows that were given up
        seen.extend(ctypes.cast(registers[0], ctypes.POINTER(ctypes.c_float))[k] for k in range(24))

    program = SimpleNamespace(dtype=torch.float32, n_tensors=2, first_of=lambda r: int(r == written), run=run)
    native = SimpleNamespace(
        program=program, n_moves=0, numbers={None: 0}, rows_of=lambda r, n: [torch.zeros(n, *r.widths)]
    )
    operation = SimpleNamespace(reads=(read,), writes=(written,))
    stretch = NativeStretch(native, [SimpleNamespace(place=range(1), bound=SimpleNamespace(operation=operation))])
    rows = SimpleNamespace(
        positions=range(3), cache=None, runs=SimpleNamespace(runs=[]), versions=[], picked=None, tokens=None
    )
    stretch(rows, {"given": torch.arange(3), "y": torch.arange(24.0).view(3, 8)})
    assert seen == list(range(24))


def test_the_logits_come_last():
    interpreter = proved(make_model(), 100)
    assert kinds(interpreter, step_with(interpreter, None))[-1] == "Logits"


def picked_of(interpreter: Interpreter, *chunks: tuple[int, int, int, str | None]) -> PassRows:
    """A step of chunks (sequence, first position, rows, version), which has run; all but the second are picked."""
    cache = make_cache(interpreter.program, 64, BLOCK, interpreter.dtype, CPU)
    pieces = [
        Piece(Stretch((3 * s, 3 * s + 1), at, n), version, *((range(n),) if i == 1 else ((), True)))
        for i, (s, at, n, version) in enumerate(chunks)
    ]
    step = step_of(pieces, cache, CPU)
    ids = torch.tensor([(7 * s + 13 * p) % 97 for s, at, n, _ in chunks for p in range(at, at + n)])
    assert len(interpreter.run(step, ids)) == chunks[1][2]
    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_likeliest_tokens_without_logits(family, dtype, isa, threads):
    """Norms of each kind, scaled embeddings, a cap, which no order depends on; beside a request that needs logits."""
    fast = proved(make_model(family).to(dtype), 100)
    chunks = [(s, 0, 2 + 3 * s % 7, None) for s in range(19)]
    logits = Run(fast, native=True).step(*chunks)
    last = torch.tensor([n for _, _, n, _ in chunks]).cumsum(0) - 1
    expected = torch.cat([logits[last[:1]], logits[last[2:]]]).argmax(dim=1)
    assert torch.equal(picked_of(fast, *chunks).tokens, expected)


def test_likeliest_tokens_beside_versions(adapters):
    """A version that changes the head, or the last norm, has its logits made; the same tokens either way."""
    fast = loaded(torch.float32, {name: Path(adapters[name].lora_path) for name in ALONE})
    for versions in ((None, "lora", "ia3"), (None, "dora", "head"), ("saved", None, "bottleneck")):
        chunks = [(s, 0, 3 + s, version) for s, version in enumerate(versions)]
        tokens = picked_of(fast, *chunks).tokens
        native, fast.native = fast.native, None
        fast._plans.clear()
        assert torch.equal(tokens, picked_of(fast, *chunks).tokens)
        fast.native = native
    known = step_with(fast, None, "lora")
    assert kinds(fast, known) == ["NativeStretch", "Logits"]
    assert "Pick" in kinds(fast, step_with(fast, "head"))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_tokens_of_logits_that_are_not_finite(odd):
    """There are none: whoever asks is to look at the logits."""
    model = make_model()
    interpreter = proved(model, 100)
    with torch.no_grad():
        model.model.norm.weight[2] = odd
    broken = Interpreter(model, interpreter.program, interpreter._packed)
    assert picked_of(broken, (0, 0, 3, None), (1, 0, 2, None)).tokens.tolist() == [-1]


HEADS = {
    "dense": PackedWeight.pack,
    "int8": lambda weight: PackedCodes.pack_int8(*quantize_int8(weight), weight.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
def test_stretches_of_a_vocabulary(kind, dtype, isa):
    """More logits than are made at a time, with equal ones far apart: the tokens of all logits at once."""
    n, d, words = 331, 37, 1201
    generator = torch.Generator().manual_seed(7)
    x, weight = (torch.randn(r, d, generator=generator).to(dtype) for r in (n + 2, words))
    weight[1100:] = weight[:101]
    bias = torch.randn(words, generator=generator).to(dtype)
    bias[1100:] = bias[:101]
    packed = HEADS[kind](weight)
    norm_weight = (1 + torch.rand(d, generator=generator)).to(dtype)
    program = StepProgram(dtype)
    norm = StepNorm(norm_weight.float(), None, 1e-5, subtracts_mean=False)
    output_bytes = packed.nbytes // (words + -words % OUTPUTS)
    program.add("head", norm_parts(norm), layer_parts(packed, bias, -1), output_bytes, 0, 0.7)
    picked, tokens = torch.arange(1, n + 1), torch.full((n,), -1)
    program.run(range(1), places([x]), None, StepRows(torch.zeros(n + 2).long(), None, picked, tokens), [])
    normed, _ = rms_norm_forward(x[1 : n + 1], norm_weight, 1e-5)
    logits = packed.matmul(normed, onto=over_rows(bias, n)).float() * 0.7
    assert torch.equal(tokens, logits.argmax(dim=1))
    assert (tokens < 1100).all()


@pytest.mark.parametrize("wrong", [-1, "all"])
def test_ids_and_positions_that_are_not_there(wrong):
    interpreter = proved(make_model(), 100)
    n_tokens = interpreter.program.embedding.n_tokens
    run = Run(interpreter, native=True)
    step = step_of([Piece(Stretch((0,), 0, 2), None, (0, 1))], run.cache, CPU)
    with pytest.raises(IndexError, match="not in the table"):
        interpreter.run(step, torch.tensor([5, n_tokens if wrong == "all" else wrong]))
    step.positions[1] = 100 if wrong == "all" else wrong
    with pytest.raises(IndexError, match="beyond those of the program"):
        interpreter.run(step, torch.tensor([5, 7]))


def test_a_version_gets_the_least_number_that_is_free():
    native = NativeStep(torch.float32, {})
    packed = PackedEffects(Effects(), Blocks(1).block([], [])[0], {})
    for version in "abcd":
        native.take(version, packed)
    for version in "ca":
        native.drop(version)
    for version in "ef":
        native.take(version, packed)
    assert native.numbers == {"b": 1, "d": 3, "e": 0, "f": 2}
