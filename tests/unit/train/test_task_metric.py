"""Runs of recipes: the first held-out loss, a metric of the task, several sources, streamed rows, warnings."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from models import byte_tokenizer
from veneer.errors import ConfigError, DataError
from veneer.recipe.recipe import parse_recipe
from veneer.train.recipe_trainer import make_trainer
from veneer.train.run import run_recipe
from veneer.train.samples import samples_of


@pytest.fixture
def values(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"the cat sat {n}", "completion": f" {('on', 'two')[i % 2]}"} for i, n in enumerate(["one"] * 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows[:5])))
    (tmp_path / "more.csv").write_text("q,a\nthe cat, on\nsat, two\n")
    return {
        "model": {"source": str(tmp_path / "base")},
        "adapter": {"method": "lora", "r": 3},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "held.jsonl")},
        "training": {
            "max_steps": 2, "logging_steps": 1, "save_steps": 1, "eval_steps": 1, "bf16": False, "report_to": "none",
            "disable_tqdm": True, "learning_rate": 0.01,
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip


def evaluations(record: dict[str, Any], key: str = "eval_loss") -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in record["log"] if key in line]


def test_the_held_out_loss_is_there_before_anything_is_learned_and_once(values):
    output, found = values["output"], {}
    for warmup in (0, 1):  # without a warm-up, and with one, whose first step changes nothing
        values["training"] |= {"warmup_steps": warmup, "eval_steps": 2}
        values["output"] = f"{output}{warmup}"
        record = run_recipe(parse_recipe(values))
        found[warmup] = evaluations(record)
        assert [step for step, _ in evaluations(record, "loss")] == [1, 2]
    assert [step for step, _ in found[0]] == [0, 2]
    assert [step for step, _ in found[1]] == [1, 2]
    assert found[0][0][1] == found[1][0][1]
    values["training"]["max_steps"], values["output"] = 3, f"{output}0"
    values["training"]["warmup_steps"] = 0
    longer = run_recipe(parse_recipe(values), resume=True, allow_changes=True)
    assert [step for step, _ in evaluations(longer)] == [0, 2, 3]
    values["training"] |= {"eval_on_start": False, "eval_steps": 1}
    values["output"] = f"{output}3"
    assert evaluations(run_recipe(parse_recipe(values)))[0][0] == 1


def test_a_method_that_acts_between_steps_is_measured_before_the_first_one(values):
    values["adapter"] = {"method": "adalora", "init_r": 3, "target_r": 2, "tinit": 0, "tfinal": 0, "deltaT": 1}
    values["training"] |= {"warmup_steps": 1, "eval_steps": 2, "max_steps": 2}
    assert [step for step, _ in evaluations(run_recipe(parse_recipe(values)))] == [0, 2]


@pytest.mark.parametrize(
    ("metric", "key"),
    [
        ({"name": "labels"}, "labels"),
        ({"name": "labels", "labels": ["on", "two", "cat"]}, "labels"),
        ({"name": "exact-match", "max_new_tokens": 2}, "exact_match"),
        ({"name": "regex", "pattern": r"\w+", "max_new_tokens": 2}, "regex"),
    ],
)
def test_a_metric_is_measured_with_the_loss_and_the_best_model_is_chosen_by_it(values, metric, key):
    values["metric"] = metric
    values["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": key}
    record = run_recipe(parse_recipe(values))
    found = evaluations(record, f"eval_{key}")
    assert [step for step, _ in found][:2] == [1, 2]
    assert all(0 <= value <= 1 for _, value in found)
    assert record["results"][f"eval_{key}"] == max(value for step, value in found if step)


def test_a_metric_needs_answers(values, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "the cat"}')
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat sat on"}')
    values["metric"] = {"name": "labels"}
    with pytest.raises(DataError, match="metric labels: row 1"):
        make_trainer(parse_recipe(values))


def test_several_sources_and_a_sample_of_each(values, tmp_path):
    more = str(tmp_path / "more.csv")
    values["data"]["more"] = [{"source": more, "weight": 2, "prompt": "{q}", "completion": "{a}"}]
    recipe = parse_recipe(values)
    assert len(make_trainer(recipe).train_dataset) == 9 + 4
    samples, tokenizer = samples_of(recipe)
    assert list(samples) == [values["data"]["train"], more]
    assert tokenizer.decode(samples[more]["input_ids"]).startswith("the cat on")


def test_rows_are_streamed(values):
    values["data"]["streaming"] = True
    record = run_recipe(parse_recipe(values))
    assert (record["status"], record["results"]["steps"]) == ("finished", 2)
    assert record["data"]["train"] == {"streamed": True}
    for key, value in (("packing", True), ("max_steps", -1)):
        with pytest.raises(ConfigError, match=key):
            parse_recipe({**values, "training": {**values["training"], key: value}})


def test_a_chat_template_of_the_recipe_is_saved_with_the_adapter(values, tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    values["data"] |= {"chat": True, "chat_template": str(tmp_path / "chat.jinja"), "train_on": "everything"}
    record = run_recipe(parse_recipe(values))
    assert record["status"] == "finished"
    saved = byte_tokenizer().from_pretrained(tmp_path / "run" / "adapter")
    assert saved.chat_template == (tmp_path / "chat.jinja").read_text()


def test_odd_settings_are_told(values, caplog, make_model, tmp_path):
    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    values["training"]["learning_rate"] = 0.3
    values["adapter"]["target_modules"] = ".*(lm_head|q_proj)"
    make_trainer(parse_recipe(values))
    assert "times the usual one of method lora" in caplog.text
    assert "matches the output head, which is tied" in caplog.text


def test_pushing_offline_is_told_before_anything_is_loaded(values, monkeypatch):
    monkeypatch.setattr("veneer.store.hub._asked", lambda address: None)
    values["training"]["push_to_hub"] = True
    with pytest.raises(ConfigError, match=r"push_to_hub: .* cannot be reached"):
        run_recipe(parse_recipe(values))


def test_an_upload_that_fails_is_told_and_loses_nothing(values, monkeypatch, caplog, tmp_path):
    lost = ConnectionError("the network is gone\nand more")

    def made(self, *_, **__):
        self.hub_model_id, self.push_in_progress = "me/adapter", None

    def fails(*_, **__):
        raise lost

    monkeypatch.setattr("veneer.train.run.require_hub", lambda: None)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", made)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fails)
    values["training"]["push_to_hub"] = True
    record = run_recipe(parse_recipe(values))
    assert record["status"] == "finished"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert caplog.text.count("the upload to me/adapter failed (the network is gone). Nothing is lost here") == 3


def test_what_is_uploaded_stands_under_its_name(values, monkeypatch, caplog, tmp_path):
    sent = []

    def made(self, *_, **__):
        self.hub_model_id, self.push_in_progress = "me/adapter", None

    def upload(self, *, folder_path, run_as_future=False, **_):
        sent.append({path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*")})
        lost = Future()
        lost.set_exception(ConnectionError("lost on its way"))
        return lost if run_as_future else None

    monkeypatch.setattr("veneer.train.run.require_hub", lambda: None)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", made)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    values["training"]["push_to_hub"] = True
    run_recipe(parse_recipe(values))
    assert "adapter/adapter_model.safetensors" in sent[-1]
    assert not any("partial" in path for path in sent[-1])
    assert "the upload to me/adapter failed (lost on its way)" in caplog.text  # of a checkpoint, beside training


def test_what_a_library_refuses_while_a_trainer_is_made_is_one_message(values, monkeypatch):
    monkeypatch.setattr("veneer.train.run.require_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: json.loads("{"))
    values["training"]["push_to_hub"] = True
    with pytest.raises(ConfigError, match=r"the trainer cannot be made with these settings: Python says JSONDecodeE"):
        run_recipe(parse_recipe(values))
    assert not (Path(values["output"])).exists()
