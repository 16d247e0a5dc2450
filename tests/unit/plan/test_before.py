"""A run is planned before it begins, told in a line, and refused where memory will not do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.unit.plan.conftest import Make
from transformers import LlamaForCausalLM

from veneer.adapters.peft_model import PeftModel, get_peft_model
from veneer.contract import MethodConfig
from veneer.errors import ConfigError, UnmeasuredError
from veneer.model.memory.available import high_water
from veneer.ops import matmul
from veneer.plan import before, machine, report, start
from veneer.plan.architecture import config_of
from veneer.recipe.recipe import parse_recipe

PLANNED: dict[str, Any] = {
    "task": "sft",
    "quantization": "none",
    "batch": {"rows": 1, "length": 1024},
    "weights": {"bytes": 2_000_000_000},
}


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is measured: every rate is known, and what a process starts with."""
    monkeypatch.setattr(machine.Rates, "_once", lambda rates, key, measure: 1e-9)
    monkeypatch.setattr(machine.Rates, "is_new", False)
    monkeypatch.setattr(matmul, "float32_is_faster", lambda: False)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    start._file().parent.mkdir(parents=True)
    start._file().write_text('{"bytes": 300000000}')


def forbidden(*_: object, **__: object) -> float:
    raise AssertionError("nothing is measured or read here")


def unmeasured(rates: machine.Rates, key: str, measure: Any) -> float:
    raise UnmeasuredError(key)


def test_a_plan_is_told_in_one_line_with_its_facts(recipe: Make) -> None:
    facts, line = before.planned_facts(recipe(), print)
    assert facts is not None
    assert line.startswith("planned: ")
    assert "\n" not in line
    assert facts["process"]["bytes"] > facts["peak"]["bytes"] + 3e8
    assert facts["time"]["seconds_a_step"] > 0


def test_a_metric_of_its_own_is_told_not_to_be_planned(recipe: Make) -> None:
    values = recipe(per_device_eval_batch_size=2).model_dump(exclude_unset=True) | {"metric": {"name": "exact-match"}}
    _, line = before.planned_facts(parse_recipe(values), print)
    assert "; answers for its metric are not planned)" in line


def test_a_run_measures_nothing_and_is_planned_by_memory_alone(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    monkeypatch.setattr(matmul, "float32_is_faster", lambda: False)
    monkeypatch.setattr(machine.Rates, "is_new", True)
    monkeypatch.setattr(report, "known_start", lambda: None)
    monkeypatch.setattr(start, "_beginning", forbidden)
    for kind in ("_product_seconds", "_large_op_seconds", "op_seconds", "byte_seconds"):
        monkeypatch.setattr(machine, kind, forbidden)
    monkeypatch.setattr(report, "own_rows", forbidden)
    told: list[str] = []
    facts, line = before.planned_facts(recipe(), told.append)
    assert facts is not None, line
    assert told == []
    assert "time" not in facts
    assert "this machine's speed was not measured" in facts["no_time"]
    assert " a micro-batch" not in line
    held = high_water()
    assert held is not None
    assert 0 < facts["process"]["bytes"] - facts["peak"]["bytes"] - held < 1e8


def test_without_time_no_row_is_read(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "own_rows", forbidden)
    facts, line = before.planned_facts(recipe(), print, timed=False)
    assert facts is not None, line
    assert not {"time", "no_time"} & facts.keys()


def test_seconds_beyond_a_minute_are_told_in_minutes_and_hours() -> None:
    told = [{"seconds_a_step": 3.0}, {"seconds_a_step": 75.0}, {"seconds_a_step": 9.0, "between": (22.3, 7002.0)}]
    assert [report._seconds(each) for each in told] == ["3 s", "1 min 15 s", "22 s to 1 h 56 min"]


def test_a_run_tells_the_seconds_of_the_next_one(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Rates, "_once", unmeasured)
    facts, _ = before.planned_facts(recipe(), print)
    assert facts is not None
    assert "time" not in facts
    ran = {"device": "cpu", "micro_batch": {"seconds": [2.0, 3.0, 7.0], "tokens": 0.0}}
    before.remember_run(facts, {"results": ran})
    again, line = before.planned_facts(recipe(), print)
    assert again is not None
    assert again["time"]["seconds_a_step"] == 3.0
    assert "about 2 to 7 s a micro-batch" in line
    other, line = before.planned_facts(recipe({"method": "lora", "r": 7}), print)
    assert other is not None
    assert other["time"]["source"] == "by earlier runs of other settings"
    low, high = other["time"]["between"]
    assert low < 3.0 < high
    before.remember_run(facts, {"results": {**ran, "device": "cuda"}})
    before.remember_run(facts, {"results": {}})
    last, _ = before.planned_facts(recipe(), print)
    assert last is not None
    assert last["time"] == again["time"]


@pytest.mark.parametrize(
    ("model", "is_told"),
    [({}, True), ({"dtype": "float32"}, False), ({"dtype": "bfloat16"}, False), ({"quantization": "nf4"}, False)],
)
def test_a_cpu_without_16_bit_products_is_told_of_float32(
    model: dict[str, str], is_told: bool, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    before.planned_facts(recipe(model=model), told.append)
    note = "note: this CPU is faster with --set model.dtype=float32, which takes twice the memory"
    assert note not in told
    monkeypatch.setattr(matmul, "float32_is_faster", lambda: True)
    before.planned_facts(recipe(model=model), told.append)
    assert (note in told) == is_told


def test_a_base_that_its_files_hold_quantized_stays_so_in_any_dtype(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "float32_is_faster", lambda: True)
    part, here = recipe().model, report.Machine(None, timed=False)
    config = config_of(part.source)
    assert here.note(part, config)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    assert here.note(part, config) is None


def test_too_little_memory_is_refused_with_the_way_out(recipe: Make) -> None:
    facts, _ = before.planned_facts(recipe(), print)
    assert facts is not None
    before.require_room(facts)
    small = {**facts, "process": {**facts["process"], "free": facts["process"]["bytes"] - 1}}
    with pytest.raises(ConfigError, match=r"planned to take .* --fit .* --beyond-memory"):
        before.require_room(small)


@pytest.mark.parametrize(
    ("other", "advice"),
    [
        ({}, r"lower training\.max_length \(planned is 1 row of 1,024 tokens\)"),
        ({"batch": {"rows": 2, "length": 9}, "task": "dpo"}, r"lower training\.max_length \(planned is 2 rows of 9 "),
        (
            {"batch": {"rows": 400, "length": 1024}},
            r"lower training\.per_device_train_batch_size \(planned are 400 rows of 1,024 tokens\)",
        ),
        ({"weights": {"bytes": 12_000_000_000}}, r"set model\.quantization to nf4"),
        ({"weights": {"bytes": 12_000_000_000}, "quantization": "nf4"}, r"take a smaller base"),
    ],
)
def test_the_refusal_names_the_key_to_change(other: dict[str, Any], advice: str) -> None:
    facts = {**PLANNED, "process": {"bytes": 15_000_000_000, "free": 11_000_000_000}, **other}
    with pytest.raises(ConfigError, match=rf"may be taken here: {advice}"):
        before.require_room(facts)


def test_a_batch_is_planned_with_no_more_rows_than_there_are(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n' * 5)
    facts, _ = before.planned_facts(recipe(per_device_train_batch_size=200_000), print)
    assert facts is not None
    assert facts["batch"]["rows"] == 5
    facts, _ = before.planned_facts(recipe(per_device_train_batch_size=7), print, 2, [1])
    assert facts is not None
    assert facts["batch"]["rows"] == 7  # the batches of several processes are filled up


def test_what_cannot_be_planned_is_told_and_trains_all_the_same(recipe: Make, tmp_path: Path) -> None:
    facts, line = before.planned_facts(recipe(model={"source": str(tmp_path / "nowhere")}), print)
    assert facts is None
    assert line.startswith("not planned: ")


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "r": 5, "target_modules": ["q_proj", "down_proj"]},
        {"method": "prefix_tuning", "num_virtual_tokens": 3},
    ],
)
def test_a_saved_adapter_that_is_trained_on_is_planned_as_a_new_one(
    adapter: dict[str, Any], recipe: Make, tmp_path: Path
) -> None:
    fresh = recipe(adapter)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(fresh.model.source), cast(MethodConfig, fresh.adapter_config())
    )
    model.save_pretrained(tmp_path / "saved")
    expected, _ = before.planned_facts(fresh, print)
    facts, line = before.planned_facts(recipe({"from": str(tmp_path / "saved")}), print)
    assert facts is not None, line
    assert expected is not None
    for fact in ("peak", "trained", "flops"):
        assert facts[fact] == expected[fact]


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning"])
def test_tokens_that_a_network_made_are_planned_without_it(method: str, recipe: Make, tmp_path: Path) -> None:
    more = {"prefix_projection": True} if method == "prefix_tuning" else {}
    made = recipe({"method": method, "num_virtual_tokens": 3, "encoder_hidden_size": 7, **more})
    base = LlamaForCausalLM.from_pretrained(made.model.source)
    get_peft_model(base, cast(MethodConfig, made.adapter_config())).save_pretrained(tmp_path / "saved")
    base = LlamaForCausalLM.from_pretrained(made.model.source)
    trained = PeftModel.from_pretrained(base, tmp_path / "saved", is_trainable=True)
    facts, line = before.planned_facts(recipe({"from": str(tmp_path / "saved")}), print)
    assert facts is not None, line
    assert facts["trained"]["parameters"] == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_a_run_on_a_gpu_is_held_to_its_memory_and_measures_nothing(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> float:
        raise AssertionError("a rate of the CPU, or its processes, were asked for")

    start._file().unlink()
    monkeypatch.setattr(start, "_beginning", measured)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        on_gpu = report.Machine.of_run(SimpleNamespace(use_cpu=False), timed=True)  # type: ignore[arg-type]
        assert report.Machine.of_run(SimpleNamespace(use_cpu=True), timed=True).gpu is None  # type: ignore[arg-type]
    monkeypatch.setattr(report.Machine, "of_run", lambda _, timed: on_gpu)
    monkeypatch.setattr(machine.Rates, "_once", measured)
    monkeypatch.setattr(report, "available_bytes", lambda device: 7_000_003 if device.type == "cuda" else 1)
    facts, _ = before.planned_facts(recipe(), print)
    assert facts is not None
    assert facts["process"]["free"] == 7_000_003
    assert facts["process"]["bytes"] == int(report.FRAGMENTS * facts["peak"]["bytes"])
    assert "time" not in facts


def test_an_unexpected_error_is_told_with_its_kind_and_stops_no_run(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise TypeError("no such thing\nmore")

    monkeypatch.setattr(before, "plan_recipe", wrong)
    assert before.planned_facts(recipe(), print) == (None, "not planned: TypeError: no such thing")


def test_processes_that_share_the_memory_are_counted() -> None:
    facts: dict[str, Any] = {**PLANNED, "process": {"bytes": 5_000_000_000, "free": 14_000_000_000}}
    before.require_room(facts, 2)
    with pytest.raises(ConfigError, match=r"to take 15\.00 GB in 3 processes, and 14\.00 GB .* --fit 5GB"):
        before.require_room(facts, 3)


def test_the_smallest_shard_that_has_room_is_taken() -> None:
    shards = {"1": 9_000_000_000, "2": 5_000_000_000, "6": 3_000_000_000}
    process = {"bytes": 8_000_000_000, "free": 20_000_000_000, "shards": shards}
    facts: dict[str, Any] = {**PLANNED, "process": process}
    found = [before.with_shard(facts, sharing) for sharing in (1, 2, 3, 6, 9)]
    assert [each["shard"] for each in found] == [1, 1, 2, 6, 6]
    assert [each["process"]["bytes"] for each in found] == [shards[str(each["shard"])] for each in found]
    before.require_room(found[3], 6)
    with pytest.raises(ConfigError, match=r"27\.00 GB in 9 processes"):
        before.require_room(found[4], 9)
    alone = {"process": {"bytes": 7, "free": 11}}
    assert before.with_shard(alone, 1) == alone


def test_a_cut_base_is_planned_with_its_share(recipe: Make) -> None:
    facts, _ = before.planned_facts(recipe(), print, 4, [1, 4])
    assert facts is not None
    whole, cut = facts["process"]["shards"].values()
    assert whole > facts["process"]["bytes"]  # the gradients are there twice
    assert cut != whole


def test_a_range_of_seconds_is_told_if_it_is_of_use_with_that_of_the_run(recipe: Make) -> None:
    values = recipe().model_dump(exclude_unset=True)
    facts, line = before.planned_facts(recipe(max_steps=30, gradient_accumulation_steps=2), print)
    assert facts is not None
    assert facts["time"]["micro_batches"] == 60
    assert line.endswith(" for all 60, without evaluations")
    plan = report.plan_recipe(parse_recipe(values))
    for between, wanted in (
        ([2.0, 5.0], "2 to 5 s a micro-batch where its rows are full (x); 1 min 0 s to 2 min 30 s for all 30, "),
        ([2.0, 500.0], "; its time is known after the first steps"),
    ):
        time = {"seconds_a_step": 3.0, "between": between, "source": "x", "micro_batches": 30}
        assert wanted in report.told(plan, facts | {"time": time})
    assert report.told(plan, {"process": {"bytes": 3}}).endswith(")")


def test_the_micro_batches_of_a_file_are_counted(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own = report.OwnRows(report.Batch(n_rows=3, length=23), 7, 69.0, 20)
    monkeypatch.setattr(report, "own_rows", lambda *_: own)
    facts, _ = before.planned_facts(recipe(num_train_epochs=2), print)
    assert facts is not None
    assert facts["time"]["micro_batches"] == 14  # of 3 rows each
