"""Trainers that draw by the engine: the policy drawn from, what is learned from it, and who draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from veneer import (
    GRPOConfig,
    GRPOTrainer,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    RLOOConfig,
    RLOOTrainer,
    get_peft_model,
)  # fmt: skip
from veneer.errors import CompositionError, ConfigError
from veneer.learn.policy import policy_of
from veneer.learn.proof import PolicyMismatchError
from veneer.learn.rollouts import Rollouts, StaleAnswerError
from veneer.model.quantized.packed_linear import is_packed

from .conftest import LORA

ROWS = Dataset.from_list([{"prompt": f"say {i} " + "x" * (5 * i % 17)} for i in range(11)])
KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
SMALL = {"num_generations": 2, "max_completion_length": 5, "max_steps": 2}


def reward(completions: list[str], **row: Any) -> list[float]:
    return [len(set(text)) / 7 for text in completions]


@pytest.fixture
def trainer_of(make_model, tokenizer, settings):
    def make(kind: str = "grpo", model: Any = None, peft_config: Any = None, **changes: Any) -> Any:
        trainer, config = KINDS[kind]
        args = config(**{**settings, **SMALL, **changes})
        peft_config = peft_config or LoraConfig(**LORA)
        made = {"train_dataset": ROWS, "processing_class": tokenizer, "peft_config": peft_config}
        return trainer(model or make_model(), reward, args, **made)

    return make


def lines(trainer: Any) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "reward", "entropy", "kl", "rollouts/logprob_difference/max")
    return [{n: line[n] for n in names if n in line} for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_no_dropout_acts_while_answers_are_drawn(trainer_of, kind, monkeypatch):
    trainer = trainer_of(kind, peft_config=LoraConfig(**{**LORA, "lora_dropout": 0.5}), rollout_engine="generate")
    assert trainer.args.disable_dropout
    kept, modes = trainer.model.generate, []

    def generate(*args, **options):
        modes.append((trainer.model.training, any(m.training for m in trainer.model.modules())))
        return kept(*args, **options)

    monkeypatch.setattr(trainer.model, "generate", generate)
    trainer.train()
    assert modes == [(False, False)] * 2
    assert trainer.model.training


def test_log_probabilities_of_engine_and_training_are_equal(trainer_of, caplog):
    for kind, config, changes in (
        ("grpo", LoraConfig(**LORA), {"temperature": 0.7, "gradient_accumulation_steps": 2}),
        ("grpo", IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]), {"beta": 0.1}),
        ("rloo", LoraConfig(**LORA, use_dora=True), {"temperature": 1.3}),
        ("rloo", PromptTuningConfig(num_virtual_tokens=3), {"top_p": 0.8}),
    ):
        trainer = trainer_of(kind, peft_config=config, rollout_engine="engine", **changes)
        trainer.train()
        assert trainer.policy.is_proved
        told = lines(trainer)
        assert len(told) == 2
        assert all(0 < line["rollouts/logprob_difference/max"] < 1e-4 for line in told)
    assert "generate" not in caplog.text


def test_a_run_that_goes_on_is_the_run_that_never_ended(trainer_of, tmp_path):
    changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "beta": 0.1, "num_iterations": 2}
    for kind in KINDS:

        def run(resume: str | None, kind: str = kind) -> Any:
            trainer = trainer_of(kind, **changes, output_dir=str(tmp_path / kind))
            trainer.train(resume_from_checkpoint=resume)
            return lines(trainer), {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

        (whole, weights), (again, others) = run(None), run(str(tmp_path / kind / "checkpoint-3"))
        assert again == whole
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_wrong_engine_ends_the_run(trainer_of, monkeypatch):
    trainer = trainer_of(rollout_engine="engine")
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.down_proj.weight.mul_(1.01)  # of the base, which the engine has packed
    with pytest.raises(PolicyMismatchError, match=r"token \d+, number \d of answer \d, has log-probability -"):
        trainer.train()
    trainer = trainer_of(rollout_engine="engine")
    draw = trainer.policy.rollouts.draw
    monkeypatch.setattr(
        trainer.policy.rollouts,
        "draw",
        lambda prompts, params, adapter, **how: draw(prompts, params, adapter=None, **how),
    )
    with pytest.raises(StaleAnswerError, match="was drawn by the base, but the adapter in training is live-"):
        trainer.train()


def test_answers_longer_than_the_cache_are_refused_before_the_first_step(trainer_of, monkeypatch, caplog):
    large = trainer_of().policy
    n_bytes = large.version().n_bytes + 4 * large.rollouts.engine.scheduler.pages.page_bytes  # 64 tokens

    def small(model: Any, tokenizer: Any, **options: Any) -> Any:
        return Rollouts(model, tokenizer, **options, kv_cache_memory_bytes=n_bytes)

    monkeypatch.setattr("veneer.learn.policy.Rollouts", small)
    assert trainer_of(rollout_engine="engine", max_completion_length=30).policy is not None
    told = r"max_completion_length=90 leaves no memory for a prompt: .* memory holds the keys and values of 64 tokens"
    with pytest.raises(ConfigError, match=told):
        trainer_of(rollout_engine="engine", max_completion_length=90)
    assert trainer_of(max_completion_length=90).policy is None
    assert "leaves no memory for a prompt" in caplog.text


def test_who_draws(trainer_of, make_model, settings, tokenizer, caplog):
    assert trainer_of(use_vllm=True).policy is not None
    assert trainer_of(rollout_engine="generate").policy is None
    with pytest.raises(ConfigError, match=r"vllm_mode='server' draws in another process.*Set vllm_mode='colocate'"):
        trainer_of(use_vllm=True, vllm_mode="server")
    assert "generate" not in caplog.text
    for changes, reason in (
        ({"temperature": 2.5}, "temperature=2.5 must be between 0 and 2"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
    ):
        caplog.clear()
        assert trainer_of(**changes).policy is None
        assert reason in caplog.text
        with pytest.raises(ConfigError, match="rollout_engine='engine': veneer's engine cannot generate"):
            trainer_of(rollout_engine="engine", **changes)
    whole = GRPOTrainer(make_model(), reward, GRPOConfig(**{**settings, **SMALL}), ROWS, processing_class=tokenizer)
    assert whole.policy is None
    assert "the base itself is trained" in caplog.text


def test_sixteen_bits_are_corrected_by_trl_and_evaluations_draw_alike(trainer_of):
    for kind in KINDS:
        trainer = trainer_of(kind, bf16=True, per_device_eval_batch_size=4)
        trainer.train()
        assert not trainer.policy.is_proved
        told = [line for line in trainer.state.log_history if "loss" in line]
        assert all(1e-4 < line["rollouts/logprob_difference/max"] < 1 for line in told)
        assert all(("sampling/importance_sampling_ratio/mean" in line) == (kind == "grpo") for line in told)
        first, second = (trainer.evaluate(ROWS.select(range(4))) for _ in range(2))
        assert first["eval_reward"] == second["eval_reward"]
        assert first["eval_loss"] == second["eval_loss"]


def test_one_copy_of_the_base_trains_as_two_do(trainer_of):
    for kind, config, changes in (
        ("grpo", LoraConfig(**LORA), {"beta": 0.1}),
        ("rloo", LoraConfig(**LORA, use_dora=True), {"beta": 0.0}),
        ("grpo", LoraConfig(**{**LORA, "init_lora_weights": "pissa"}), {}),
        ("grpo", PromptTuningConfig(num_virtual_tokens=3), {"beta": 0.1}),
        ("rloo", PrefixTuningConfig(num_virtual_tokens=3), {}),
    ):
        told = {}
        for memory in ("beside", "one"):
            trainer = trainer_of(kind, peft_config=config, rollout_engine="engine", rollout_memory=memory, **changes)
            assert is_packed(trainer.model.model.layers[0].mlp.down_proj) == (memory == "one")
            trainer.train()
            assert trainer.policy.is_proved
            told[memory] = lines(trainer)
        one, two = told["one"][0], told["beside"][0]  # an optimizer's first step makes much of rounding
        own = {name: value for name, value in one.items() if "difference" not in name}
        assert own == {name: pytest.approx(two[name], rel=1e-4, abs=1e-6) for name in own}


def test_a_base_on_packed_weights_is_restored_and_not_merged(trainer_of, make_model):
    whole = make_model().state_dict()
    trainer = trainer_of(rollout_memory="auto")
    trainer.train()
    with pytest.raises(CompositionError, match=r"has only a packed weight.*merge it into a base that is loaded anew"):
        trainer.model.merge_and_unload()
    restored = trainer.model.unload().state_dict()
    assert restored.keys() == whole.keys()
    assert all(torch.equal(restored[name], whole[name]) for name in whole)


def test_which_bases_are_kept_once(trainer_of, make_model, settings, tokenizer):
    def is_one(**changes: Any) -> bool:
        return trainer_of(**changes).rollouts_of_base is not None

    assert is_one(rollout_memory="auto")
    assert not is_one()
    assert not is_one(rollout_memory="auto", bf16=True)  # products in 16 bits are faster on the base's own weights
    assert not is_one(rollout_memory="auto", rollout_engine="generate")
    assert not is_one(rollout_memory="auto", use_transformers_continuous_batching=True)
    copies = LoraConfig(**{**LORA, "modules_to_save": ["lm_head"]})
    assert not is_one(rollout_memory="auto", peft_config=copies)
    with pytest.raises(ConfigError, match=r"is impossible: the adapter trains copies of \['lm_head'\]"):
        is_one(rollout_memory="one", peft_config=copies)
    for model in (make_model(), get_peft_model(make_model(), LoraConfig(**LORA))):
        args = GRPOConfig(**{**settings, **SMALL, "rollout_memory": "auto"})
        trainer = GRPOTrainer(model, reward, args, ROWS, processing_class=tokenizer)
        assert trainer.rollouts_of_base is None
        assert any(parameter.requires_grad for parameter in trainer.model.parameters())
        args = GRPOConfig(**{**settings, **SMALL, "rollout_memory": "one"})
        with pytest.raises(ConfigError, match=r"rollout_memory='one' is impossible.*this run has none \(peft_config\)"):
            GRPOTrainer(model, reward, args, ROWS, processing_class=tokenizer)
    with pytest.raises(ConfigError, match="rollout_memory='most' must be 'auto', 'one' or 'beside'"):
        trainer_of(rollout_memory="most")
    with pytest.raises(ConfigError, match="memory='one' packs a base without adapters"):
        Rollouts(get_peft_model(make_model(), LoraConfig(**LORA)), None, memory="one")


@pytest.mark.parametrize("memory", ["one", "beside"])
def test_transformers_draws_on_packed_weights_and_says_so(memory, trainer_of, monkeypatch, caplog):
    def refuse(*_: Any) -> Any:
        raise ConfigError("the adapter has no place")

    monkeypatch.setattr(Rollouts, "hand_over", refuse)
    trainer = trainer_of(rollout_memory=memory, max_steps=1)
    told = ", on the weights that were packed for it" if memory == "one" else ""
    assert f"slowly{told}, since veneer's engine cannot: the adapter has no place" in caplog.text
    trainer.train()


def test_members_of_a_base_that_is_packed_beside_have_its_own_weights(trainer_of, make_model, tokenizer, caplog):
    trainer = trainer_of(rollout_memory="beside", rollout_engine="generate")
    trainer.args.rollout_engine = "auto"
    trainer.rollouts_of_base = Rollouts(make_model(), tokenizer)  # of another base, which has no such adapter
    assert policy_of(trainer) is None
    assert "transformers draws the answers, slowly, since" in caplog.text
