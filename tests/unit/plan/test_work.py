"""The work of a step: what is counted where, and the seconds that each kind of it gets."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import llama_config
from tests.unit.plan.conftest import Make

from bench.training.measured import measured_model
from veneer.model.memory.offload import ActivationOffload, PageFile
from veneer.ops.cpu.module import DTYPES
from veneer.ops.traced import row_slices
from veneer.plan.live_bytes import LiveBytes
from veneer.plan.machine import Rates
from veneer.plan.memory_trace import make_optimizer, prepare, run_steps, trace
from veneer.plan.plan import batch_of, plan_recipe
from veneer.plan.products import MatrixProduct
from veneer.plan.work import Codec, CountWork, Work

Q4_K, GPTQ = Codec("ggml_decode", (12,)), Codec("scaled_decode", (4, 0, 2, 5, 0, 1, 64, 2))
WORK = Work(
    Counter({MatrixProduct(3, 5, 7, "bfloat16"): 2}), attention=11.0, torch_attention=Counter({130: 13}), decoded=17.0,
    decoded_tiles=Counter({Q4_K: 43, GPTQ: 47}), moved=19.0, updated=23.0, updated_8bit=29.0,
    on_disk=41.0, n_ops=31, n_watched=37, n_general=5,
)  # fmt: skip
RATES = {
    "product 3 5 7 bfloat16": 2.0, "attention": 3.0, "attention of torch, 128 tokens": 5.0, "decoded": 7.0,
    "decoded in tiles, ggml_decode 12": 37.0, "decoded in tiles, scaled_decode 4 0 2 5 0 1 64 2": 41.0,
    "byte of a large op": 11.0,
    "byte of elementwise work": 13.0, "updated in 8 bits": 17.0, "op of a step, fused path": 19.0,
    "op of a step, general path": 23.0, "op watched in a step": 29.0,
    "byte that waits on disk": 31.0,
}  # fmt: skip


def test_every_kind_of_work_is_added_up() -> None:
    both = WORK.plus(WORK, 3.0)
    for each in fields(Work):
        one, four = getattr(WORK, each.name), getattr(both, each.name)
        if isinstance(one, Counter):
            assert {key: n * 4 for key, n in one.items()} == four
        else:
            assert four == 4 * one, each.name


def test_every_kind_of_work_has_its_rate_and_an_op_that_of_its_path(tmp_path: Path) -> None:
    rates = Rates(tmp_path / "rates.json", dict(RATES))
    assert rates.parts(WORK) == {
        "products": 2 * 2.0,
        "attention": 11 * 3.0 + 13 * 5.0,
        "decoding": 17 * 7.0 + 43 * 37.0 + 47 * 41.0,
        "calls": 26 * 19.0 + 5 * 23.0 + 37 * 29.0,
        "updates": 23 * 11.0 + 29 * 17.0,
        "waiting on disk": 41 * 31.0,
    }
    assert rates.moved() == 13.0
    assert rates.known == RATES


def test_what_decoding_writes_and_a_table_s_other_rows_are_not_moved() -> None:
    for name, arguments in (
        ("int8_dequantize", (0, 0, 3, 5, DTYPES[torch.bfloat16], 0)),
        ("four_bit_dequantize", (0, 0, 15, 64, 0, DTYPES[torch.bfloat16], 0)),
    ):
        counted = CountWork()
        counted.on = True
        with counted:
            torch.empty(3, 5, dtype=torch.bfloat16)
        counted.kernel(name, arguments)
        assert (counted.passes[0].decoded, counted.passes[0].moved) == (15, 0)
    for codec, name, arguments in (
        (Q4_K, "ggml_decode", (0, 0, 0, 3, 5, 12, 0)),
        (GPTQ, "scaled_decode", (0, 3, 5, 0, 0, 0, 3, 4, 0, 0, 2, 0, 5, 8.0, 0, False, 1, 64, 2)),
    ):
        counted = CountWork()
        counted.on = True
        with counted:
            tile = torch.empty(3, 5)
            counted.kernel(name, arguments)
            tile.to(torch.bfloat16)
            tile.to(torch.float16)
        only = counted.passes[0]
        assert (only.decoded, only.decoded_tiles, only.moved) == (0, {codec: 15}, 15 * (4 + 2))  # of the second cast
        counted = CountWork()
        counted.on = True
        with counted:
            tile = torch.empty(3, 5)
            counted.kernel(name, arguments)
            tile.add_(1.0)
            torch.ones(5, 3).to(torch.bfloat16)
        assert counted.passes[0].moved == 15 * (4 + 4) + 15 * 4 + 15 * (4 + 2)  # of no tile: added, made, cast
    counted, ids, table = CountWork(), torch.tensor([2, 5, 2]), torch.ones(997, 7)
    counted.on = True
    with counted:
        torch.nn.functional.embedding(ids, table)
    assert counted.passes[0].moved == 2 * 3 * 7 * 4


def test_the_optimizer_s_work_is_apart_from_the_rest(recipe: Make) -> None:
    config = llama_config(hidden_size=120, head_dim=40)
    adapter = {"method": "lora", "r": 41, "target_modules": ["q_proj"]}  # each tensor large enough for 8 bits
    plain, coded = (plan_recipe(recipe(adapter, optim=optim), config=config) for optim in ("adamw_torch", "adamw_8bit"))
    assert plain.work.updated_8bit == 0
    assert coded.work.updated_8bit == coded.n_trained
    assert plain.work.updated > 4 * 4 * plain.n_trained
    assert coded.work.updated < plain.work.updated
    assert plain.work.moved == coded.work.moved


def test_a_rate_is_kept_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    rates = Rates(tmp_path / "plan" / "rates.json")
    assert rates._once("decoded", lambda: 7.0) == 7.0
    assert json.loads(rates.path.read_text(encoding="utf-8"))["seconds"] == {"decoded": 7.0}


@pytest.mark.parametrize("kind", ["fused path", "general path"])
def test_no_rate_is_asked_for_of_a_path_that_no_op_takes(kind: str, tmp_path: Path) -> None:
    rates = Rates(tmp_path / "rates.json", {**RATES, f"op of a step, {kind}": float("nan")})
    work = Work(n_ops=7, n_general=7 if kind == "fused path" else 0)
    assert rates.parts(work)["calls"] > 0


def test_updates_within_the_backward_pass_are_updates(recipe: Make) -> None:
    behind, within = (
        plan_recipe(recipe({"method": "full"}, optim=f"galore_adamw{kind}", optim_args="rank=7", max_grad_norm=0.0))
        for kind in ("", "_layerwise")
    )
    checks = 22 * within.n_trained  # are gradients finite: compared with themselves, their size, that with infinity
    assert within.work.updated == pytest.approx(behind.work.updated + checks, rel=0.01)
    assert within.work.moved == pytest.approx(behind.work.moved, rel=0.01)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_micro_batch_has_its_share_of_the_update(recipe: Make, optim: str) -> None:
    plans = [plan_recipe(recipe({"method": "full"}, optim=optim, gradient_accumulation_steps=n)) for n in (1, 4)]
    (one, four), one_trained = (plan.work for plan in plans), plans[0].n_trained
    assert four.products == pytest.approx(one.products)
    assert four.updated == pytest.approx(one.updated / 4)
    assert four.updated_8bit == one.updated_8bit / 4
    added = 3 / 4 * 12 * one_trained  # gradients are added to those before, in three of four: read, read, written
    assert four.moved - one.moved == pytest.approx(added, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, "selective"])
def test_a_traced_step_of_dora_has_the_ops_of_a_real_one(recipe: Make, checkpointing: bool | str) -> None:
    made = recipe({"method": "dora", "r": 5}, gradient_checkpointing=checkpointing)
    model, args, counted = measured_model(made), made.training_config(), CountWork()
    batch = batch_of(made, model.config)
    traced = trace(model.config, made, batch).work
    prepare(model, args, with_values=True)
    with counted:
        run_steps(model, make_optimizer(model, args), batch, args, LiveBytes(), counted=counted)
    assert traced.products == counted.of_one(1).products
    assert traced.n_general == counted.of_one(1).n_general == 0


def test_attention_of_fused_blocks_is_counted_once_a_pass(recipe: Make) -> None:
    """A causal row of t tokens has t * t / 2 pairs, in each head two products forward and five backward."""
    work = plan_recipe(recipe({"method": "lora", "r": 5}, per_device_train_batch_size=3, max_length=23)).work
    pairs, blocks, heads, head_dim = 3 * 23 * 23 / 2, 2, 3, 16
    assert work.attention == (2 + 5) * 2 * pairs * blocks * heads * head_dim
    assert not work.torch_attention


def test_a_packed_row_attends_within_its_pieces() -> None:
    counted, bounds = CountWork(), (0, 7, 18)
    counted.on = True
    for name, n_products in (("attention_forward", 2), ("attention_backward", 5)):
        before = counted.passes[0].attention
        counted.kernel(name, (bounds, 3, 1, 8))
        assert counted.passes[0].attention - before == n_products * 2 * 3 * 8 * (7**2 + 11**2) / 2


def test_invocation_tokens_begin_the_rows_that_are_traced(recipe: Make) -> None:
    """The adapter then acts on all tokens, and keeps at least what LoRA keeps."""
    found = []
    for tokens in (None, [250, 7]):
        made = recipe({"method": "lora", "r": 5, "alora_invocation_tokens": tokens}, fused="off")
        traced = trace(llama_config(), made, batch_of(made, llama_config()))
        found.append(traced.peaks["forward.block.1"].kinds["activations"])
    assert found[1] > found[0]


def test_what_waits_on_disk_is_counted_once_however_often_it_is_kept(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(fused="off", activation_offloading="disk")
    model, args, written = measured_model(made), made.training_config(), []
    batch = batch_of(made, model.config)
    monkeypatch.setattr(ActivationOffload.__init__, "__defaults__", (None, 1000))
    work = trace(model.config, made, batch).work
    write = PageFile._write_bytes
    monkeypatch.setattr(PageFile, "_write_bytes", lambda f, x: (written.append(x.nbytes), write(f, x))[1])
    prepare(model, args, with_values=True)
    run_steps(model, make_optimizer(model, args), batch, args, LiveBytes())
    assert 2 * work.on_disk == sum(written) > 0
    assert plan_recipe(recipe(fused="off")).work.on_disk == 0


def test_blocks_that_are_not_computed_again_are_not_watched(recipe: Make, deep: Path) -> None:
    base, selective = {"source": str(deep)}, {"fused": "off", "gradient_checkpointing": "selective"}
    every, second = (
        plan_recipe(recipe(None, base, **selective, gradient_checkpointing_kwargs=kwargs), whole=True).work
        for kwargs in ({}, {"every_n_layers": 2})
    )
    assert second.n_watched == pytest.approx(every.n_watched * 3 / 5, rel=0.01)


def test_a_fused_block_is_watched_only_where_it_runs_its_own_code(recipe: Make) -> None:
    fused, whole = (
        plan_recipe(recipe(adapter, gradient_checkpointing="selective")).work
        for adapter in ({"method": "lora", "r": 5}, {"method": "full"})
    )
    assert fused.n_watched == 0
    assert whole.n_watched > 100


@pytest.mark.parametrize(
    ("adapter", "training", "least", "most"),
    [
        ({"method": "lora", "r": 5}, {}, 0.0, 0.0),
        ({"method": "lora", "r": 5}, {"fused": "off"}, 1.0, 1.0),
        ({"method": "full"}, {}, 0.8, 0.99),  # weights that are trained: halves as the model wrote them, a fused head
        ({"method": "prefix_tuning", "num_virtual_tokens": 7}, {}, 0.8, 0.99),  # a cache in front of every block
    ],
)
def test_ops_are_of_the_path_that_they_take(
    adapter: dict[str, Any], training: dict[str, Any], least: float, most: float, recipe: Make, deep: Path
) -> None:
    work = plan_recipe(recipe(adapter, {"source": str(deep)}, **training)).work
    assert least <= work.n_general / work.n_ops <= most


def test_chunks_of_logits_that_are_alike_are_traced_once_and_count_each(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.ops.cross_entropy.CHUNK_BYTES", 3 * 96 * 4)  # and fewer in the last one
    slices = list[int]()

    def counted(n: int, size: int) -> Any:
        slices.append(0)
        for rows in row_slices(n, size):
            slices[-1] += 1
            yield rows

    def planned() -> Any:
        return plan_recipe(recipe(per_device_train_batch_size=4, max_length=62))

    monkeypatch.setattr("veneer.ops.cross_entropy.row_slices", counted)
    few = planned()
    assert set(slices) == {3}
    monkeypatch.setattr("veneer.ops.traced.is_tracing", lambda: False)
    slices.clear()
    each = planned()
    assert max(slices) > 20
    assert few.work == each.work
    assert few.phases == each.phases
