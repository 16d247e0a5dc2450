"""Members of a sweep, trained together, against the run that each would be on its own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from veneer.errors import ConfigError, Interrupted, TrainingError
from veneer.ops.grouped_low_rank import add_grouped_low_rank
from veneer.recipe.recipe import parse_recipe
from veneer.recipe.values import put
from veneer.train.interrupt import Stop
from veneer.train.loss import Scoring
from veneer.train.run import run_recipe
from veneer.train.sweep.course import Course
from veneer.train.sweep.recipe import parse_sweep
from veneer.train.sweep.report import outcomes
from veneer.train.sweep.shared_base import Part, SharedBase, joined
from veneer.train.sweep.sweep import run_sweep
from veneer.train.sweep.together import train_together

VERBS, PLACES = ("sat", "ran", "flew"), ("mat", "tree", "house", "bird", "cat")
LISTED = [
    {"name": "small", "adapter.r": 2, "training.learning_rate": 0.03},
    {"name": "large", "adapter.r": 7, "adapter.lora_alpha": 3, "seed": 5, "adapter.target_modules": ["up_proj"]},
    {"name": "dropped", "adapter.lora_dropout": 0.4, "training.max_grad_norm": 0.01},
    {"name": "dora", "adapter.use_dora": True, "training.lr_scheduler_type": "constant"},
    {"name": "ia3", "adapter": {"method": "ia3"}, "training.learning_rate": 0.1, "training.num_train_epochs": 1},
    {"name": "others", "data.train": "other.jsonl", "training.per_device_train_batch_size": 2},
    {"name": "packed", "training.packing": True, "training.max_length": 29, "training.gradient_accumulation_steps": 2},
]  # fmt: skip


@pytest.fixture
def values(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """A recipe of a tiny model, with rows of different lengths."""
    make_model("llama", "sdpa").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name, step in (("rows", 3), ("other", 2)):
        rows = [
            {"text": " ".join(["the cat"] * (1 + (i * step) % 5) + [VERBS[i % 3], "on the", PLACES[i * step % 5]])}
            for i in range(22)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": {"source": str(tmp_path / "base")},
        "adapter": {"method": "lora", "r": 3, "lora_alpha": 5},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.3, "train_on": "everything"},
        "training": {
            "num_train_epochs": 2, "per_device_train_batch_size": 3, "learning_rate": 0.05, "logging_steps": 1,
            "eval_steps": 3, "save_strategy": "no", "bf16": False, "report_to": "none", "disable_tqdm": True,
            "adam_epsilon": 1e-4,  # or a gradient that is nothing but rounding moves a weight by the learning rate
        },
        "output": str(tmp_path / "together"),
    }  # fmt: skip


def together(values: Mapping[str, Any], part: Any, **options: Any) -> dict[str, dict[str, Any]]:
    sweep = parse_sweep({**values, "sweep": part}, Path(values["model"]["source"]).parent / "sweep.yaml")
    return dict(zip((m.name for m in sweep.members), run_sweep(sweep, **options), strict=True))


def alone(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    own = json.loads(json.dumps(values))
    for key, value in changes.items():
        if key == "data.train":
            value = str(Path(values["model"]["source"]).parent / value)
        if key != "name":
            put(own, key, value)
    own["output"] = str(Path(values["output"]).with_name("alone") / changes["name"])
    return run_recipe(parse_recipe(own))


def curve(record: Mapping[str, Any], *keys: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in record["log"] for key in keys if key in line]


def assert_same_run(own: Mapping[str, Any], shared: Mapping[str, Any], tolerance: float) -> None:
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens"):
        expected, found = curve(own, key), curve(shared, key)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=tolerance), key
    mine, theirs = (load_file(Path(r["saved"]) / "adapter_model.safetensors") for r in (own, shared))
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, rtol=tolerance, atol=tolerance)


def test_every_member_is_the_run_that_it_would_be_on_its_own(values: dict[str, Any]) -> None:
    """Blocks run fused, and as the model wrote them."""
    together_by_path = []
    for fused in ("off", "auto"):
        values["training"]["fused"] = fused
        values["output"] = str(Path(values["output"]).with_name(fused))
        together_by_path.append(together(values, {"members": LISTED}))
    for changes in LISTED:
        own = alone(values, changes)
        for shared in together_by_path:
            assert_same_run(own, shared[changes["name"]], 1e-3)
    for shared in together_by_path:
        assert len({record["results"]["steps"] for record in shared.values()}) > 2  # they leave at different times


def test_plain_members_run_on_fused_blocks(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(x: Any, groups: Any, runs: Any, ys: Any) -> Any:
        calls.append(len(groups))
        return add_grouped_low_rank(x, groups, runs, ys)

    monkeypatch.setattr("veneer.ops.linear.low_rank.add_grouped_low_rank", counted)
    changes = [LISTED[0], LISTED[1], LISTED[5], {**LISTED[6], "training.gradient_accumulation_steps": 1}]
    shared = together(values, {"members": changes})
    assert set(calls) == {1, 2, 3}  # down and o; gate and up; q, k and v
    for each in changes:
        assert_same_run(alone(values, each), shared[each["name"]], 1e-3)


@pytest.mark.parametrize("adapter", [{"method": "ia3"}, {"method": "lora", "r": 3}])
def test_a_sweep_of_one_is_the_run_up_to_rounding(values: dict[str, Any], adapter: dict[str, Any]) -> None:
    values["training"]["fused"] = "off"
    changes = {"name": "only", "adapter": adapter}
    own, shared = alone(values, changes), together(values, {"members": [changes]})["only"]
    assert curve(own, "loss")[0] == curve(shared, "loss")[0]
    for key in ("loss", "eval_loss"):
        assert [v for _, v in curve(shared, key)] == pytest.approx([v for _, v in curve(own, key)], rel=1e-5)


def test_a_member_that_diverges_leaves_and_the_others_do_not_notice(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.recipe.advice.MOST_RATE", 1e31)
    steady = {"name": "steady", "adapter.r": 2}
    wild = {"name": "wild", "training.learning_rate": 1e30, "training.max_grad_norm": 1e30}
    shared = together(values, {"members": [wild, steady]})
    assert shared["wild"]["status"] == "diverged"
    assert "step" in shared["wild"]["reason"]
    assert json.loads((Path(values["output"]) / "wild" / "run.json").read_text())["status"] == "diverged"
    assert_same_run(alone(values, steady), shared["steady"], 2e-4)


def test_a_member_stops_early_by_itself(values: dict[str, Any]) -> None:
    patient = {"name": "patient"}
    hasty = {
        "name": "hasty", "training.early_stopping_patience": 1, "training.learning_rate": 0.0, "training.eval_steps": 1,
    }  # fmt: skip
    shared = together(values, {"members": [hasty, patient]})
    assert shared["hasty"]["results"]["stopped_early"]
    assert shared["hasty"]["results"]["steps"] == 2
    assert not shared["patient"]["results"]["stopped_early"]
    assert_same_run(alone(values, patient), shared["patient"], 2e-4)


def test_a_sweep_that_was_broken_off_goes_on_where_it_was(values: dict[str, Any], monkeypatch: Any) -> None:
    part = {
        "members": [{"name": "short", "training.num_train_epochs": 1}, {"name": "long"}, {"name": "dora"}],
        "grid": {"adapter.lora_dropout": [0.2]},
    }
    part["members"][2]["adapter.use_dora"] = True
    values["training"] |= {"early_stopping_patience": 7, "save_strategy": "steps", "save_steps": 3}
    whole = together(values, part)
    values["output"] = str(Path(values["output"]).with_name("broken"))
    steps = iter(range(8))
    original = SharedBase.losses

    def broken(shared: SharedBase, parts: Any) -> Any:
        next(steps)  # runs out in the middle of the run
        return original(shared, parts)

    with monkeypatch.context() as patch:
        patch.setattr(SharedBase, "losses", broken)
        with pytest.raises(StopIteration):
            together(values, part)
    with pytest.raises(ConfigError, match="--resume"):
        together(values, part)
    lines: list[str] = []
    resumed = together(values, part, resume=True, tell=lines.append)
    assert any("before" in line for line in lines)
    for name, record in whole.items():
        assert_same_run(record, resumed[name], 1e-6)


def test_a_signal_ends_every_member_after_its_step_and_all_go_on(values: dict[str, Any], monkeypatch: Any) -> None:
    part = {"members": [{"name": "one"}, {"name": "two", "training.gradient_accumulation_steps": 2}]}
    whole = together(values, part)
    values["output"] = str(Path(values["output"]).with_name("stopped"))
    steps = iter(range(3, -1, -1))
    original = SharedBase.losses

    def heard(shared: SharedBase, parts: Any) -> Any:
        if next(steps, -1) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(shared, parts)

    with monkeypatch.context() as patch:
        patch.setattr(SharedBase, "losses", heard)
        with pytest.raises(Interrupted):
            together(values, part)
    found = {name: json.loads((Path(values["output"]) / name / "run.json").read_text()) for name in whole}
    assert {name: (record["status"], record["step"]) for name, record in found.items()} == {
        "one": ("interrupted", 4),
        "two": ("interrupted", 2),
    }
    resumed = together(values, part, resume=True)
    for name, record in whole.items():
        assert_same_run(record, resumed[name], 1e-6)


def test_members_go_on_with_their_settings_or_say_what_changed(values: dict[str, Any]) -> None:
    part = {"members": [{"name": "one", "training.max_steps": 2}]}
    values["training"] |= {"save_strategy": "steps", "save_steps": 3}
    first = together(values, part)["one"]
    values["training"]["learning_rate"] = 0.02
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.05 before, 0\.02 now"):
        together(values, part, resume=True)
    assert together(values, part, resume=True, allow_changes=True)["one"] == first  # it was over
    part["members"][0]["training.max_steps"] = 3
    changes = together(values, part, resume=True, allow_changes=True)["one"]["changes"]
    assert [(change["step"], change["key"]) for change in changes] == [
        (2, "training.learning_rate"),
        (2, "training.max_steps"),
    ]


def test_asha_stops_members_at_a_rung_and_those_that_go_on_are_the_runs_that_they_were(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after the rung's checkpoints, before the losses are written down: it goes on to the same end."""
    rates = {"slow": 1e-5, "fast": 0.05, "dead": 0.0, "quick": 0.03}
    part = {
        "members": [{"name": name, "training.learning_rate": rate, "seed": 3} for name, rate in rates.items()],
        "scheduler": "asha",
    }
    with monkeypatch.context() as patch:
        patch.setattr(Course, "note", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            together(values, part)
    lines: list[str] = []
    found = together(values, part, resume=True, tell=lines.append)
    whole = {name: alone(values, {"name": name, "training.learning_rate": rates[name], "seed": 3}) for name in rates}
    assert {name: record["status"] for name, record in found.items()} == {
        "slow": "stopped", "fast": "finished", "dead": "stopped", "quick": "finished",
    }  # fmt: skip
    for name in ("fast", "quick"):
        assert_same_run(whole[name], found[name], 1e-3)
    steps = whole["dead"]["results"]["steps"]
    assert found["dead"]["results"]["steps"] == -(-steps // 3)
    own = dict(curve(whole["dead"], "eval_loss"))
    assert found["dead"]["results"]["eval_loss"] == pytest.approx(own[steps], rel=1e-5)  # it learns nothing
    assert "asha" in found["slow"]["reason"]
    assert sum("4 members train together: slow, fast, dead, quick" in line for line in lines) == 1
    assert sum("2 members train together" in line for line in lines) == 1
    assert together(values, part, resume=True) == found  # all of it is over
    results = {
        each.name: each for each in outcomes(parse_sweep({**values, "sweep": part}, Path("s")), [*found.values()])
    }
    assert (results["slow"].status, results["slow"].measure, results["slow"].best) == ("stopped", None, False)
    part["members"].append({"name": "late"})
    with pytest.raises(ConfigError, match="begun with other rungs: 4 members"):
        together(values, part, resume=True)


class Mortal:
    """One worker with two places, which dies as often as it is told to."""

    n_workers, n_places = 1, 2

    def __init__(self, deaths: int) -> None:
        self.deaths, self.packs = deaths, list[list[str]]()

    def __enter__(self) -> Mortal:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, jobs: Any) -> None:
        self.jobs = jobs
        self.packs.append([job.member.name for job in jobs])

    def wait(self) -> Any:
        self.deaths -= 1
        done = "the node is gone" if self.deaths >= 0 else train_together(self.jobs, lambda line: None, Stop())
        return self.jobs, done


def test_members_of_a_worker_that_has_died_begin_again_three_times(values: dict[str, Any]) -> None:
    part = {"members": [{"name": name, "training.max_steps": 1} for name in "abc"]}
    worker = Mortal(3)
    found = together(values, part, engine=lambda *_: worker)
    assert worker.packs == [["a", "b"]] * 4 + [["c"]]
    assert {record["status"] for record in found.values()} == {"finished"}
    values["output"] = str(Path(values["output"]).with_name("again"))
    with pytest.raises(TrainingError, match=r"4 workers that trained a have died: the node is gone\. Give them more"):
        together(values, part, engine=lambda *_: Mortal(4))
    with pytest.raises(ConfigError, match=r"sweep.engine: ray needs the workers of a cluster"):
        together(values, {**part, "engine": "ray"})


class DiesBehindOne(Mortal):
    """It trains the first member of a pack before it dies."""

    def wait(self) -> Any:
        if self.deaths > 0:
            train_together(self.jobs[:1], lambda line: None, Stop())
        return super().wait()


def test_a_member_that_was_over_before_its_worker_died_is_left_alone(values: dict[str, Any]) -> None:
    worker = DiesBehindOne(1)
    found = together(
        values, {"members": [{"name": name, "training.max_steps": 1} for name in "abc"]}, engine=lambda *_: worker
    )
    assert worker.packs == [["a", "b"], ["b", "c"]]
    assert {record["status"] for record in found.values()} == {"finished"}


def test_several_processes_share_no_sweep(values: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("veneer.train.sweep.sweep.n_processes", lambda: 2)
    with pytest.raises(ConfigError, match="without torchrun"):
        together(values, {"members": [{"name": "one"}]})


@pytest.mark.parametrize("fused", ["off", "auto"])
def test_gradient_checkpointing_and_dropout_draw_the_same_numbers_again(values: dict[str, Any], fused: str) -> None:
    values["training"] |= {"gradient_checkpointing": True, "fused": fused}
    changes = [{"name": "a", "adapter.lora_dropout": 0.3}, {"name": "b", "adapter.lora_dropout": 0.2, "seed": 4}]
    shared = together(values, {"members": changes})
    for each in changes:
        assert_same_run(alone(values, each), shared[each["name"]], 2e-4)


def test_a_quantized_base_is_shared(values: dict[str, Any]) -> None:
    values["model"]["quantization"] = "nf4"
    changes = [{"name": "a", "adapter.r": 2}, {"name": "b", "adapter.r": 5}]
    shared = together(values, {"members": changes})
    for each in changes:
        assert_same_run(alone(values, each), shared[each["name"]], 2e-3)


@pytest.mark.parametrize(
    ("part", "messages"),
    [
        ({"members": [{"name": "a", "adapter.rr": 3}]}, ["adapter.rr: unknown key; the nearest is 'r'"]),
        ({"grids": {}}, ["sweep.grids: unknown key; the nearest is 'grid'"]),
        ({"grid": {"adapter.r": 3}}, ["sweep.grid.adapter.r: 3 must be a list"]),
        ({"grid": [3]}, ["sweep.grid: must give a list of values for each key"]),
        ({"members": {}}, ["sweep.members: must be a list"]),
        ([], ["sweep: must hold members"]),
        (
            {"grid": {"model.source": ["x"], "training.bf16": [True], "output": ["y"]}},
            ["model.source cannot vary: all members share", "training.bf16 cannot vary", "output cannot vary"],
        ),
        ({"members": [{"name": "a"}, {"name": "a"}]}, ["several members are called ['a']"]),
        ({"members": [{"name": "a/b"}]}, ["'a/b' must be made of letters"]),
        ({"members": [{"name": "a", "adapter": {"method": "full"}}]}, ["a: method full trains the base itself"]),
        ({"members": [{"name": "a", "seed.x": 3}]}, ["seed is a value, not a section"]),
        (
            {"members": [{"name": "a", "training.optim": "galore_adamw_layerwise", "training.max_grad_norm": 0}]},
            ["training.optim: galore_adamw_layerwise projects the gradients of whole weights"],
        ),
        ({"members": [{"name": "a", "training.neftune_noise_alpha": 3}]}, ["training.neftune_noise_alpha acts on"]),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_at_once(values: dict[str, Any], part: Any, messages: list[str]) -> None:
    values["seed"] = 3
    with pytest.raises(ConfigError) as error:
        together(values, part)
    for message in messages:
        assert message in str(error.value)


def test_flash_attention_is_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # as if the package were there
    values["model"]["attention"] = "flash_attention_2"
    with pytest.raises(ConfigError, match="flash_attention_2 takes one row at a time"):
        together(values, {"members": [{"name": "a"}]})


def test_a_grid_is_every_combination_and_names_say_what_differs(values: dict[str, Any]) -> None:
    part = {
        "members": [{"name": "lora"}, {"adapter": {"method": "ia3"}}],
        "grid": {"training.learning_rate": [0.01, 0.02], "data.train": ["rows.jsonl", "other.jsonl"]},
    }
    sweep = parse_sweep({**values, "sweep": part}, Path(values["model"]["source"]).parent / "sweep.yaml")
    names = [member.name for member in sweep.members]
    assert len(names) == 8
    assert names[0] == "lora_learning_rate-0.01_train-rows"
    assert names[-1] == "adapter-ia3_learning_rate-0.02_train-other"
    assert sweep.members[-1].recipe.training["learning_rate"] == 0.02
    assert sweep.members[-1].recipe.output == str(Path(values["output"]) / names[-1])


def test_inputs_that_rows_cannot_share_are_refused() -> None:
    part = Part({"input_ids": torch.ones(2, 3), "pixel_values": torch.ones(2, 3)}, Scoring(), torch.Generator())
    with pytest.raises(ConfigError, match="pixel_values"):
        joined({"a": part})
