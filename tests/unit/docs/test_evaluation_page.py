"""The examples of docs/evaluation.md run as they stand there, and its table names the settings of the metrics."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from models import byte_tokenizer, llama_config
from veneer import LoraConfig, get_peft_model
from veneer.evaluate import metric

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    base = LlamaForCausalLM(llama_config(vocab_size=260, initializer_range=0.3, eos_token_id=0, bos_token_id=None))
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    adapted.save_pretrained(tmp_path / "runs" / "first" / "adapter")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)), {})
    told = capsys.readouterr().out
    assert re.match(r"\d+% of 2 rows, 95% interval \(0\.\d+, \d\.\d+\)\n\('", told)
    assert re.search(r"[+-]\d+\.\d{3} nats a token, p = [01]\.\d{3}\n\d rows are right with the adapter alone\n", told)
    assert told.endswith("\n0.0\n")  # what this model says is no mood


def test_the_table_names_the_settings() -> None:
    rows = re.findall(r"^\| (?:`\"(.*?)\"`|none.*?) \| `(\w+)` \| (.*?) \|", PAGE, flags=re.M)
    assert [kind for _, kind, _ in rows] == [each.__name__ for each in metric.METRICS.values()]
    for name, kind, told in rows:
        each = getattr(metric, kind)
        own = {field.name for field in dataclasses.fields(each)}
        inherited = {
            field.name
            for base in each.__bases__
            if dataclasses.is_dataclass(base)
            for field in dataclasses.fields(base)
        }
        assert set(re.findall(r"`([a-z_]+)`", told)) == own - inherited
        assert name in (each.name, "")
