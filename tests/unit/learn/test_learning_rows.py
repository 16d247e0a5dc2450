"""Answers that a gradient comes from: the others are in no training pass, and change neither loss nor gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from veneer import GRPOConfig, GRPOTrainer, LoraConfig, RLOOConfig, RLOOTrainer
from veneer.learn.learning_rows import by_prompt, equal_groups, learning_rows

from .conftest import LORA

ROWS = Dataset.from_list([{"prompt": f"say {i} " + "x" * (5 * i % 17)} for i in range(11)])
KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "vespo", "luspo")


@pytest.fixture
def trainer_of(make_model, tokenizer, settings):
    def make(kind: str, reward: Any, **changes: Any) -> Any:
        trainer, config = KINDS[kind]
        args = config(**{**settings, "num_generations": 2, "max_completion_length": 5, "max_steps": 2, **changes})
        return trainer(
            make_model(), reward, args, train_dataset=ROWS, processing_class=tokenizer, peft_config=LoraConfig(**LORA)
        )

    return make


def half(completions: list[str], prompts: list[str], **row: Any) -> list[float]:
    """Equal for the answers to every other prompt, by a number that a mean rounds."""
    return [
        0.1 if int(p.split()[1]) % 2 else sum(map(ord, c)) % 11 / 7 for p, c in zip(prompts, completions, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_left_out_change_neither_loss_nor_gradient(trainer_of, kind, monkeypatch):
    trainer = trainer_of(kind, half, beta=0.0, num_iterations=2, learning_rate=0.5, per_device_train_batch_size=8)
    trainer.train()
    [inputs] = trainer._buffered_inputs
    assert 0 < int((inputs["advantages"] == 0).sum()) < 8
    passed, scored = [], trainer._scored_by
    monkeypatch.setattr(
        trainer, "_scored_by", lambda m, ids, *a, **o: passed.append(len(ids)) or scored(m, ids, *a, **o)
    )
    trained = [x for x in trainer.model.parameters() if x.requires_grad]
    trainer.current_gradient_accumulation_steps = 1
    for loss_type in LOSSES if kind == "grpo" else ("",):
        trainer.loss_type, found = loss_type, []
        for learns in (trainer._learning, lambda _: None):
            with monkeypatch.context() as patch:
                patch.setattr(trainer, "_learning", learns)
                loss = trainer._compute_loss(trainer.model, inputs)
            found.append((loss.item(), torch.autograd.grad(loss, trained)))
        (few, own), (every, theirs) = found
        assert few == pytest.approx(every, rel=1e-6, abs=1e-7), loss_type
        assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-9 for a, b in zip(own, theirs, strict=True)), loss_type
    assert set(passed) == {8, int((inputs["advantages"] != 0).sum())}


def test_what_else_learns_keeps_all_rows(trainer_of):
    """A distance to the reference and a bonus for entropy; equal answers alone leave one row in the pass."""
    for changes in ({"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        trainer = trainer_of("grpo", half, **changes)
        assert trainer._learning({"advantages": torch.tensor([0.0, 1.0]), "sampling_per_token_logps": None}) is None
    trainer = trainer_of("grpo", lambda completions, **_: [0.1] * len(completions), num_generations=4)
    trainer.train()
    assert all(line["grad_norm"] == 0 for line in trainer.state.log_history if "loss" in line)


def test_answers_to_a_prompt_share_a_micro_batch_of_a_step(trainer_of):
    trainer = trainer_of("grpo", half, gradient_accumulation_steps=3, max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    batches = trainer._buffered_inputs
    assert [len({tuple(row) for row in batch["prompt_ids"].tolist()}) for batch in batches] == [2, 2, 2]
    assert {tuple(batch) for batch in batches} == {tuple(batches[0])}


def test_rows_and_groups():
    assert learning_rows(torch.tensor([0.0, 2.0, -1.0, 0.0])).tolist() == [1, 2]
    assert learning_rows(torch.tensor([0.0, 0.0])).tolist() == [0]
    assert learning_rows(torch.tensor([1.0, -1.0])) is None
    rewards = torch.tensor([[0.1, 2.0], [0.1, 2.0], [0.1, 2.0], [0.1, 3.0], [0.3, torch.nan], [0.3, torch.nan]])
    assert equal_groups(rewards, 2).tolist() == [True, True, False, False, True, True]
    none = torch.tensor([[torch.nan], [0.1], [0.1], [torch.nan], [torch.nan], [torch.nan], [0.1], [torch.nan], [0.2]])
    assert equal_groups(none, 3).tolist() == [True] * 6 + [False] * 3  # an answer without opinions does not count
    parts = [
        {"prompt_ids": torch.tensor([[a], [b]]), "prompt_mask": torch.ones(2, 1), "n": torch.tensor(7)}
        for a, b in ((1, 2), (2, 1))
    ]
    assert [batch["prompt_ids"].flatten().tolist() for batch in by_prompt(parts)] == [[1, 1], [2, 2]]


def test_batches_with_images_stay_as_they_are():
    """The first has two rows of one image and of two, the second of three and of none: 6 patches in all, not 4."""
    parts = [
        {"prompt_ids": torch.tensor([[a], [b]]), "prompt_mask": torch.ones(2, 1), "num_images": images,
         "pixel_values": torch.arange(float(sum(images)))}
        for a, b, images in ((1, 2, [1, 2]), (2, 1, [3, 0]))
    ]  # fmt: skip
    assert by_prompt(parts) == parts
