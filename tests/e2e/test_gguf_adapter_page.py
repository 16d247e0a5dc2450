"""Commands of docs/gguf-adapter.md, on a tiny model and few rows; llama.cpp's part is played by xllamacpp."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from tests.unit.export.gguf.tiny import VOCAB, tiny_folder
from typer.testing import CliRunner

from veneer.adapters.peft_model import PeftModel
from veneer.cli.app import app
from veneer.store.source import load_model

ROOT = Path(__file__).parents[2]
IN_BRIEF = {
    "plan": ["--no-time"],
    "train": [
        "--set",
        "training.max_steps=2",
        "--set",
        "training.per_device_train_batch_size=1",
        "--set",
        "training.learning_rate=0.05",
    ],
    "eval": ["--limit", "1", "--max-new-tokens", "3"],
}
IDS = [(i * 29 + 7) % (VOCAB - 3) for i in range(23)]


def commands() -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "gguf-adapter.md").read_text(), flags=re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def llama_cpp(base: str, lora: str) -> dict[int, float]:
    """Log-probabilities of the token after `IDS`, by id."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = base
    params.n_ctx, params.n_gpu_layers, params.warmup = 256, 0, False
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = lora, 1.0
    params.lora_adapters = [adapter]
    request = {"prompt": IDS, "max_tokens": 1, "n_probs": VOCAB, "temperature": -1.0, "cache_prompt": False}
    request["logit_bias"] = [[IDS[0], 100.0]]  # a whole character is drawn; probabilities are those before the bias
    answer = xllamacpp.Server(params).handle_completions(request)
    return {each["id"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def test_the_page_leads_from_a_file_to_an_adapter_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for rows in (tmp_path / "examples" / "calendar").glob("*.jsonl"):
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    tiny_folder(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512, max_position_embeddings=1024)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    in_llama_cpp = []
    for program, *given in commands():
        if program != "veneer":
            in_llama_cpp.append(given)
            continue
        arguments = ["model" if each == "smollm2-135m-instruct" else each for each in given]
        done = CliRunner().invoke(app, arguments + IN_BRIEF.get(arguments[0], []))
        assert done.exit_code == 0, (arguments, done.output)
    [(_, base, _, lora, *_)] = in_llama_cpp
    assert Path("calendar-merged.gguf").stat().st_size > 0.9 * Path(base).stat().st_size
    theirs = llama_cpp(base, lora)
    assert len(theirs) > 200
    model = PeftModel.from_pretrained(load_model(base, dtype="float32"), "runs/calendar/adapter").eval()
    with model.disable_adapter():
        of_base = divergence(theirs, model)
    assert divergence(theirs, model) <= 0.05 * of_base  # llama.cpp rounds the inputs of products to 8 bits


@torch.no_grad()
def divergence(theirs: dict[int, float], model: PeftModel) -> float:
    ours = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    return sum(float(ours[i].exp() * (ours[i] - each)) for i, each in theirs.items())
