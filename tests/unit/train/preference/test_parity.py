"""Losses, gradients and rewards of every trainer are those of TRL with PEFT's adapters."""

from __future__ import annotations

import peft
import pytest
import trl
from datasets import Dataset
from transformers import LlamaForSequenceClassification

import veneer

from .conftest import LORA

COMMON = ("loss", "grad_norm", "num_tokens", "entropy")
DPO = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logits/chosen", "logits/rejected", "logps/chosen")
UNPAIRED = [
    {"prompt": f"say {i} ", "completion": ("yes " if i % 3 else "no") + "a" * i, "label": bool(i % 3)} for i in range(9)
]


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


# An RLOO loss is a sum of advantages (below 2) that cancel to 0 but for the rounding of each answer's log-probability:
# for about 32 nats in float32, two steps of 3.8e-6 between the passes of old and new policy.
CANCELLED = 1e-5


def alike(ours, theirs, keys, loss=2e-6):
    assert len(ours) == len(theirs) > 1
    assert set(keys) <= theirs[0].keys()
    for own, other in zip(ours, theirs, strict=True):
        for key in other.keys() & keys:
            assert own[key] == pytest.approx(other[key], rel=2e-4, abs=loss if key == "loss" else 2e-6), key


def both(kind, settings, make_model, tokenizer, options, own=None, prepare=lambda trainer: None, **changes):
    """The log lines of veneer's trainer and of TRL's, which starts from the adapter of PEFT with the same values."""
    own_config, trl_config = getattr(veneer, f"{kind}Config"), getattr(trl, f"{kind}Config")
    sequential = {"train_sampling_strategy": "sequential"} if kind not in ("GRPO", "RLOO") else {}
    runs, start = [], {}
    for trainer_class, config, lora in (
        (getattr(veneer, f"{kind}Trainer"), own_config, veneer.LoraConfig),
        (getattr(trl, f"{kind}Trainer"), trl_config, peft.LoraConfig),
    ):
        args = config(**{**settings, **sequential, **changes, **({} if runs else own or {})})
        task = {"task_type": "SEQ_CLS"} if kind == "Reward" else {}
        model = make_model(LlamaForSequenceClassification) if kind == "Reward" else make_model()
        trainer = trainer_class(
            model, args=args, processing_class=tokenizer, peft_config=lora(**LORA, **task), **options
        )
        if runs:
            peft.set_peft_model_state_dict(trainer.model, start)
        else:
            start = {k: v.clone() for k, v in veneer.get_peft_model_state_dict(trainer.model).items()}
        prepare(trainer)
        trainer.train()
        runs.append(lines(trainer))
    return runs


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_type": ["ipo", "sft"], "loss_weights": [0.7, 0.3]},
        {"use_weighting": True, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {"ld_alpha": 0.3, "precompute_ref_log_probs": True},
        {"max_length": 11, "gradient_checkpointing": True},
    ],
)
def test_dpo(settings, make_model, tokenizer, pairs, changes, fused):
    data, own = {"train_dataset": pairs}, {"fused": fused}
    alike(*both("DPO", settings, make_model, tokenizer, data, own, **changes), (*COMMON, *DPO))


def test_dpo_of_conversations_with_an_implicit_prompt(settings, make_model, tokenizer):
    turns = [{"role": "user", "content": "say it"}]
    rows = [
        {
            key: [*turns, {"role": "assistant", "content": f"{word} {i}"}]
            for key, word in (("chosen", "yes"), ("rejected", "no no"))
        }
        for i in range(9)
    ]
    data = {"train_dataset": Dataset.from_list(rows)}
    alike(*both("DPO", settings, make_model, tokenizer, data), (*COMMON, *DPO))


@pytest.mark.parametrize("changes", [{}, {"loss_type": "apo_zero_unpaired"}])
def test_kto(settings, make_model, tokenizer, changes):
    data = {"train_dataset": Dataset.from_list(UNPAIRED)}
    ours, theirs = both("KTO", settings, make_model, tokenizer, data, **changes)
    alike(ours, theirs, ("loss", "grad_norm", "num_tokens", "kl"))


def test_reward(settings, make_model, tokenizer, pairs):
    ours, theirs = both("Reward", settings, make_model, tokenizer, {"train_dataset": pairs})
    alike(ours, theirs, ("loss", "grad_norm", "num_tokens", "accuracy", "margin", "min_reward"))


def rewards(completions, completion_ids, **row):
    """Different for most answers: advantages of equal ones would be rounding, which Adam makes steps of."""
    return [sum(ids) % 11 / 7 for ids in completion_ids]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("GRPO", {}),
        ("GRPO", {"beta": 0.04, "num_iterations": 2, "temperature": 0.8}),
        ("GRPO", {"entropy_coef": 0.02}),
        ("GRPO", {"steps_per_generation": 2, "loss_type": "dr_grpo"}),
        ("RLOO", {"beta": 0.04}),
    ],
)
@pytest.mark.parametrize("engine", [True, False])
def test_grpo_and_rloo(settings, make_model, tokenizer, kind, changes, engine):
    """With the engine, TRL is given the answers that it drew."""
    rows = Dataset.from_list([{"prompt": f"say {i} " + "x" * (i % 3)} for i in range(11)])
    changes = {"per_device_train_batch_size": 6, "num_generations": 3, "max_completion_length": 7, **changes}
    data = {"train_dataset": rows, "reward_funcs": rewards}
    drawn = []

    def prepare(trainer):
        turn = trainer._generate_single_turn
        if isinstance(trainer, (veneer.GRPOTrainer, veneer.RLOOTrainer)):
            trainer._generate_single_turn = lambda *args, **how: drawn.append(turn(*args, **how)) or drawn[-1]
        else:
            trainer._generate_single_turn = lambda *_, **__: (drawn.pop(0)[0], None) if kind == "GRPO" else drawn.pop(0)

    own, how = ({"rollout_engine": "engine"}, prepare) if engine else ({"rollout_engine": "generate"}, lambda _: None)
    ours, theirs = both(kind, settings, make_model, tokenizer, data, own, how, **changes)
    kl = ("kl",) if changes.get("beta") else ()
    loss = CANCELLED if kind == "RLOO" else 2e-6
    alike(ours, theirs, ("loss", "grad_norm", "reward", "completions/mean_length", *kl), loss)
