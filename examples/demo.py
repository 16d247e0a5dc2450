"""The main job from start to end: a 4-bit base, an adapter fitted to it, the difference it makes, and the merged model.

make demo        (or: python examples/demo.py --help)
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import veneer
from veneer.plain.progress import progress_bar
from veneer.plain.units import duration

DATA = Path(__file__).parent / "calendar"
PM = re.compile(r"\d ?pm\b")
FIELDS = ("title", "date", "start", "minutes", "with", "place")
console = Console()


@dataclass(frozen=True)
class Score:
    """Answers on the held-out part: how many are JSON, which of their fields are right, how many are right in all
    fields.
    """

    answers: list[str]
    valid: float
    right: dict[str, list[bool]]
    exact: float


def main() -> None:
    options = arguments()
    transformers_logging.disable_progress_bar()  # the demo draws bars of its own
    disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it is not used here, only found by transformers
    torch.manual_seed(0)
    began = time.perf_counter()
    tokenizer, base = load_in_4bit(veneer.fetch("smollm2-135m-instruct"))
    train, held_out = (
        load_dataset("json", data_files=str(DATA / f), split="train") for f in ("train.jsonl", "heldout.jsonl")
    )

    console.rule("Before")
    before = score(base, tokenizer, held_out, "the base model answers")

    console.rule("Fitting an adapter")
    adapted = fit(base, tokenizer, train, options)
    after = score(adapted, tokenizer, held_out, "the adapted model answers")

    console.rule("What changed")
    show(before, after, held_out)
    adapted.save_pretrained(options.output / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")
    again = score(merged, tokenizer, held_out, "the merged model answers")
    same = sum(a == b for a, b in zip(after.answers, again.answers, strict=True))
    console.print(
        f"The merged model is right in every field of {again.exact:.0%} (base + adapter: {after.exact:.0%}). "
        f"{same} of its {len(held_out)} answers are the same to the letter: both compute in bfloat16, and merging "
        "changes where that rounds."
    )
    say_what_next(options.output, time.perf_counter() - began)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the adapter and the merged model")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the 320 training rows")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


def load_in_4bit(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    quantization = veneer.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    return AutoTokenizer.from_pretrained(folder, padding_side="left"), model


def fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, options: argparse.Namespace
) -> PreTrainedModel:
    model = veneer.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = veneer.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    model = veneer.get_peft_model(model, config)
    model.print_trainable_parameters()
    settings = veneer.SFTConfig(
        output_dir=str(options.output / "run"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=2,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_length=512,
        packing=True,
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = veneer.SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return model


@torch.no_grad()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, title: str) -> Score:
    """Greedy answers to every request, read as JSON and compared field by field."""
    model.eval()
    answers = []
    with progress_bar(title) as tell:
        for start in range(0, len(rows), 40):
            chats = [m[:-1] for m in rows[start : start + 40]["messages"]]
            batch = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            output = model.generate(**batch, max_new_tokens=72, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            tell(len(answers), len(rows))
    wanted = [json.loads(m[-1]["content"]) for m in rows["messages"]]
    got = [read(answer) for answer in answers]
    right = {f: [g is not None and g.get(f, ...) == w[f] for g, w in zip(got, wanted, strict=True)] for f in FIELDS}
    return Score(
        answers=answers,
        valid=sum(g is not None for g in got) / len(got),
        right=right,
        exact=sum(g == w for g, w in zip(got, wanted, strict=True)) / len(got),
    )


def read(answer: str) -> dict | None:
    """The answer as a JSON object, or None."""
    try:
        entry = json.loads(answer)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) else None


def show(before: Score, after: Score, rows: Dataset) -> None:
    table = Table(title=f"{len(rows)} held-out requests: no template and no value of theirs was trained on")
    table.add_column("")
    for name in ("base", "adapted"):
        table.add_column(name, justify="right")
    table.add_row("answers with valid JSON", f"{before.valid:.0%}", f"{after.valid:.0%}")
    for field in FIELDS:
        table.add_row(f"right {field}", *(share(each.right[field]) for each in (before, after)))
        if field == "start":
            pm = [PM.search(m[-2]["content"]) is not None for m in rows["messages"]]
            for said, of in (('said as "3 pm"', pm), ("said otherwise", [not each for each in pm])):
                shares = (share(list(compress(each.right[field], of))) for each in (before, after))
                table.add_row(f"  {sum(of)} {said}", *shares, style="dim")
    table.add_row("[bold]right in every field", f"[bold]{before.exact:.0%}", f"[bold]{after.exact:.0%}")
    table.caption = '"3 pm" has to become "15:00": so small a model often misses it'
    console.print(table)
    sides = Table(title="four of them, with real answers", show_header=False, box=box.SIMPLE, padding=(0, 1, 0, 0))
    sides.add_column(style="bold", no_wrap=True)
    sides.add_column(overflow="fold")
    for i in range(4):
        request, wanted = rows[i]["messages"][-2]["content"], rows[i]["messages"][-1]["content"]
        answers = {"base": before.answers[i], "adapted": after.answers[i], "wanted": wanted}
        sides.add_row("request", Text(request))
        for who, answer in answers.items():
            sides.add_row(who, Text(shorten(answer)), end_section=who == "wanted")
    console.print(sides)


def share(hits: list[bool]) -> str:
    return f"{sum(hits) / len(hits):.0%}"


def shorten(text: str, longest: int = 220) -> str:
    return text if len(text) <= longest else text[:longest] + " …"


def say_what_next(output: Path, seconds: float) -> None:
    console.print(f"That took {duration(seconds)} in all.\n")
    console.print("What to try next:")
    steps = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    steps.add_column(overflow="fold")
    steps.add_column(style="dim")
    steps.add_row(f"veneer chat {output}/merged", "talk to the merged model")
    steps.add_row(f"veneer info {output}/adapter", "what is in the adapter")
    steps.add_row("veneer train --print-recipe > recipe.yaml", "train on data of your own")
    console.print(steps)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the demo begins anew when it is run again; `veneer train` goes on from checkpoints")
