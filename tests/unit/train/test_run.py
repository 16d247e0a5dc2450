"""The ``run.json`` of a run that breaks off, and the meaning of ``train_on`` for rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from veneer.errors import ConfigError, DataError, DeviceError, DivergedError, OutOfMemoryError
from veneer.recipe.recipe import parse_recipe
from veneer.train import output
from veneer.train.callbacks import ShortRunLog
from veneer.train.recipe_trainer import make_trainer
from veneer.train.record.place import require_fresh
from veneer.train.run import carry_out, run_recipe
from veneer.train.samples import samples_of


@pytest.fixture
def values(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"the cat sat {n}"}) for n in ("one", "two")))
    return {
        "model": {"source": str(tmp_path / "base")},
        "adapter": {"method": "lora", "r": 3},
        "data": {"train": str(tmp_path / "rows.jsonl"), "train_on": "everything"},
        "training": {
            "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "bf16": False, "report_to": "none",
            "disable_tqdm": True,
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip


def test_a_short_run_logs_often_enough_for_a_curve():
    for max_steps, logging_steps, wanted in ((7, 10, 1), (19, 10, 1), (20, 10, 10), (190, 100, 9), (2, 1, 1)):
        state = SimpleNamespace(max_steps=max_steps, logging_steps=logging_steps)
        ShortRunLog().on_train_begin(None, state, None)
        assert state.logging_steps == wanted


@pytest.mark.parametrize("saved", ["adapter", "model"])
def test_what_a_run_saved_is_not_written_over(tmp_path, saved):
    (tmp_path / "run" / saved).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"holds the {saved} that a run saved"):
        require_fresh(tmp_path / "run", resume=False)
    require_fresh(tmp_path / "run", resume=True)


def test_a_finished_run_is_told_as_such(tmp_path):
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "finished", "recipe": {}}))
    with pytest.raises(
        ConfigError,
        match=r"a finished run: choose another output .* more steps with --resume; to train its adapter further",
    ):
        require_fresh(tmp_path / "run", resume=False)


def test_other_files_in_the_output_are_told(tmp_path):
    assert output.other_files(tmp_path) is None
    for name in ("d.txt", "a.txt", "c.txt", "b.txt"):
        (tmp_path / name).write_text("")
    told = f"{tmp_path} holds other files, which stay as they are: a.txt, b.txt, c.txt and 1 more"
    assert output.other_files(tmp_path) == told
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed", "recipe": {}}))
    assert output.other_files(tmp_path) is None


@pytest.mark.parametrize("saved", ["adapter", "model", None])
def test_a_run_with_checkpoints_leads_to_resume_and_its_adapter_to_another_output(tmp_path, saved):
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    if saved is not None:
        (tmp_path / "run" / saved).mkdir()
    with pytest.raises(ConfigError, match=r"holds the checkpoints of a run: continue it with --resume") as error:
        require_fresh(tmp_path / "run", resume=False)
    assert (
        "to train its adapter further, name it as adapter.from in a recipe with another output" in str(error.value)
    ) == (saved == "adapter")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (DivergedError("the loss is nan in step 2"), "diverged", "the loss is nan in step 2"),
        (DataError("row 7: no"), "failed", "row 7: no"),
        (RuntimeError("out of memory"), "failed", "RuntimeError: out of memory"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_breaks_off_says_how_and_why(values, monkeypatch, error, status, reason):
    recipe = parse_recipe(values)
    trainer = make_trainer(recipe)
    step = trainer.training_step

    def second_fails(*args, **options):
        if trainer.state.global_step == 1:
            raise error
        return step(*args, **options)

    monkeypatch.setattr(trainer, "training_step", second_fails)
    with pytest.raises(type(error)):
        carry_out(recipe, trainer)
    record = json.loads((Path(values["output"]) / "run.json").read_text())
    assert (record["status"], record["reason"]) == (status, reason)
    assert record["log"][0]["step"] == 1
    assert record["recipe"]["output"] == values["output"]


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), OutOfMemoryError, "no memory left"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure\nSet X"), DeviceError, "lost to this process"),
    ],
)
@pytest.mark.parametrize("place", ["training_step", "save_model"])
def test_a_gpu_that_fails_leaves_the_last_checkpoint_whole(values, monkeypatch, error, kind, told, place):
    values["training"] |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    recipe = parse_recipe(values)
    trainer = make_trainer(recipe)
    whole = getattr(trainer, place)

    def fails_behind_the_first(*args, **options):
        if trainer.state.global_step == (1 if place == "training_step" else 2):
            raise error
        return whole(*args, **options)

    monkeypatch.setattr(trainer, place, fails_behind_the_first)
    with pytest.raises(kind, match=rf"{told}.*checkpoint-1 is whole, and --resume goes on from it"):
        carry_out(recipe, trainer)
    record = json.loads((Path(values["output"]) / "run.json").read_text())
    assert record["status"] == "failed"
    assert told in record["reason"]
    assert "Set X" not in record["reason"]
    assert run_recipe(recipe, resume=True)["results"]["steps"] == 3


def test_a_gpu_that_fails_before_the_first_checkpoint(values, monkeypatch):
    recipe = parse_recipe(values)
    trainer = make_trainer(recipe)
    monkeypatch.setattr(trainer, "training_step", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(OutOfMemoryError, match=r"after step 0, and no checkpoint is there$"):
        carry_out(recipe, trainer)


def test_answers_of_plain_text_are_refused_where_asked_for_and_told_else(values, caplog):
    values["data"]["train_on"] = "answers"
    for use in (make_trainer, samples_of):
        with pytest.raises(ConfigError, match=r"data.train_on: answers, and the rows are plain text.*set it to every"):
            use(parse_recipe(values))
    del values["data"]["train_on"]
    (row,) = samples_of(parse_recipe(values))[0].values()
    assert row["labels"][1:] == row["input_ids"][1:]
    assert caplog.text.count("plain text, so every token is trained") == 1
    caplog.clear()
    values["data"]["train_on"] = "everything"
    samples_of(parse_recipe(values))
    assert "plain text" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_steps": 2}, [2, 4]),  # the last step evaluates: nothing is left to find out
        ({"eval_steps": 3}, [3, 4]),
        ({"eval_steps": 2, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}, [2, 4, 4]),
    ],
)
def test_what_a_run_ended_with_is_evaluated_once(values, monkeypatch, changes, steps):
    values["data"]["eval"] = values["data"]["train"]
    values["training"] |= {"max_steps": 4, "eval_strategy": "steps", "eval_on_start": False, **changes}
    recipe = parse_recipe(values)
    trainer = make_trainer(recipe)
    evaluate, losses = trainer.evaluate, iter([0.5, 2.0, 0.5])  # the best weights are those of the first evaluation
    seen = []

    def counted(*args, **options):
        seen.append(trainer.state.global_step)
        return evaluate(*args, **options)

    def scored(*args, **options):
        output = loop(*args, **options)
        output.metrics["eval_loss"] = next(losses)
        return output

    loop = trainer.evaluation_loop
    monkeypatch.setattr(trainer, "evaluate", counted)
    monkeypatch.setattr(trainer, "evaluation_loop", scored)
    record = carry_out(recipe, trainer)
    assert seen == steps
    assert [line["step"] for line in record["log"] if "eval_loss" in line] == steps
    assert record["results"]["eval_loss"] == [line["eval_loss"] for line in record["log"] if "eval_loss" in line][-1]
    assert record["results"].keys() >= {"eval_loss", "eval_runtime", "eval_samples_per_second"}


def test_all_processes_wait_until_the_main_one_has_saved_and_pushed(tmp_path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(output, "is_main", lambda: False)
    monkeypatch.setattr(output, "by_main", lambda act: told.append("waits"))
    trainer = SimpleNamespace(
        save_model=lambda *_, **__: told.append("takes part"),
        push_to_hub=lambda **_: told.append("pushes"),
        args=SimpleNamespace(push_to_hub=True, hub_revision=None),
    )
    output.save_trained(trainer, tmp_path / "adapter", {})
    assert told == ["takes part", "pushes", "waits"]
