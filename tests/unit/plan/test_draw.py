"""Plans of tasks that draw answers: the engine's copy of the base, its pages, shared prompts, the parts of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.models import byte_tokenizer
from tests.unit.plan.conftest import Make
from tests.unit.serve.test_own_cache import made

from bench.training.measured import measured_model
from veneer.adapters.shared_rows import shared_rows
from veneer.data.tasks import OF_REWARDS
from veneer.errors import ConfigError
from veneer.plan.architecture import config_of
from veneer.plan.draw import ENGINE, PAGES
from veneer.plan.fit import fits
from veneer.plan.live_bytes import LiveBytes, peaks
from veneer.plan.losses import loss_of
from veneer.plan.memory_trace import FIRST, STATE, kind_under, kinds_of, make_optimizer, prepare, run_steps
from veneer.plan.plan import Plan, as_json, batch_of, plan_recipe
from veneer.plan.report import Machine, shown
from veneer.plan.rows import prompt_lengths
from veneer.plan.step import Batch
from veneer.recipe.recipe import Recipe, parse_recipe

PROMPTS = ["a", "bbb", "ccccc"]


@pytest.fixture
def drawing(recipe: Make, tiny: Path, tmp_path: Path) -> Any:
    byte_tokenizer().save_pretrained(tiny)
    pairs = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def make(task: str = "grpo", parts: dict[str, Any] | None = None, **training: Any) -> Recipe:
        values = recipe({"method": "lora", "r": 5, "target_modules": "all-linear"}).model_dump(exclude_unset=True)
        values |= {"task": task, "data": {"train": str(tmp_path / "rows.jsonl")}}
        if task in OF_REWARDS:
            values["training"] = {"num_generations": 3, "max_completion_length": 17}
            values |= {"rewards": [{"function": "exact-match", "column": "chosen"}]}
        return parse_recipe(
            {
                **values,
                **(parts or {}),
                "training": {**values["training"], "per_device_train_batch_size": 6, **training},
            }
        )

    return make


def test_prompts_of_a_batch_are_shared_as_a_step_finds_them() -> None:
    batch = Batch(n_rows=6, length=23, n_trained=12, n_prompts=2, n_shared=11)
    inputs = batch.inputs(9973)
    found = shared_rows(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    assert found is not None
    assert found.input_ids.numel() == batch.n_tokens - batch.n_rows  # the last label predicts nothing
    assert batch.with_rows(9).n_prompts == 3


def test_answers_of_the_longest_prompt_are_planned(drawing: Any) -> None:
    wanted = drawing()
    assert sorted(prompt_lengths(wanted.task, wanted.model.source, wanted.data)) == [1, 3, 5]
    plan = plan_recipe(wanted)
    assert (plan.batch.length, plan.batch.n_shared, plan.batch.n_prompts, plan.batch.n_trained) == (5 + 17, 5, 2, 17)
    assert plan.draw is not None
    assert plan.apart["train"].flops > 2 * plan.apart["draw"].flops > 0
    assert plan.work.flops == pytest.approx(sum(part.flops for part in plan.apart.values()))
    assert (plan.draw.n_answers, plan.draw.n_prompts, plan.draw.n_batches) == (6, 2, 1)
    summed = plan_recipe(drawing(gradient_accumulation_steps=2, num_iterations=3)).draw
    assert summed is not None
    assert (summed.n_answers, summed.n_prompts, summed.n_batches) == (12, 4, 6)


@pytest.mark.parametrize("task", ["grpo", "distill"])
def test_live_bytes_of_the_training_pass_are_those_of_the_step(task: str, drawing: Any) -> None:
    wanted = drawing(parts={"rollouts": {"memory": "beside"}}) if task == "grpo" else drawing(task, _distill(drawing))
    model, args, live = measured_model(wanted), wanted.training_config(), LiveBytes()
    prepare(model, args, with_values=True)
    batch = batch_of(wanted, model.config)
    with live:
        for tensor, kind in kinds_of(model):
            live.hold(tensor, kind)
        loss = loss_of(wanted.task, None, args, batch.n_taught)
        run_steps(model, make_optimizer(model, args), batch, args, live, loss=loss)
    real = max(p.n_bytes for mark, p in peaks(live.events, live.kinds, kind_under).items() if FIRST not in mark)
    plan = plan_recipe(wanted, whole=True)
    engine = sum(plan.peak.kinds.get(kind, 0) for kind in (ENGINE, PAGES))
    assert plan.peak.n_bytes - engine == pytest.approx(real, rel=0.01)


def _distill(drawing: Any) -> dict[str, Any]:
    folder = Path(drawing().output).parent
    (folder / "shots.txt").write_text("read this first.\n")
    rows = [{"prompt": text, "completion": "yes it is"} for text in PROMPTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"distill": {"teacher_prompt": str(folder / "shots.txt")}}


def test_a_teacher_costs_a_longer_pass_and_a_student_that_draws_an_engine(drawing: Any) -> None:
    part = _distill(drawing)
    read = plan_recipe(drawing("distill", part, lmbda=0.0))
    drawn = plan_recipe(drawing("distill", part, lmbda=0.5, max_completion_length=11))
    assert read.batch.n_taught == len("read this first.\n")
    assert read.draw is None
    assert drawn.draw is not None
    assert drawn.draw.n_batches == 2  # of two steps, one draws
    assert drawn.copies == 2
    assert drawn.work.flops > read.work.flops
    with pytest.raises(ConfigError, match="distillation from another teacher than the base is not planned"):
        plan_recipe(drawing("distill", {"distill": {"teacher": "other"}}))


def test_one_copy_of_the_base_saves_the_weights_that_are_packed(drawing: Any) -> None:
    one, beside = (plan_recipe(drawing(parts={"rollouts": {"memory": how}})) for how in ("one", "beside"))
    assert (one.copies, beside.copies) == (1, 2)
    assert one.n_parameters == beside.n_parameters
    assert beside.held.kinds[ENGINE] - one.held.kinds.get(ENGINE, 0) == one.held.kinds["base"]  # panels
    own = beside.held.kinds["base"] + beside.held.kinds["head"]  # a head that is no table is packed too
    assert beside.held.n_bytes - one.held.n_bytes == own
    assert beside.peak.n_bytes - one.peak.n_bytes == pytest.approx(own, rel=0.2)
    assert beside.peak.kinds[PAGES] == one.peak.kinds[PAGES] > 0
    assert one.peak.kinds[STATE] == beside.peak.kinds[STATE]


def test_transformers_draws_without_an_engine(drawing: Any) -> None:
    plan = plan_recipe(drawing(parts={"rollouts": {"engine": "generate"}}))
    assert plan.copies == 1
    assert ENGINE not in plan.peak.kinds
    assert PAGES in plan.phases["draw"].kinds
    assert PAGES not in plan.phases["forward"].kinds  # its cache ends with the draw


@pytest.mark.parametrize(("engine", "n_positions"), [("generate", 5 + 17), ("engine", 256)])
def test_a_state_of_a_scan_is_planned_for_each_answer(
    engine: str, n_positions: int, drawing: Any, tmp_path: Path
) -> None:
    made("qwen3_5_text", torch.bfloat16).save_pretrained(tmp_path / "hybrid")
    byte_tokenizer().save_pretrained(tmp_path / "hybrid")
    plan = plan_recipe(drawing(parts={"model": {"source": str(tmp_path / "hybrid")}, "rollouts": {"engine": engine}}))
    state = 4 * (2 * 8 * 4 + 3 * (2 * 8 + 8))  # matrices of two heads, and three inputs of the convolution
    answer = n_positions * 2 * 2 * 16 + state  # keys and values of a head of 8, filled up
    copies = {"generate": 3 / 2, "engine": 2}[engine]  # one layer of two grows at a time; or two draws
    assert plan.draw is not None
    assert plan.phases["draw"].kinds[PAGES] == copies * plan.draw.n_answers * answer


def test_answers_are_scored_as_often_as_the_run_does(drawing: Any) -> None:
    exact = {"model": drawing().model.model_dump(exclude_unset=True) | {"dtype": "float32"}}
    n = {}
    for name, parts, training in (
        ("16 bits", {}, {}), ("exact", exact, {}), ("reference", exact, {"beta": 0.1}),
        ("generate", {"rollouts": {"engine": "generate"}}, {}),
    ):  # fmt: skip
        plan = plan_recipe(drawing(parts=parts, **training))
        assert plan.draw is not None
        n[name] = plan.draw.n_scores
        assert (plan.apart["score"].flops > 0) == (plan.draw.n_scores > 0)
    assert n == {"16 bits": 1, "exact": 0, "reference": 1, "generate": 0}
    best = plan_recipe(drawing("best_of")).draw
    assert best is not None
    assert best.n_scores == 0  # its loss has no old policy


def test_a_shared_prompt_is_computed_once_for_a_pair(drawing: Any, tmp_path: Path) -> None:
    wanted = drawing("dpo", max_length=23)
    shared = plan_recipe(wanted)
    assert shared.batch.n_shared == 1  # the shortest: a plan is an upper bound
    rows = [{"prompt": "p" * 19, "chosen": "yes", "rejected": "no"}]
    (tmp_path / "other.jsonl").write_text(json.dumps(rows[0]) + "\n")
    long = plan_recipe(drawing("dpo", {"data": {"train": str(tmp_path / "other.jsonl")}}, max_length=23))
    assert long.batch.n_tokens == 12 * 23 - 6 * 19 < shared.batch.n_tokens
    assert long.peak.n_bytes < shared.peak.n_bytes
    assert long.work.flops < 0.7 * shared.work.flops


def told(plan: Plan) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown(plan, as_json(plan) | Machine.of("h100", timed=True).facts(plan, None)))
    return console.export_text()


def test_the_parts_of_a_draw_are_a_table(drawing: Any) -> None:
    text = told(plan_recipe(drawing(beta=0.1)))
    assert "a draw by the engine: 6 answers of 17 tokens to 2 prompts of 5; " in text
    for part in ("draw", "rewards", "score", "train"):
        line = next(line for line in text.partition("a draw by")[2].splitlines() if line.split()[:1] == [part])
        assert part == "rewards" or float(line.split()[-1]) > 0


def test_a_budget_without_room_names_the_length_of_answers(drawing: Any) -> None:
    wanted = drawing()
    budget = int(1.07 * plan_recipe(wanted).held.n_bytes)
    with pytest.raises(ConfigError, match=r"rows? of 22 tokens.*shorter training\.max_completion_length"):
        fits(wanted, config_of(wanted.model.source), budget, lambda plan: plan.peak.n_bytes, lambda plan: 1.0)


def test_several_processes_keep_a_second_copy(drawing: Any) -> None:
    assert plan_recipe(drawing()).copies == 1
    assert plan_recipe(drawing(), n_processes=2).copies == 2
    with pytest.raises(ConfigError, match="rollout_memory='one' is impossible: several processes train"):
        plan_recipe(drawing(parts={"rollouts": {"memory": "one"}}), n_processes=2)


def test_a_gpu_packs_no_copy(drawing: Any) -> None:
    plan = plan_recipe(drawing(parts={"rollouts": {"memory": "beside"}}), isa="avx512_bf16")
    assert plan.copies == 1
    assert ENGINE not in plan.held.kinds
    wanted = drawing(parts={"rollouts": {"memory": "beside"}})
    config = config_of(wanted.model.source)
    found = fits(wanted, config, 10**9, lambda plan: plan.peak.n_bytes, lambda plan: 1.0, isa="avx512_bf16")
    assert {each.plan.copies for each in found} == {1}
    with pytest.raises(ConfigError, match="weights are packed on CPUs only"):
        plan_recipe(drawing(parts={"rollouts": {"memory": "one"}}), isa="avx512_bf16")
