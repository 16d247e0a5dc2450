"""Serving on SmolLM2-135M-Instruct: `LLM`, and `veneer serve` as a process that the openai client asks."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from multiprocessing import Process
from pathlib import Path

import openai
import pytest
import torch

from launch import forked
from patience import PATIENCE
from veneer import (
    LLM,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    LoRARequest,
    PeftModel,
    PrefixTuningConfig,
    SamplingParams,
    StructuredOutputsParams,
    get_peft_model,
)
from veneer.store.known import model_folder
from veneer.store.source import load_model

pytestmark = pytest.mark.model
NAME = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CONFIGS = {
    "lora": lambda: LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "dora": lambda: LoraConfig(r=3, use_dora=True, target_modules=["v_proj", "o_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "bottleneck": lambda: BottleneckConfig(reduction_factor=16),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    base = load_model(NAME, dtype="float32")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = get_peft_model(base, config())
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter += 0.03 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        base = model.unload()
    return folder


@pytest.fixture(scope="module")
def llm() -> LLM:
    """In float32: in bfloat16 the first token of an answer is tied with another."""
    return LLM(model_folder(NAME), dtype="float32", enable_lora=True, max_loras=16, max_lora_rank=64)


def test_each_answer_is_what_generate_gives(adapters: Path, llm: LLM) -> None:
    model = load_model(NAME, dtype="float32")
    for name in CONFIGS:
        model = PeftModel.from_pretrained(model, adapters / name, adapter_name=name)
    tokenizer, n = llm.get_tokenizer(), 4
    prompts = ["The capital of France is", "Once upon a time", "def fib(n):", "1, 2, 3,", "Dear Sir,", "The sky"]
    names = ["__base__", *CONFIGS]
    requests = [None, *(LoRARequest(name, i, str(adapters / name)) for i, name in enumerate(CONFIGS, start=1))]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=n), lora_request=requests, use_tqdm=False)
    for prompt, name, output in zip(prompts, names, outputs, strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            expected = model.generate(
                **given, max_new_tokens=n, do_sample=False, adapter_names=[name], pad_token_id=tokenizer.eos_token_id
            )
        assert output.outputs[0].token_ids == expected[0, given.input_ids.shape[1] :].tolist(), name


def test_chat_and_a_form(llm: LLM) -> None:
    [answer] = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert answer.outputs[0].text == "The capital of France is Paris."
    assert (answer.outputs[0].finish_reason, answer.outputs[0].stop_reason) == ("stop", None)
    choices = ["London", "Paris", "Rome"]
    form = StructuredOutputsParams(choice=choices)
    [picked] = llm.chat(QUESTION, SamplingParams(temperature=0, structured_outputs=form), use_tqdm=False)
    assert picked.outputs[0].text in choices  # which, is the model's affair
    assert picked.outputs[0].finish_reason == "stop"


def test_several_tokens_a_step_give_the_same_answers(llm: LLM) -> None:
    """A text that its prompt repeats, a form, and prose that is drawn: in one crowd, and by fewer steps alone."""
    text = "The old mill by the river had seven windows, and each of them looked at another hill.\n"
    form = StructuredOutputsParams(
        json={
            "type": "object", "properties": {"nationality": {"type": "string", "maxLength": 5}},
            "required": ["nationality"], "additionalProperties": False,
        }
    )  # fmt: skip
    prompts = [text * 3 + text[:20], "An Austrian as JSON: ", "Once upon a time"]
    params = [
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=form, logprobs=2),
        SamplingParams(temperature=1, seed=3, max_tokens=20, repetition_penalty=1.2),
    ]
    expected = [output.outputs for output in llm.generate(prompts, params, use_tqdm=False)]
    speculative = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    drafts = LLM(model_folder(NAME), dtype="float32", speculative_config=speculative, disable_log_stats=False)
    outputs = drafts.generate(prompts, params, use_tqdm=False)
    assert [output.outputs for output in outputs] == expected
    accepted = [output.metrics.num_accepted_tokens for output in outputs if output.metrics is not None]
    assert accepted[0] > 10
    assert accepted[1] >= 2  # "nationality" is three tokens or more


def test_the_command_serves_the_openai_client(adapters: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve", NAME, "--adapters", str(adapters), "--port", str(port)]
    command += ["--dtype", "float32"]  # in bfloat16 the first token of the answer is tied with another
    process = forked(command, tmp_path / "log", {})
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [card.id for card in client.models.list().data] == [NAME, *sorted(CONFIGS)]
        answer = client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=12)
        assert answer.choices[0].message.content == "The capital of France is Paris."
        stream = client.chat.completions.create(
            model=NAME, messages=QUESTION, temperature=0, max_tokens=12, stream=True
        )
        assert "".join(part.choices[0].delta.content or "" for part in stream) == "The capital of France is Paris."
        adapted = client.completions.create(model="dora", prompt="Dear", temperature=0, max_tokens=3)
        assert adapted.usage is not None
        assert adapted.usage.completion_tokens == 3
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(PATIENCE)
    assert process.exitcode == 130
    assert "Traceback" not in (tmp_path / "log").read_text()


def _wait_for(url: str, process: Process) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.is_alive():
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError("the server did not come up")
