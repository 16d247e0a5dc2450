"""What a process that trains holds beside its model: a small run, planned and carried out in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from veneer.errors import ConfigError
from veneer.model.memory import high_water
from veneer.plan.machine import START, Rates
from veneer.plan.plan import plan_recipe
from veneer.train.recipe.recipe import Recipe, parse_recipe
from veneer.train.run import run_recipe

_N_WORDS, _LENGTH, _N_ROWS = 64, 32, 8
_COMMAND = (sys.executable, "-m", "veneer.plan.start")
_OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""Names of the environment by which a process would wait for others of its group."""


def start_bytes(rates: Rates) -> int:
    """Bytes of a process that has planned and trained a tiny model: interpreter, libraries, what a run keeps."""
    return int(rates.once(START, _start_bytes))


@contextmanager
def start_measured(rates: Rates) -> Iterator[None]:
    """Measure `start_bytes`, where they are not known, beside what is done within; an error there ends it."""
    if START in rates.known:
        yield
        return
    process = _beginning()
    try:
        yield
    except BaseException:
        process.kill()
        process.communicate()
        _beginning.cache_clear()
        raise


@cache
def _beginning() -> subprocess.Popen[str]:
    """The process that `_start_bytes` measures, begun once."""
    alone = {name: value for name, value in os.environ.items() if name not in _OF_A_GROUP}
    return subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone)


@cache
def _start_bytes() -> float:
    out, told = _beginning().communicate()
    try:
        return float(out.split()[-1])
    except (IndexError, ValueError) as error:
        raise ConfigError(f"a process could not be measured: {told.strip()[-300:]}") from error


def small_run(folder: Path) -> Recipe:
    """A recipe of two steps on the CPU, with a model, a tokenizer and rows of its own in a folder."""
    words = {f"w{number}": number for number in range(_N_WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w2").save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=_N_WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    row = json.dumps({"text": " ".join(["w3 w5 w7"] * _LENGTH)})
    (folder / "rows.jsonl").write_text(f"{row}\n" * _N_ROWS, encoding="utf-8")
    return parse_recipe({
        "model": {"source": str(folder / "model")}, "data": {"train": str(folder / "rows.jsonl")},
        "adapter": {"method": "lora", "r": 4}, "output": str(folder / "run"),
        "training": {"max_length": _LENGTH, "per_device_train_batch_size": 2, "max_steps": 2, "use_cpu": True},
    })  # fmt: skip


def main() -> None:
    """Print the bytes at the end of a small run that was planned first, as `veneer train` does."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = small_run(Path(folder))
        plan_recipe(recipe)
        run_recipe(recipe)
    print(high_water())


if __name__ == "__main__":
    main()
