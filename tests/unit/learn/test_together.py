"""Members of a sweep that draw by one engine, against the run that each would be on its own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer.errors import ConfigError, Interrupted, TrainingError
from veneer.learn import together as learn_together
from veneer.learn.rollouts import Rollouts
from veneer.learn.together import draw_together
from veneer.recipe.recipe import parse_recipe
from veneer.recipe.values import put
from veneer.train import run
from veneer.train.run import run_recipe
from veneer.train.sweep.recipe import parse_sweep
from veneer.train.sweep.report import outcomes, quality, require_finished, table
from veneer.train.sweep.sweep import in_this_process, run_sweep

LISTED = [
    {"name": "small", "adapter.r": 2, "training.learning_rate": 0.03},
    {"name": "dora", "adapter.use_dora": True, "seed": 5, "training.beta": 0.1},
    {"name": "ia3", "adapter": {"method": "ia3"}, "training.gradient_accumulation_steps": 2, "training.max_steps": 2},
    {"name": "hot", "training.temperature": 1.3, "training.steps_per_generation": 2, "training.num_iterations": 2},
    {"name": "held", "data.eval_fraction": 0.3, "training.eval_steps": 2, "training.per_device_eval_batch_size": 4},
]  # fmt: skip
REWARDS = """
def spread(completions, **row):
    return [len(set(text)) / 7 for text in completions]


def failing(completions, calls=[], **row):
    calls.append(1)
    if len(calls) == 2:
        raise LookupError("no such word")
    return [len(set(text)) / 7 for text in completions]
"""


@pytest.fixture
def values(tmp_path: Path, make_model: Any, tokenizer: Any) -> dict[str, Any]:
    """A recipe of a tiny model."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"say {i} " + "x" * (5 * i % 17)} for i in range(11)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return {
        "task": "grpo",
        "model": {"source": str(tmp_path / "base"), "dtype": "float32"},
        "adapter": {"method": "lora", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "rewards": [f"{tmp_path / 'rewards.py'}:spread"],
        "rollouts": {"engine": "engine", "memory": "one"},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5,
            "learning_rate": 0.01, "logging_steps": 1, "save_strategy": "no", "bf16": False, "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": False, "reward_timeout": None,
        },
        "output": str(tmp_path / "together"),
    }  # fmt: skip


def together(values: dict[str, Any], part: Any, **options: Any) -> dict[str, dict[str, Any]]:
    sweep = parse_sweep({**values, "sweep": part}, Path(values["model"]["source"]).parent / "sweep.yaml")
    records = run_sweep(sweep, engine=in_this_process(draw_together), **options)
    return dict(zip((m.name for m in sweep.members), records, strict=True))


def alone(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    own = json.loads(json.dumps(values))
    for key, value in changes.items():
        if key != "name":
            put(own, key, value)
    own["output"] = str(Path(values["output"]).with_name("alone") / changes["name"])
    return run_recipe(parse_recipe(own))


def assert_same_run(own: dict[str, Any], shared: dict[str, Any]) -> None:
    """Equal to the bit: log, adapter, and journal but for the times."""
    timed = ("runtime", "per_second", "step_time", "flos")
    for one, other in zip(own["log"], shared["log"], strict=True):
        compared = [key for key in one if not any(word in key for word in timed)]
        assert {key: one[key] for key in compared} == {key: other[key] for key in compared}
    mine, theirs = (load_file(Path(r["saved"]) / "adapter_model.safetensors") for r in (own, shared))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    journals = [(Path(r["recipe"]["output"]) / "rollouts" / "0_of_1.jsonl").read_text() for r in (own, shared)]
    assert journals[0] == journals[1]


@pytest.mark.parametrize("task", ["grpo", "rloo"])
def test_every_member_is_the_run_that_it_would_be_on_its_own_to_the_bit(values, task, monkeypatch):
    values["task"] = task
    changes = LISTED if task == "grpo" else LISTED[:3]
    batches: list[int] = []
    drawn = Rollouts.run

    def counted(self: Rollouts, asked: Any) -> Any:
        batches.append(len({each.lora_request.name for each in asked}))
        return drawn(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "run", counted)
        shared = together(values, {"members": changes})
    assert max(batches) == len(changes)  # of all members in one batch
    for each in changes:
        assert_same_run(alone(values, each), shared[each["name"]])


def test_a_signal_ends_every_member_after_its_step_and_all_go_on_to_the_bit(values, monkeypatch):
    part = {"members": [{"name": "one"}, {"name": "two", "training.steps_per_generation": 2}]}
    values["training"] |= {"save_strategy": "steps", "save_steps": 3}
    whole = together(values, part)
    values["output"] = str(Path(values["output"]).with_name("stopped"))
    draws = iter(range(3))
    drawn = Rollouts.run

    def heard(self: Rollouts, asked: Any) -> Any:
        if next(draws, 0) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "run", heard)
        with pytest.raises(Interrupted):
            together(values, part)
    found = {name: json.loads((Path(values["output"]) / name / "run.json").read_text()) for name in whole}
    told = {name: (record["status"], record["step"]) for name, record in found.items()}
    assert told == {"one": ("interrupted", 2), "two": ("interrupted", 3)}
    resumed = together(values, part, resume=True)
    for name, record in whole.items():
        assert_same_run(record, resumed[name])


def test_a_sweep_that_broke_off_after_a_draw_goes_on_from_its_journals(values, monkeypatch):
    part = {"members": [{"name": "one"}, {"name": "two", "adapter.r": 2}]}
    values["training"] |= {"save_strategy": "steps", "save_steps": 1}
    whole = together(values, part)
    values["output"] = str(Path(values["output"]).with_name("broken"))
    draws = iter(range(2))
    drawn = Rollouts.run

    def broken(self: Rollouts, asked: Any) -> Any:
        next(draws)
        return drawn(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "run", broken)
        with pytest.raises(StopIteration):
            together(values, part)
    resumed = together(values, part, resume=True)
    for name, record in whole.items():
        assert_same_run(record, resumed[name])


def test_a_member_that_diverges_leaves_and_its_adapter_with_it(values, monkeypatch):
    monkeypatch.setattr("veneer.recipe.advice.MOST_RATE", 1e38)
    steady = {"name": "steady", "training.max_steps": 5}
    wild = {"name": "wild", "training.learning_rate": 3e37, "training.max_grad_norm": 1e30}
    adapters: list[list[str]] = []
    drawn = Rollouts.run

    def counted(self: Rollouts, asked: Any) -> Any:
        adapters.append([each.name for each in self.engine.adapters])
        return drawn(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "run", counted)
        shared = together(values, {"members": [wild, steady]})
    assert shared["wild"]["status"] == "diverged"
    assert adapters[0] == ["member1", "member2"]
    assert adapters[-1] == ["member2"]
    assert_same_run(alone(values, steady), shared["steady"])


def test_a_member_that_fails_leaves_and_goes_on_with_a_resume(values):
    steady = {"name": "steady"}
    failing = {"name": "failing", "rewards": [values["rewards"][0].replace("spread", "failing")]}
    values["training"] |= {"save_strategy": "steps", "save_steps": 1}
    part, said = {"members": [failing, steady]}, list[str]()
    shared = together(values, part, tell=said.append)
    assert (shared["failing"]["status"], shared["failing"]["step"]) == ("failed", 1)
    assert "no such word" in shared["failing"]["reason"]
    assert any(line.startswith("failing: failed after step 1: ") and "no such word" in line for line in said)
    assert_same_run(alone(values, steady), shared["steady"])
    found = outcomes(parse_sweep({**values, "sweep": part}, Path("sweep.yaml")), [*shared.values()])
    assert [each.measure is None for each in found] == [True, False]
    with pytest.raises(TrainingError, match=r"1 of 2 members failed: failing \(.*no such word.*\)\. .* --resume"):
        require_finished(found)
    Path(values["rewards"][0].partition(":")[0]).write_text(REWARDS.replace("len(calls) == 2", "False"))
    resumed = together(values, part, resume=True)
    require_finished(outcomes(parse_sweep({**values, "sweep": part}, Path("sweep.yaml")), [*resumed.values()]))
    assert (resumed["failing"]["status"], resumed["failing"]["results"]["steps"]) == ("finished", 4)


def test_a_member_that_fails_again_for_the_same_reason_leaves_again(values):
    part = {"members": [{"name": "failing", "rewards": [values["rewards"][0].replace("spread", "failing")]}]}
    values["training"] |= {"save_strategy": "steps", "save_steps": 1}
    first = together(values, part)["failing"]
    changed = REWARDS.replace("len(calls) == 2", "len(calls) in (1,)")  # not as long: bytecode goes by size and second
    Path(values["rewards"][0].partition(":")[0]).write_text(changed)
    again = together(values, part, resume=True)["failing"]
    assert (again["status"], again["step"], again["reason"]) == ("failed", 1, first["reason"])


def test_a_member_that_is_refused_before_it_trains_ends_the_sweep(values, monkeypatch):
    described = run.describe_run

    def refused(recipe: Any, trainer: Any) -> Any:
        if recipe.output.endswith("two"):
            raise ConfigError("two is refused")
        return described(recipe, trainer)

    monkeypatch.setattr(run, "describe_run", refused)
    with pytest.raises(ConfigError, match="two is refused"):
        together(values, {"members": [{"name": "one"}, {"name": "two"}]})


def test_the_record_of_an_earlier_failure_is_not_that_of_a_refusal(tmp_path, monkeypatch):
    def refused(*given: Any) -> None:
        raise ConfigError("two is refused")

    (tmp_path / "run.json").write_text(json.dumps({"status": "failed", "recipe": {}, "reason": "two is refused"}))
    monkeypatch.setattr(learn_together, "run_job", refused)
    job: Any = SimpleNamespace(member=SimpleNamespace(recipe=SimpleNamespace(output=str(tmp_path))))
    nothing: Any = None
    with pytest.raises(ConfigError, match="two is refused"):
        learn_together._run_member(job, nothing, nothing, nothing)


def test_members_share_one_copy_of_the_base_if_each_would_keep_one(values, monkeypatch):
    made: list[str] = []
    start = Rollouts.__init__

    def told(self: Rollouts, model: Any, tokenizer: Any, *, memory: str = "beside", **options: Any) -> None:
        made.append(memory)
        start(self, model, tokenizer, memory=memory, **options)

    monkeypatch.setattr(Rollouts, "__init__", told)
    values["training"]["max_steps"] = 1
    values["rollouts"] = {"memory": "auto"}
    copies = {"name": "copies", "adapter.modules_to_save": ["lm_head"]}
    for members, memory in (([{"name": "a"}, {"name": "b"}], "one"), ([{"name": "c"}, copies], "beside")):
        together(values, {"members": members})
        assert made == [memory]
        made.clear()
    drawn = together(values, {"members": [{"name": "d", "rollouts.engine": "generate"}]})  # each draws by itself
    assert made == []
    assert drawn["d"]["status"] == "finished"


def test_members_are_compared_by_their_rewards(values):
    part = {"members": [{"name": "one"}, {"name": "two", "training.learning_rate": 0.02}]}
    values["data"] |= {"eval_fraction": 0.3}
    values["training"] |= {"max_steps": 2, "per_device_eval_batch_size": 4}
    sweep = parse_sweep({**values, "sweep": part}, Path("sweep.yaml"))
    found = outcomes(sweep, [*together(values, part).values()])
    assert quality(found) == "held-out reward"
    assert all(each.reward is not None and each.measure == -each.reward for each in found)
    shown = table(found)
    assert [column.header for column in shown.columns][3:5] == ["reward", ""]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sweep.scheduler": "asha"}, "asha compares members by their loss, which says nothing of grpo's rewards"),
        ({"sweep.members": [{"name": "a", "task": "rloo"}]}, "task cannot vary"),
        ({"sweep.members": [{"name": "a", "training.vllm_max_model_length": 7}]}, "cannot vary"),
    ],
)
def test_sweeps_that_are_refused(values, changes, told):
    values["sweep"] = {"members": [{"name": "a"}]}
    for key, value in changes.items():
        put(values, key, value)
    with pytest.raises(ConfigError, match=told):
        parse_sweep(values, Path("sweep.yaml"))


def test_members_that_draw_need_an_engine_that_draws(values):
    sweep = parse_sweep({**values, "sweep": {"members": [{"name": "a"}]}}, Path("sweep.yaml"))
    with pytest.raises(ConfigError, match="members of grpo draw answers, and no engine that draws is given"):
        run_sweep(sweep)
