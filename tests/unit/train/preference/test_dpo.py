"""DPO against the model as it was: the first step, every method, quantized bases, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from models import llama_config
from veneer import (
    BitsAndBytesConfig,
    BottleneckConfig,
    DPOConfig,
    DPOTrainer,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from veneer.adapters.token_scores import PreferenceScoring
from veneer.errors import ConfigError, DataError
from veneer.train.preference.reference import Reference
from veneer.train.preference.scores import ScoredModel

from .conftest import LORA

METHODS = {
    "lora": LoraConfig(**{**LORA, "lora_dropout": 0.1}),
    "dora": LoraConfig(**LORA, use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "bottleneck": BottleneckConfig(size=5, dropout=0.1, init_weights="mam_adapter"),
}


def trainer_of(make_model, tokenizer, settings, pairs, config=METHODS["lora"], **options):
    model = options.pop("model", None) or make_model()
    return DPOTrainer(
        model,
        args=DPOConfig(**settings),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=config,
        **options,
    )


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_loss_is_ln_2_and_the_first_rewards_are_0(make_model, tokenizer, settings, pairs, method, fused):
    settings |= {"max_steps": 2, "fused": fused}
    trainer = trainer_of(make_model, tokenizer, settings, pairs, METHODS[method])
    trainer.train()
    first, second = lines(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert second["rewards/chosen"] != 0.0


@pytest.mark.parametrize("bf16", [True, False])
def test_the_first_step_on_a_quantized_base(make_model, tokenizer, settings, pairs, tmp_path, bf16):
    make_model().save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4)
    model = prepare_model_for_kbit_training(base)
    trainer = trainer_of(make_model, tokenizer, {**settings, "max_steps": 2, "bf16": bf16}, pairs, model=model)
    trainer.train()
    first, second = lines(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0 != second["rewards/chosen"]


@pytest.mark.parametrize(
    "config",
    [PrefixTuningConfig(num_virtual_tokens=3), PromptTuningConfig(num_virtual_tokens=3), BottleneckConfig(size=5)],
)
def test_what_starts_with_a_change_is_held_against_the_model_without_it(make_model, tokenizer, settings, pairs, config):
    trainer = trainer_of(make_model, tokenizer, {**settings, "max_steps": 2}, pairs, config)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    found = trainer.ref_model(**batch, labels=labels, fused_lm_head=True).log_probs
    plain = ScoredModel(make_model(), PreferenceScoring(details=False))(
        **batch, labels=labels, fused_lm_head=True
    ).log_probs
    torch.testing.assert_close(found, plain)
    trainer.train()
    assert len(lines(trainer)) == 2


def test_trls_own_trainer_begins_at_ln_2_in_float32(tokenizer, settings, pairs, tmp_path):
    """It loads the base again as its reference, so that rounding alone is between the two."""
    torch.manual_seed(3)
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(llama_config(**shape)).save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**LORA))
    args = trl.DPOConfig(**settings)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    first = lines(trainer)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-6


def test_an_adapter_that_was_trained_is_its_own_reference(make_model, tokenizer, settings, pairs, tmp_path):
    model = get_peft_model(make_model(), LoraConfig(**LORA, init_lora_weights=False))
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_of(make_model, tokenizer, settings, pairs, None, model=model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    before = trainer.ref_model(**batch, labels=labels, fused_lm_head=True).log_probs
    trainer.train()
    assert lines(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start)
    assert torch.equal(trainer.ref_model(**batch, labels=labels, fused_lm_head=True).log_probs, before)
    assert list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()) == []


def test_several_active_adapters_have_no_reference(make_model, tokenizer, settings, pairs):
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    model.add_adapter("second", LoraConfig(**LORA))
    model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match=r"active ones are \['default', 'second'\]: choose one with set_adapter"):
        trainer_of(make_model, tokenizer, settings, pairs, None, model=model)


def test_a_model_trained_whole_is_held_against_a_copy(make_model, tokenizer, settings, pairs):
    trainer = trainer_of(make_model, tokenizer, {**settings, "max_steps": 2, "learning_rate": 1e-3}, pairs, None)
    assert isinstance(trainer.ref_model, Reference)
    trainer.train()
    first, second = lines(trainer)
    assert first["rewards/chosen"] == 0.0 != second["rewards/chosen"]


def test_a_checkpoint_holds_the_adapter_alone_and_a_resume_repeats_the_run(make_model, tokenizer, settings, pairs):
    settings |= {
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 7,
        "logging_steps": 2,
        "disable_dropout": False,
    }
    whole = trainer_of(make_model, tokenizer, settings, pairs)
    whole.train()
    folder = whole.args.output_dir + "/checkpoint-3"
    saved = PeftModel.from_pretrained(make_model(), folder)
    assert list(saved.peft_config) == ["default"]
    counted = json.loads((Path(folder) / "veneer_progress.json").read_text())
    assert counted["metrics"]["rewards/chosen"]
    resumed = trainer_of(make_model, tokenizer, settings, pairs)
    resumed.train(resume_from_checkpoint=folder)
    skipped = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    own, expected = (
        [{k: v for k, v in line.items() if k not in skipped} for line in t.state.log_history] for t in (resumed, whole)
    )
    assert own == expected
    for (name, p), (_, q) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_dropout_is_off_unless_it_is_asked_for(make_model, tokenizer, settings, pairs):
    config = LoraConfig(**{**LORA, "lora_dropout": 0.5})
    runs = {}
    for off in (True, False):
        trainer = trainer_of(make_model, tokenizer, {**settings, "disable_dropout": off}, pairs, config)
        trainer.train()
        runs[off] = [line["loss"] for line in lines(trainer)]
        assert trainer.model.peft_config["default"].lora_dropout == 0.5
        assert trainer.model.adapter_state.drops
    plain = trainer_of(make_model, tokenizer, settings, pairs, LoraConfig(**LORA))
    plain.train()
    assert runs[True] == [line["loss"] for line in lines(plain)] != runs[False]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], r"lacks rejected: dpo trains on rows with prompt, chosen and rejected"),
        ([{"prompt": "a", "completion": "b"}], r"lacks chosen and rejected.*\(sft\)"),
        ([{"prompt": "a", "completion": "b", "label": True}], r"lacks chosen and rejected.*\(kto, sft\)"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], r"row 1: chosen and rejected are the same.*'b'"),
        ([{"prompt": "a", "chosen": "b", "rejected": ""}], r"row 1: rejected is empty"),
        ([{"prompt": "a", "chosen": None, "rejected": "b"}], r"row 1: chosen must be a string or a list.*missing"),
        ([], "the train data has no rows"),
        ([{"prompt": "a" * 90, "chosen": "b", "rejected": "c"}], r"no row of the train data fits into max_length=40"),
    ],
)
def test_rows_that_teach_nothing_are_told(make_model, tokenizer, settings, rows, message):
    data = Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
    with pytest.raises(DataError, match=message):
        trainer_of(make_model, tokenizer, {**settings, "max_length": 40}, data)


def test_settings_that_cannot_be(make_model, tokenizer, settings, pairs):
    with pytest.raises(ConfigError, match="sync_ref_model=True would move the reference"):
        DPOConfig(**settings, sync_ref_model=True)
    with pytest.raises(ConfigError, match=r"beta=-1 must be at least 0\n +.*max_length=1 leaves nothing"):
        DPOConfig(**settings, beta=-1, max_length=1)
    model = make_model()
    with pytest.raises(ConfigError, match="ref_model is the model in training"):
        trainer_of(make_model, tokenizer, settings, pairs, None, model=model, ref_model=model)
