"""QLoRA on both trainers: the adapter learns beside 4-bit codes that stay, and a resumed run repeats the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from models import llama_config
from veneer import (
    BitsAndBytesConfig,
    LoraConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from veneer.train.show.trained import describe_trained

VOCAB = 47
ROWS = [[(i + 3 * j) % 43 + 2 for j in range(9)] for i in range(24)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    config = llama_config(intermediate_size=44, vocab_size=VOCAB, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized(base: Path) -> Any:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4))


def trainer(kind: str, base: Path, steps: int) -> Trainer:
    torch.manual_seed(4)
    model = get_peft_model(
        quantized(base), LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", lora_dropout=0.1)
    )
    common: dict[str, Any] = {
        "output_dir": str(base.parent / "run"), "max_steps": steps, "per_device_train_batch_size": 4, "save_steps": 3,
        "learning_rate": 3e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "seed": 5,
    }  # fmt: skip
    if kind == "plain":
        rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ROWS]
        return Trainer(model, TrainingArguments(**common), train_dataset=rows)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
    texts = Dataset.from_list([{"text": " ".join(f"w{i}" for i in row)} for row in ROWS])
    config = SFTConfig(bf16=True, max_length=16, packing=True, **common)
    return SFTTrainer(model, config, train_dataset=texts, processing_class=tokenizer)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_trains_saves_and_resumes(kind: str, base: Path) -> None:
    whole = trainer(kind, base, steps=6)
    codes = {name: buffer.clone() for name, buffer in whole.model.named_buffers()}
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0] - 0.05
    assert all(torch.equal(buffer, codes[name]) for name, buffer in whole.model.named_buffers())

    again = trainer(kind, base, steps=6)
    again.train(resume_from_checkpoint=str(base.parent / "run" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name

    again.save_model(str(base.parent / "adapter"))
    tensors = load_file(base.parent / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    assert all("lora_" in key and value.dtype == torch.float32 for key, value in tensors.items())
    ids = torch.tensor(ROWS[:2])
    loaded = PeftModel.from_pretrained(quantized(base), base.parent / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)


def test_the_description_counts_a_quantized_base_as_the_weights_that_it_stands_for(base: Path) -> None:
    config = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear")
    dense = AutoModelForCausalLM.from_pretrained(base)
    n_base = sum(p.numel() for p in dense.parameters())
    model = get_peft_model(quantized(base), config)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert describe_trained(model).startswith(f"trains {n_trained:,} of {n_base + n_trained:,} parameters")
    assert describe_trained(get_peft_model(dense, config)).startswith(describe_trained(model).partition(" (")[0])
