"""Trains a tiny random model with dropout: ``train_tiny.py FOLDER STEPS [--resume] [--slow]``."""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback, TrainerState

from veneer import LoraConfig, SFTConfig, SFTTrainer

WORDS = [f"w{i}" for i in range(53)]


class Slow(TrainerCallback):
    """Leaves time to be killed in, more in each step: the run does not end before its killer has looked."""

    def on_step_end(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        time.sleep(0.1 * 1.2**state.global_step)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<end>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>")


def main(folder: Path, steps: int, options: list[str]) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(2, 19, (29,), generator=generator).tolist()
    rows = [" ".join(WORDS[i] for i in torch.randint(0, 53, (n,), generator=generator)) for n in lengths]
    torch.manual_seed(7)
    shape = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(**shape, num_key_value_heads=1, vocab_size=59, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    args = SFTConfig(
        str(folder),
        max_steps=steps,
        packing=True,
        max_length=23,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=1,
        save_total_limit=3,
        load_best_model_at_end=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"text": row} for row in rows])
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_config(config),
        args,
        train_dataset=data.select(range(24)),
        eval_dataset=data.select(range(24, 29)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=3, lora_alpha=5, lora_dropout=0.3, target_modules="all-linear"),
        callbacks=[Slow()] if "--slow" in options else [],
    )
    trainer.train(resume_from_checkpoint="--resume" in options)
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
