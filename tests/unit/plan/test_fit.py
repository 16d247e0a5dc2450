"""Settings that fit a budget: within it with room to spare, the cheapest first, and what is missing where none fits."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.plan.conftest import HELD_OUT, Make

from veneer.errors import ConfigError
from veneer.plan import fit
from veneer.plan.architecture import config_of
from veneer.plan.fit import SPARE, fits
from veneer.plan.plan import Plan, plan_recipe
from veneer.recipe.recipe import Recipe, changed


@pytest.fixture(scope="module")
def made() -> dict[str, Plan]:
    return {}


@pytest.fixture(autouse=True)
def plans_are_made_once(made: dict[str, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches in this file share their plans: each takes a second."""

    def once(recipe: Recipe, **options: Any) -> Plan:
        key = recipe.model_dump_json(exclude={"output"}, exclude_unset=True)
        if key not in made:
            made[key] = plan_recipe(recipe, **options)
        return made[key]

    monkeypatch.setattr(fit, "plan_recipe", once)


def bytes_of(plan: Plan) -> int:
    return plan.peak.n_bytes


def test_settings_fit_with_room_to_spare_and_the_cheapest_comes_first(recipe: Make) -> None:
    wanted = recipe(per_device_train_batch_size=6)
    config = config_of(wanted.model.source)
    exact = fit.plan_recipe(wanted).peak.n_bytes
    budget = int(0.8 * exact)
    found = fits(wanted, config, budget, bytes_of, lambda plan: plan.work.flops)
    costs = [each.seconds_a_token for each in found]
    assert costs == sorted(costs)
    for each in found:
        args = changed(wanted, each.changes).training_config()
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 6
        its_own = fit.plan_recipe(changed(wanted, each.changes), config=config)
        assert each.n_bytes == its_own.peak.n_bytes <= budget / (1 + SPARE)
    assert found[0].n_bytes == plan_recipe(changed(wanted, found[0].changes)).peak.n_bytes
    tight = fits(wanted, config, exact + 1, bytes_of, lambda plan: plan.work.flops)
    assert all(each.changes for each in tight)  # the recipe as it is fits, but with nothing to spare


def test_an_evaluation_fits_too(recipe: Make) -> None:
    """Its rows are no more than those of a micro-batch. Storage is given: the test above varies it."""
    wanted = recipe(None, {"quantization": "nf4"}, per_device_train_batch_size=6, fused="off", **{HELD_OUT: 90})
    exact = fit.plan_recipe(wanted)
    assert exact.peak_phase == "evaluation"
    found = fits(wanted, config_of(wanted.model.source), exact.peak.n_bytes - 1, bytes_of, lambda plan: plan.work.flops)
    args = changed(wanted, found[0].changes).training_config()
    assert args.per_device_eval_batch_size == args.per_device_train_batch_size <= 6
    little = recipe(per_device_train_batch_size=6, **{HELD_OUT: 2})
    few = fit._rows(3, little.training_config(), little.distributed, little.data)
    assert not any(key.endswith(HELD_OUT) for key in few)


def test_an_optimizer_that_steps_in_the_backward_pass_takes_all_rows_at_once(recipe: Make) -> None:
    layerwise = {"optim": "galore_adamw_layerwise", "optim_args": "rank=7", "max_grad_norm": 0.0}
    wanted = recipe({"method": "full"}, per_device_train_batch_size=6, **layerwise)
    config, exact = config_of(wanted.model.source), fit.plan_recipe(wanted).peak.n_bytes
    found = fits(wanted, config, int(1.06 * exact), bytes_of, lambda plan: plan.work.flops)
    for each in found:
        args = changed(wanted, each.changes).training_config()
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (6, 1)
    with pytest.raises(ConfigError, match="6 rows of 23 tokens"):
        fits(wanted, config, 1009, bytes_of, lambda plan: plan.work.flops)


def test_what_is_missing_is_told_where_nothing_fits(recipe: Make) -> None:
    wanted = recipe()
    told = r"no settings fit .*quantization=nf4.*one row of 23 tokens.*more than the budget by.*smaller base$"
    with pytest.raises(ConfigError, match=told) as raised:
        fits(wanted, config_of(wanted.model.source), 1009, bytes_of, lambda plan: plan.work.flops)
    assert "fsdp" not in str(raised.value)  # which is refused in training
    assert "max_length" not in str(raised.value)  # no length helps where the weights are too large


def test_no_base_is_small_enough_where_the_process_alone_is_too_large(recipe: Make) -> None:
    wanted = recipe()
    told = r"Beside its tensors the process takes 2\.0 MB, and so no base is small enough$"
    with pytest.raises(ConfigError, match=told) as raised:
        fits(wanted, config_of(wanted.model.source), 1_900_000, lambda plan: bytes_of(plan) + 2_000_000, lambda plan: 1)
    assert "smaller base" not in str(raised.value)


def test_the_knob_that_is_missing_is_the_one_that_was_not_tried(recipe: Make) -> None:
    for wanted, told in (
        (recipe({"method": "full"}), r"Missing: an adapter in place of the whole model"),
        (recipe(None, {"quantization": "int8"}), r"Missing: model.quantization=nf4"),
    ):
        with pytest.raises(ConfigError, match=told):
            fits(wanted, config_of(wanted.model.source), 1009, bytes_of, lambda plan: plan.work.flops)


def test_rows_may_be_shorter_where_the_weights_alone_would_fit(recipe: Make) -> None:
    wanted = recipe(None, {"quantization": "nf4"})
    budget = int(1.07 * fit.plan_recipe(wanted).held.n_bytes)
    with pytest.raises(
        ConfigError, match=r"of it weights\. From .* on it fits\. Missing: a shorter training.max_length"
    ):
        fits(wanted, config_of(wanted.model.source), budget, bytes_of, lambda plan: plan.work.flops)
