"""``veneer train`` for preferences and rewards, on a tiny random model: fine-tuned, preferred, rewarded, resumed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from launch import forked
from models import byte_tokenizer, llama_config
from veneer import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from veneer.cli.app import app
from veneer.train.checkpoint import checkpoints

TRAINING = {
    "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4, "bf16": False, "disable_tqdm": True,
    "save_steps": 2, "learning_rate": 0.01, "report_to": "none",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A base, pairs, labelled answers and prompts."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    config = llama_config(vocab_size=len(tokenizer), initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = {
        "pairs": [{"prompt": f"say {i} ", "chosen": "yes" + "a" * i, "rejected": "no" + "b" * i} for i in range(13)],
        "labels": [
            {"prompt": f"say {i} ", "completion": "yes" * (i % 2) + "no", "label": bool(i % 2)} for i in range(13)
        ],
        "prompts": [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(13)],
    }
    for name, made in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    return tmp_path


def write(project: Path, task: str, data: dict[str, Any], **changes: Any) -> Path:
    recipe = {
        "task": task, "model": {"source": "base"}, "adapter": {"method": "lora", "r": 3, "lora_alpha": 5}, "data": data,
        "training": TRAINING, "output": str(project / task), **changes,
    }  # fmt: skip
    path = project / f"{task}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(path: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["train", str(path), *options])
    assert result.exit_code == 0, result.output + result.stderr
    return result.output + result.stderr


def test_an_adapter_is_fine_tuned_and_then_preferred(project: Path) -> None:
    train(write(project, "sft", {"train": "labels.jsonl"}))
    parent = project / "sft" / "adapter"
    output = train(write(project, "dpo", {"train": "pairs.jsonl", "eval_fraction": 0.3}, adapter={"from": str(parent)}))
    assert "step 1/4  loss 0.6931" in output
    assert "held-out accuracy" in output
    record = json.loads((project / "dpo" / "run.json").read_text())
    assert record["parent"]["from"] == str(parent)
    assert record["parent"]["blake2b"] in (project / "dpo" / "adapter" / "README.md").read_text()
    names = sorted(path.name for path in (project / "dpo" / "adapter").iterdir() if path.suffix == ".safetensors")
    assert names == ["adapter_model.safetensors"]
    assert record["log"][0]["rewards/chosen"] == 0.0 != record["log"][3]["rewards/chosen"]


def test_an_adapter_of_the_hub_is_trained_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(project / "base"), lora)
    repository = project / "hub" / "models--someone--tuned"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    tuned.save_pretrained(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pairs = {"train": "pairs.jsonl"}
    output = train(write(project, "dpo", pairs, adapter={"from": "someone/tuned"}))
    assert "step 1/4  loss 0.6931" in output
    record = json.loads((project / "dpo" / "run.json").read_text())
    assert record["parent"]["from"] == "someone/tuned"
    assert "someone/tuned" in (project / "dpo" / "adapter" / "README.md").read_text()
    result = CliRunner().invoke(app, ["train", str(write(project, "kto", pairs, adapter={"from": "someone/other"}))])
    assert result.exit_code == 2
    assert "no adapter 'someone/other': no such folder, and not on the hub" in result.output + result.stderr


def test_samples_show_what_a_task_trains(project: Path) -> None:
    shown = {
        "dpo": ({"train": "pairs.jsonl"}, ["chosen:", "say 0 【yes<|end|>】", "rejected:", "【no<|end|>】"]),
        "kto": ({"train": "labels.jsonl"}, ["not wanted:", "say 0 【no<|end|>】"]),
        "reward": ({"train": "pairs.jsonl"}, ["chosen, which is to score higher:", "say 0 yes<|end|>", "tokens"]),
    }
    for task, (data, parts) in shown.items():
        output = train(write(project, task, data), "--show-sample")
        for part in parts:
            assert part in output, (task, part)
    data = {"train": "prompts.jsonl", "prompt": "What is {question}?", "chat": True}
    training = {**TRAINING, "num_generations": 2}
    output = train(write(project, "grpo", data, rewards=["exact-match"], training=training), "--show-sample")
    assert "the prompt, to which the model's own answers are rewarded:" in output
    assert "<|user|>What is 0+1?<|end|><|assistant|>\n\n" in output
    short = {**TRAINING, "max_length": 3}
    path = write(project, "dpo", {"train": "pairs.jsonl"}, training=short)
    result = CliRunner().invoke(app, ["train", str(path), "--show-sample"])
    assert result.exit_code == 2
    assert "the first row does not fit into max_length=3 tokens" in result.output + result.stderr


def test_kto_and_its_labels(project: Path) -> None:
    output = train(write(project, "kto", {"train": "labels.jsonl"}))
    assert "step 1/4  loss 0.5000" in output


def test_a_reward_model_is_saved_with_its_head(project: Path) -> None:
    output = train(write(project, "reward", {"train": "pairs.jsonl", "eval_fraction": 0.3}))
    assert "score ×1" in output
    assert output.count("not planned: task reward is not planned") == 1
    assert output.index("not planned: ") < output.index("score ×1")
    assert "held-out accuracy" in output
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(project / "reward" / "adapter", num_labels=1)
    saved = load_file(project / "reward" / "adapter" / "adapter_model.safetensors")
    (head,) = (value for key, value in saved.items() if "score" in key)
    states = torch.randn(5, 24)
    torch.testing.assert_close(loaded.score(states), states @ head.T)


def test_grpo_with_rewards_by_name(project: Path) -> None:
    (project / "own.py").write_text(
        "def sums(completions, **row):\n    return [sum(map(ord, c)) % 97 / 50 for c in completions]\n"
    )
    training = {**TRAINING, "num_generations": 2, "max_completion_length": 5, "beta": 0.1, "max_steps": 3}
    rewards = ["own.py:sums", {"function": "length", "target": 3, "weight": 0.5}]
    data = {"train": "prompts.jsonl", "prompt": "What is {question}? "}
    train(write(project, "grpo", data, rewards=rewards, training=training))
    log = json.loads((project / "grpo" / "run.json").read_text())["log"]
    assert log[0]["kl"] == 0.0 != log[2]["kl"]
    assert {"rewards/sums/mean", "rewards/length/mean"} <= log[0].keys()


def test_dpo_killed_and_resumed_is_the_run_that_was_not(project: Path) -> None:
    training = {**TRAINING, "max_steps": 12, "save_steps": 1, "logging_steps": 4}
    path = write(project, "dpo", {"train": "pairs.jsonl"}, training=training)
    command, environment = ["train", str(path)], {"HF_HUB_OFFLINE": "1"}
    process = forked(command, project / "log", environment, slow=True)
    while process.is_alive() and len(checkpoints(project / "dpo")) == 0:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (project / "log").read_text()
    for options in (["--resume"], ["--set", f"output={project / 'whole'}"]):
        process = forked([*command, *options], project / "log", environment, slow=False)
        process.join()
        assert process.exitcode == 0, (project / "log").read_text()
    weights = [(project / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "dpo")]
    assert weights[0] == weights[1]
    logs = [json.loads((project / name / "run.json").read_text())["log"] for name in ("whole", "dpo")]
    kept = [[{k: v for k, v in line.items() if not k.startswith(("train_", "total_"))} for line in log] for log in logs]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("task", ["grpo", "rloo", "best_of"])
def test_rollouts_are_shown_before_a_run_and_after_it(project: Path, task: str) -> None:
    def told(*command: Any, status: int = 0) -> str:
        found = CliRunner().invoke(app, [*map(str, command)])
        assert found.exit_code == status, found.output
        return found.output

    data = {"train": "prompts.jsonl", "prompt": "{question}"}
    settings = {**TRAINING, "num_generations": 2, "max_completion_length": 7}
    reward = [{"function": "length", "target": 3}]
    for engine in ("auto", "generate"):
        path = write(project, task, data, training=settings, rewards=reward, rollouts={"engine": engine})
        found = told("train", path, "--show-rollouts", 3)
        assert found.count("step 0, row ") == 4
        assert "prompt: 1+1\n" in found
        assert "4 answers to 2 prompts: reward " in found
        assert not (project / task).exists()
    path = write(project, task, data, training=settings, rewards=[{"function": "regex", "pattern": "never here"}])
    assert "0 of 2 groups have different rewards\nAnswers of equal rewards teach nothing" in told(
        "train", path, "--show-rollouts", 4
    )
    assert "must be at least 1" in told("train", path, "--show-rollouts", 0, status=2)
    sft = write(project, "sft", {"train": "pairs.jsonl"})
    assert "task sft draws no answers to learn from" in " ".join(
        told("train", sft, "--show-rollouts", 4, status=2).split()
    )
    path = write(project, task, data, training=settings, rewards=reward)
    train(path)
    assert told("samples", project / task, "--step", 3, "--limit", 1).startswith("step 3, row 0 · reward ")


def calls_tools(project: Path) -> None:
    """Give the base a template that writes calls of tools, and say how they are read."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (project / "chat.jinja").write_text(template)
    config = json.loads((project / "base" / "tokenizer_config.json").read_text())
    call = {
        "open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    }  # fmt: skip
    content = {"close_pattern": r"<\|end\|>\s*", "content": "text"}
    config["response_template"] = {
        "defaults": {"role": "assistant"}, "start_anchor": "<|assistant|>",
        "fields": {"tool_calls": call, "content": content},
    }  # fmt: skip
    (project / "base" / "tokenizer_config.json").write_text(json.dumps(config))


def test_conversations_of_a_recipe(project: Path) -> None:
    calls_tools(project)
    (project / "game.py").write_text(
        "class Game:\n"
        "    def reset(self, **row):\n        self.calls = 0\n        return ' go ' + row['answer']\n"
        "    def add(self, a: int) -> int:\n"
        "        '''Add.\n\n        Args:\n            a: A number.\n        '''\n"
        "        self.calls += 1\n        return a + 7\n"
        "    def get_reward(self):\n        return float(self.calls)\n"
    )
    data = {"train": "prompts.jsonl", "prompt": "{question}", "chat": True, "chat_template": "chat.jinja"}
    forced = r'<tool_call>\{"name": "(add|lost)", "arguments": \{"a": [0-9]\}\}</tool_call>'
    training = {
        **TRAINING, "max_steps": 2, "num_generations": 2, "max_completion_length": 200, "use_vllm": True,
        "vllm_structured_outputs_regex": forced, "max_tool_calling_iterations": 1,
    }  # fmt: skip
    train(write(project, "grpo", data, training=training, environment="game.py:Game"))
    lines = [json.loads(line) for line in (project / "grpo" / "rollouts" / "0_of_1.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 4
    assert {line["calls"] for line in lines} == {1}
    assert all(line["observation"].startswith(" go ") for line in lines)
    assert all(line["reward"] == 1 - line["failures"] for line in lines)
    assert any(message["role"] == "tool" for message in lines[0]["completion"])
    for task, changes, told in (
        ("rloo", {"rewards": ["exact-match"], "environment": "game.py:Game"}, "environment: belongs to task grpo"),
        ("grpo", {"environment": "game.py:Chess"}, "has no function 'Chess'; it has"),
        (
            "grpo",
            {"tools": ["add"], "rewards": ["exact-match"]},
            "tools: 'add' names no function: write module:function",
        ),
    ):
        path = write(project, task, data, output=str(project / "other"), **changes)
        result = CliRunner().invoke(app, ["train", str(path)])
        assert result.exit_code == 2
        assert told in " ".join((result.output + result.stderr).split())
