"""lm-evaluation-harness measures an adapted model as it stands: its accuracy and likelihoods are ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from models import byte_tokenizer, llama_config
from veneer import LoraConfig, get_peft_model
from veneer.evaluate.accuracy import ScoredChoice
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import log_probabilities

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["bad", "good"]
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def test_it_runs_on_an_adapted_model_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"prompt": f"text {i}:", "label": i % 2} for i in range(11)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    torch.manual_seed(3)
    config = llama_config(vocab_size=260, initializer_range=0.3, eos_token_id=0, bos_token_id=None)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data.normal_(0, 0.4)
    tokenizer = byte_tokenizer()
    harness = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model=harness, tasks=["tiny_choice"], task_manager=tasks, bootstrap_iters=0)
    completed = [{"prompt": row["prompt"], "completion": (" bad", " good")[row["label"]]} for row in rows]
    asked = ScoredChoice.of(tokenizer, QuestionReader(tokenizer=tokenizer).read(completed), ("bad", "good"))
    told = [resp[0][0] for sample in found["samples"]["tiny_choice"] for resp in sample["resps"]]
    scores = log_probabilities(model, asked.items)
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(asked.judged(scores).value)
    sums = [float(values.sum()) for values in scores]
    assert told == pytest.approx(sums, rel=1e-3)
    with model.disable_adapter():
        assert told != pytest.approx([float(v.sum()) for v in log_probabilities(model, asked.items)], rel=1e-3)
