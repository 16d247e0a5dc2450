"""Multitask prompt tuning: the prompt of each task in closed form, against PEFT, by rows, and from source tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from methods_in_peft import TOKENS, base, near
from veneer.data.collating import Collator
from veneer.data.dataset import digest, encode_all, pack_all
from veneer.data.encoding import Encoder
from veneer.data.reader import RowReader
from veneer.data.rows import load_rows, stream_rows
from veneer.errors import CompositionError, ConfigError, DataError, ShapeError
from veneer.model.attach.attach import live_parameters
from veneer.records.sites import InputSite
from veneer.store.adapter.records import read_records
from veneer.train.config import SFTConfig
from veneer.train.trainer import SFTTrainer

N, TASKS, RANK = 5, 3, 2
FIELDS: dict[str, Any] = {
    "task_type": "CAUSAL_LM", "num_virtual_tokens": N, "num_tasks": TASKS, "num_ranks": RANK,
}  # fmt: skip
TASK_IDS = torch.tensor([2, 0])
GENERATE: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def moved(model: Any) -> Any:
    """Away from a start at which a task's prompt is next to nothing."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    return model.eval()


def with_peft(**changes: Any) -> Any:
    torch.manual_seed(5)
    return moved(peft.get_peft_model(base(), peft.MultitaskPromptTuningConfig(**FIELDS | changes)))


def ours(**changes: Any) -> Any:
    torch.manual_seed(5)
    return moved(veneer.get_peft_model(base(), veneer.MultitaskPromptTuningConfig(**FIELDS | changes)))


def parameters(model: Any) -> dict[str, Tensor]:
    return live_parameters(model, model.adapter_state, "default")


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, **options).logits


def test_the_prompt_of_a_task_in_closed_form() -> None:
    config = veneer.MultitaskPromptTuningConfig(num_virtual_tokens=2, num_tasks=2)
    params = {
        "prompt_embeddings": torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]]),
        "prefix_task_cols": torch.tensor([[[1.0], [0.5]], [[-1.0], [4.0]]]),
        "prefix_task_rows": torch.tensor([[[1.0, 2.0, 3.0]], [[0.25, 1.0, -1.0]]]),
    }
    site = InputSite(name="input", features=3)
    found = config.lower(site, config.of_task(params, 1)).embeddings
    assert torch.equal(found, torch.tensor([[-0.5, -3.0, 5.0], [7.0, 44.0, -52.0]]))
    assert config.n_tasks == 2
    with pytest.raises(ConfigError, match=r"has 2 tasks, and rows name none: give task_ids, one number below 2"):
        config.lower(site, params)


def test_logits_loss_and_gradients_equal_pefts(tmp_path: Path) -> None:
    reference = with_peft()
    reference.save_pretrained(tmp_path)
    model = veneer.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    expected = reference(input_ids=TOKENS, labels=TOKENS, task_ids=TASK_IDS)
    expected.loss.backward()
    found = model(input_ids=TOKENS, labels=TOKENS, task_ids=TASK_IDS)
    found.loss.backward()
    near(found.logits, expected.logits[:, N:])
    near(found.loss, expected.loss)
    encoder = reference.prompt_encoder["default"]
    wanted = {"prompt_embeddings": encoder.embedding.weight.grad}
    wanted |= {name: getattr(encoder, name).grad for name in ("prefix_task_cols", "prefix_task_rows")}
    assert all(grad.abs().max() > 0 for grad in wanted.values())
    assert parameters(model).keys() == wanted.keys()
    for key, value in parameters(model).items():
        near(value.grad, wanted[key])


def test_files_go_both_ways(tmp_path: Path) -> None:
    reference = with_peft()
    reference.save_pretrained(tmp_path / "theirs")
    model = veneer.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    assert type(model.peft_config["default"]) is veneer.MultitaskPromptTuningConfig
    model.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert written.keys() == read.keys()
    assert all(torch.equal(read[key], value) for key, value in written.items())
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    with torch.no_grad():
        near(back(input_ids=TOKENS, task_ids=TASK_IDS).logits, reference(input_ids=TOKENS, task_ids=TASK_IDS).logits)


def test_rows_of_a_batch_are_those_of_their_tasks_alone() -> None:
    model = ours()
    together = logits(model, task_ids=[2, 0])
    alone = [logits(model, task_ids=[task, task])[row] for row, task in enumerate((2, 0))]
    for found, expected in zip(together, alone, strict=True):
        near(found, expected)
    assert (logits(model, task_ids=[0, 1])[0] - together[0]).norm() > 1e-3


def test_generation_equals_whole_passes() -> None:
    model = ours()
    found, ids = model.generate(input_ids=TOKENS, task_ids=TASK_IDS, **GENERATE), TOKENS
    for _ in range(GENERATE["max_new_tokens"]):
        last = model(input_ids=ids, task_ids=TASK_IDS, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, last], dim=1)
    assert torch.equal(found, ids)
    beams = model.generate(input_ids=TOKENS, task_ids=TASK_IDS, num_beams=3, **GENERATE)
    alone = model.generate(input_ids=TOKENS[1:], task_ids=[0], num_beams=3, **GENERATE)
    assert torch.equal(beams[1:], alone)


def test_rows_may_name_other_adapters_too() -> None:
    model = ours()
    model.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mixed = logits(model, adapter_names=["default", "lora"], task_ids=[1, 0])
    near(mixed[0], logits(model, task_ids=[1, 1])[0])
    model.set_adapter("lora")
    near(mixed[1], logits(model)[1])
    with pytest.raises(ConfigError, match=r"task_ids has no effect: \['lora'\] have no tasks"):
        logits(model, task_ids=[0, 0])


def test_a_cache_of_other_tasks_is_refused() -> None:
    model = ours()
    out = model(input_ids=TOKENS, task_ids=[2, 0], use_cache=True)
    more = {"input_ids": TOKENS[:, :1], "cache": out.cache}
    model(**more, task_ids=[2, 0])
    with pytest.raises(ConfigError, match="start from an empty cache"):
        model(**more, task_ids=[0, 0])


def test_an_adapter_of_one_task_needs_no_ids(tmp_path: Path) -> None:
    model = ours(num_tasks=1)
    near(logits(model, task_ids=[0, 0]), logits(model))
    model.save_pretrained(tmp_path)
    (record,) = read_records(tmp_path).records.values()
    values = parameters(model)
    task = (values["prefix_task_cols"] @ values["prefix_task_rows"])[0]
    near(record.embeddings, values["prompt_embeddings"] * task)


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_target_task_starts_from_source_tasks_as_in_peft(start: str, tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    fields = {
        "num_tasks": 2 if start == "ONLY_SOURCE_SHARED" else 1,
        "prompt_tuning_init": start,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors"),
        "prompt_tuning_init_task": 2,
    }
    model = veneer.get_peft_model(base(), veneer.MultitaskPromptTuningConfig(**FIELDS | fields))
    reference = peft.get_peft_model(base(), peft.MultitaskPromptTuningConfig(**FIELDS | fields))
    encoder = reference.prompt_encoder["default"]
    found = parameters(model)
    assert torch.equal(found["prompt_embeddings"], encoder.embedding.weight)
    for name in ("prefix_task_cols", "prefix_task_rows"):
        assert found[name].shape == getattr(encoder, name).shape
        if start != "ONLY_SOURCE_SHARED":
            near(found[name], getattr(encoder, name))
    model.save_pretrained(tmp_path / "target")
    (tmp_path / "adapter_model.safetensors").unlink()  # whoever loads the adapter does not need the source
    peft.PeftModel.from_pretrained(base(), tmp_path / "target")
    again = veneer.PeftModel.from_pretrained(base(), tmp_path / "target", is_trainable=True)
    assert all(torch.equal(value, found[key]) for key, value in parameters(again).items())


def test_the_start_is_drawn_like_pefts() -> None:
    torch.manual_seed(2)
    model = veneer.get_peft_model(base(), veneer.MultitaskPromptTuningConfig(num_virtual_tokens=53, num_tasks=7))
    found = parameters(model)
    assert found["prefix_task_cols"].std().item() == pytest.approx(0.02, rel=0.15)
    assert found["prefix_task_rows"].std().item() == pytest.approx(0.02, rel=0.15)
    scale = base().get_input_embeddings().weight.std().item()
    assert found["prompt_embeddings"].std().item() == pytest.approx(scale, rel=0.15)


@pytest.mark.parametrize(
    ("task_ids", "error", "message"),
    [
        ([0], ShapeError, r"task_ids holds 1 tasks for a batch of 2 rows"),
        ([0, 3], ConfigError, r"task_ids holds 3, and the adapter 'default' has the tasks 0 to 2"),
        ([0, -1], ConfigError, r"task_ids holds -1"),
        ([0.0, 1.0], ConfigError, r"must be a list of whole numbers"),
        (torch.tensor(1), ConfigError, r"must be a list of whole numbers"),
        (None, ConfigError, r"MULTITASK_PROMPT_TUNING: the adapter has 3 tasks, and rows name none"),
    ],
)
def test_task_ids_that_name_no_tasks(task_ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        logits(ours(), task_ids=task_ids)


def test_tasks_of_two_adapters_at_once() -> None:
    model = ours()
    model.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["default", "lora"])
    with pytest.raises(CompositionError, match="activate exactly one, or give adapter_names"):
        logits(model, task_ids=[0, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_ranks": 0}, "num_ranks=0 must be a whole number of at least 1"),
        ({"num_tasks": 0}, "num_tasks=0 must be a whole number of at least 1"),
        ({"prompt_tuning_init_task": -1}, "prompt_tuning_init_task=-1 must be"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "needs prompt_tuning_init_state_dict_path"),
        ({"prompt_tuning_init_state_dict_path": "a"}, "has no effect with prompt_tuning_init='RANDOM'"),
        (
            {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": "a", "num_tasks": 2},
            "num_tasks=2 must be 1 with",
        ),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        veneer.MultitaskPromptTuningConfig(num_virtual_tokens=N, **fields)


def test_sources_that_are_refused(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(N, 24)}, tmp_path / "prompt.safetensors")
    (tmp_path / "source.bin").write_bytes(b"pickle")
    for path, fields, message in (
        (file, {"prompt_tuning_init_task": 3}, r"prompt_tuning_init_task=3, and .* has the tasks 0 to 2"),
        (file, {"num_ranks": 4}, r"does not fit: prefix_task_cols \(1, 5, 2\) instead of \(1, 5, 4\)"),
        (tmp_path / "prompt.safetensors", {}, r"no adapter of source tasks: holds no prefix_task_cols"),
        (tmp_path / "source.bin", {}, r"must be a .safetensors file"),
        (tmp_path / "none.safetensors", {}, r"must be a .safetensors file"),
    ):
        changes = {"num_tasks": 1, "prompt_tuning_init": "EXACT_SOURCE_TASK"} | fields
        changes["prompt_tuning_init_state_dict_path"] = str(path)
        with pytest.raises(ConfigError, match=message):
            veneer.get_peft_model(base(), veneer.MultitaskPromptTuningConfig(**FIELDS | changes))


class _Words:
    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + len(word) for word in text.split()]}


def test_rows_of_data_keep_their_tasks() -> None:
    reader = RowReader()
    row = reader.read({"text": "a bcd ef", "task_ids": 2, "other": 5}, "text")
    assert row == {"text": "a bcd ef", "task_ids": 2}
    encoder = Encoder(tokenizer=_Words(), kind="text")  # type: ignore[arg-type]
    rows = [encoder(row, 0), encoder({"text": "a b", "task_ids": 0}, 1)]
    batch = Collator(pad_token_id=0)(rows)
    assert batch["task_ids"].tolist() == [2, 0]
    assert batch["input_ids"].tolist() == [[3, 5, 4, 1], [3, 3, 1, 0]]
    with pytest.raises(DataError, match=r"row 3: column 'task_ids' must hold the number of a task, from 0 on, not 'x'"):
        encoder({"text": "a b", "task_ids": "x"}, 3)
    with pytest.raises(ConfigError, match="cannot be packed"):
        Collator(pad_token_id=0, padding_free=True)(rows)
    with pytest.raises(ConfigError, match="packing=True joins rows"):
        pack_all(Dataset.from_list(rows), 16, split=False)
    assert digest(Dataset.from_list(rows)) != digest(Dataset.from_list([{**rows[0], "task_ids": 1}, rows[1]]))


MIXED = ({"text": "the cat sat", "task_ids": 1}, {"text": "a dog"})


@pytest.mark.parametrize("rows", [MIXED, MIXED[::-1]], ids=["first", "last"])
def test_rows_of_which_only_some_have_a_task_are_refused(tmp_path: Path, tokenizer: Any, rows: Any) -> None:
    encoder = Encoder(tokenizer=tokenizer, kind="text")
    filled = Dataset.from_list([{"task_ids": None, **row} for row in rows])
    with pytest.raises(DataError, match=r"row [01]: column 'task_ids' must hold .* not None: give each row the number"):
        encode_all(filled, encoder, "training")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for read in (load_rows, stream_rows):
        with pytest.raises(DataError, match=r"row 2 is of the form text.* with task_ids"):
            list(read(file, RowReader()))

    def one_by_one() -> Iterator[Any]:
        yield from rows

    encoded = list(encode_all(IterableDataset.from_generator(one_by_one), encoder, "training"))
    with pytest.raises(DataError, match="1 of the 2 rows of a batch have task_ids: give every row its own"):
        Collator(pad_token_id=0)(encoded)


def test_tasks_are_read_from_csv(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,task_ids\nthe cat sat,12\na dog,0\n")
    encoded = encode_all(load_rows(file, RowReader()), Encoder(tokenizer=tokenizer, kind="text"), "training")
    assert list(encoded["task_ids"]) == [12, 0]
    file.write_text("text,task_ids\nthe cat sat,\n")
    with pytest.raises(DataError, match="row 2: column 'task_ids' must hold the number of a task, from 0 on, not ''"):
        load_rows(file, RowReader())


def test_a_run_trains_the_tasks_of_its_rows(tmp_path: Path, tokenizer: Any, make_model: Any) -> None:
    texts = ("the cat sat on the mat", "a dog ran", "yes", "one two three")
    args = SFTConfig(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, max_steps=2, learning_rate=0.01, save_strategy="no",
        report_to="none", gradient_checkpointing=False, disable_tqdm=True, max_length=32, eval_strategy="steps",
        eval_steps=1, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = SFTTrainer(
        make_model(),
        args,
        train_dataset=Dataset.from_list([{"text": text, "task_ids": at % 2} for at, text in enumerate(texts)]),
        eval_dataset=Dataset.from_list([{"text": "no it was blue", "task_ids": 2}]),
        processing_class=tokenizer,
        peft_config=veneer.MultitaskPromptTuningConfig(**FIELDS),
    )
    before = {key: value.detach().clone() for key, value in parameters(trainer.model).items()}
    trainer.train()
    for key, value in parameters(trainer.model).items():
        moved_rows = [not torch.equal(a, b) for a, b in zip(value, before[key], strict=True)]
        assert moved_rows == ([True, True, False] if key.startswith("prefix_task") else [True] * N)
    assert [line["eval_loss"] > 0 for line in trainer.state.log_history if "eval_loss" in line] == [True, True]


def test_a_task_may_be_chosen_for_all_rows() -> None:
    model = ours()
    model.set_task(2)
    near(logits(model), logits(model, task_ids=[2, 2]))
    near(logits(model, task_ids=[0, 1]), logits(ours(), task_ids=[0, 1]))
    assert torch.equal(
        model.generate(input_ids=TOKENS, **GENERATE), ours().generate(input_ids=TOKENS, task_ids=[2, 2], **GENERATE)
    )
