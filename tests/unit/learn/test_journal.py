"""The journal of rollouts: what is read back, what a crash leaves, and runs that go on by it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from datasets import Dataset

from patience import PATIENCE
from veneer import GRPOConfig, GRPOTrainer, LoraConfig, RLOOConfig, RLOOTrainer
from veneer.errors import FormatError, TrainingError
from veneer.learn.journal import Journal, journal_path, mask_of, packed, read_journal, runs_of, unpacked

from .conftest import LORA
from .test_conversation import CALL, ROWS, Game, tokenizer

__all__ = ["tokenizer"]


def test_numbers_and_masks_are_read_as_they_were_written():
    values = torch.randn(97).tolist()
    assert unpacked(packed(values)) == values
    for mask in ([], [1, 1], [0], [0, 1, 1, 0, 0, 0, 1]):
        assert mask_of(runs_of(mask)) == mask


def test_a_journal_after_a_crash(tmp_path):
    path = journal_path(tmp_path)
    journal = Journal(path, keeps=True)
    for draw in range(3):
        journal.write(draw, [{"adapter": "a", "row": row} for row in range(2)])
    with path.open("ab") as file:
        file.write(b'{"draw": 3, "adapter": "a", "row": 0}\n{"draw": 3, "adap')
    journal = Journal(path, keeps=True)
    assert journal.draw(1, "a", 2) == [{"draw": 1, "adapter": "a", "row": row} for row in range(2)]
    assert journal.draw(3, "a", 2) is None  # one of its lines is missing
    assert journal.draw(1, "b", 2) is None
    journal.write(1, [{"adapter": "b", "row": 5}])  # another run from here on
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["draw"], line["adapter"]) for line in lines] == [(0, "a"), (0, "a"), (1, "b")]
    assert Journal(path, keeps=False).draw(0, "a", 2) is None
    with pytest.raises(FormatError, match="holds no journal of rollouts"):
        list(read_journal(tmp_path / "other"))
    for text, told in (
        ("rubbish\n", "line 1: it is no rollout"),
        ('{"draw": 0}\n', "line 1: it lacks advantage, calls"),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=told):
            list(read_journal(tmp_path))


class Dice(Game):
    """A game whose answers and rewards are drawn anew each time."""

    def reset(self, **row: Any) -> str:
        super().reset()
        return f" go {random.SystemRandom().random()}"

    def add(self, a: int) -> str:
        """Count.

        Args:
            a: A number.
        """
        return f"{random.SystemRandom().random():.3f}"

    def get_reward(self) -> float:
        return random.SystemRandom().random()


def judged(completions: list[Any], log_metric: Any, **row: Any) -> list[float]:
    log_metric("luck", random.SystemRandom().random())
    return [random.SystemRandom().random() for _ in completions]


@pytest.mark.parametrize("kind", ["grpo", "environment", "rloo"])
def test_a_run_goes_on_to_the_bit_with_tools_and_rewards_of_chance(make_model, tokenizer, settings, tmp_path, kind):
    def run(resume: str | None, **changes: Any) -> Any:
        small = {"num_generations": 2, "max_completion_length": 9, "max_steps": 5, "rollout_engine": "engine"}
        saves = {"save_strategy": "steps", "save_steps": 2, "seed": 3, "reward_timeout": PATIENCE}
        given: dict[str, Any] = {}
        if kind == "environment":
            forced = {"use_vllm": True, "vllm_structured_outputs_regex": CALL, "max_tool_calling_iterations": 1}
            small |= {**forced, "max_completion_length": 200}
            small["tool_timeout"] = PATIENCE
            given["environment_factory"] = Dice
        trainer, config = (RLOOTrainer, RLOOConfig) if kind == "rloo" else (GRPOTrainer, GRPOConfig)
        args = config(**{**settings, **small, **saves, **changes})
        model, rows = make_model(max_position_embeddings=701), changes.pop("rows", ROWS)
        made = trainer(model, judged, args, rows, processing_class=tokenizer, peft_config=LoraConfig(**LORA), **given)
        made.train(resume_from_checkpoint=resume)
        clocks = ("runtime", "second", "time")
        log = [{k: v for k, v in line.items() if not any(c in k for c in clocks)} for line in made.state.log_history]
        weights = {n: p.clone() for n, p in made.model.named_parameters() if p.requires_grad}
        return [line for line in log if "loss" in line], weights, journal_path(tmp_path).read_bytes()

    whole, weights, journal = run(None)
    assert len(journal.splitlines()) == 5 * 4
    again, others, other_journal = run(str(tmp_path / "checkpoint-2"))
    for line, own in zip(again, whole, strict=True):
        assert {k: (line[k], own[k]) for k in own if line.get(k) != own[k]} == {}
    assert journal == other_journal
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    fresh = run(None)[0]
    assert fresh != whole  # the rewards are of chance


def test_a_journal_of_other_prompts_is_refused(make_model, tokenizer, settings, tmp_path):
    def made(rows: Dataset) -> Any:
        small = {
            "num_generations": 2,
            "max_completion_length": 9,
            "max_steps": 3,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        args = GRPOConfig(**{**settings, **small})
        trainer = GRPOTrainer(
            make_model(), lambda completions, **row: [len(str(each)) for each in completions], args, rows,
            processing_class=tokenizer, peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        trainer.other_data = True
        return trainer

    made(ROWS).train()
    changed = [{"prompt": [{"role": "user", "content": f"{row['prompt'][0]['content']}!"}]} for row in ROWS]
    with pytest.raises(TrainingError, match="the journal of rollouts, draw 1, has other prompts than this run"):
        made(Dataset.from_list(changed)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert json.loads(journal_path(tmp_path).read_text().splitlines()[0])["prompt"][0]["role"] == "user"
