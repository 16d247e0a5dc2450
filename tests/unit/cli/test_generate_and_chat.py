"""Answers: what is generated, what is asked of the model, and what a user is told when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import Result

from veneer import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from veneer.adapters.chosen import ModelParts
from veneer.cli import loading
from veneer.errors import ConfigError

Veneer = Callable[..., Result]


def answer(folder: Path, text: str, n: int, adapter: Path | None = None) -> str:
    """The answer of the model, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def generated(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout.removesuffix("\n")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_float32_is_pointed_out_where_16_bits_are_slow(
    veneer: Veneer, model_folder: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.ops.matmul.float32_is_faster", lambda: True)
    shutil.copytree(model_folder, tmp_path / "narrow")
    AutoModelForCausalLM.from_pretrained(model_folder).bfloat16().save_pretrained(tmp_path / "narrow")
    (tmp_path / "data.txt").write_text("a text")
    said = veneer("eval", tmp_path / "narrow", "-d", tmp_path / "data.txt", "-m", "perplexity", "--dtype", dtype)
    assert said.exit_code == 0, said.output
    assert ("--dtype float32" in said.stderr) == (dtype == "auto")


def test_greedy_generation_is_that_of_transformers(veneer: Veneer, model_folder: Path) -> None:
    wanted = answer(model_folder, "<|user|>hi<|end|><|assistant|>", 13)
    assert generated(veneer("generate", model_folder, "-p", "hi", "--max-new-tokens", 13)) == wanted
    assert generated(veneer("generate", model_folder, "-p", "-", "--max-new-tokens", 13, input="hi")) == wanted


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_what_a_checkpoint_says_of_searching_does_not_count(
    veneer: Veneer, model_folder: Path, tmp_path: Path, temperature: float
) -> None:
    shutil.copytree(model_folder, tmp_path / "beams")
    settings = {"num_beams": 3, "repetition_penalty": 1.7 if temperature == 0 else 1.0}
    (tmp_path / "beams" / "generation_config.json").write_text(json.dumps(settings))
    command = ("-p", "hi", "--raw", "--max-new-tokens", 15, "--temperature", temperature, "--seed", 3)
    wanted = generated(veneer("generate", model_folder, *command))
    assert generated(veneer("generate", tmp_path / "beams", *command)) == wanted


def test_raw_and_system_prompts(veneer: Veneer, model_folder: Path) -> None:
    raw = veneer("generate", model_folder, "-p", "hi", "--raw", "--max-new-tokens", 9)
    assert generated(raw) == answer(model_folder, "hi", 9)
    system = veneer("generate", model_folder, "-p", "hi", "--system", "be", "--max-new-tokens", 9)
    assert generated(system) == answer(model_folder, "<|system|>be<|end|><|user|>hi<|end|><|assistant|>", 9)
    refused = veneer("generate", model_folder, "-p", "hi", "--system", "be", "--raw")
    assert (refused.exit_code, "needs a chat template" in refused.stderr) == (2, True)


def test_an_empty_answer_hints_at_raw(veneer: Veneer, model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are as likely: the end, the first of them, is taken
    shutil.copytree(model_folder, tmp_path / "silent")
    model.save_pretrained(tmp_path / "silent")
    asked = veneer("generate", tmp_path / "silent", "-p", "hi", "--max-new-tokens", 9)
    assert (asked.exit_code, asked.stdout.strip()) == (0, "")
    assert asked.stderr.count("--raw") == 1
    assert "--raw" not in veneer("generate", tmp_path / "silent", "-p", "hi", "--raw", "--max-new-tokens", 9).stderr
    assert "--raw" not in veneer("generate", model_folder, "-p", "hi", "--max-new-tokens", 9).stderr


def test_an_adapter_changes_the_answer_and_may_stand_for_the_model(
    veneer: Veneer, model_folder: Path, adapter_folder: Path
) -> None:
    wanted = answer(model_folder, "<|user|>hi<|end|><|assistant|>", 13, adapter_folder)
    assert wanted != answer(model_folder, "<|user|>hi<|end|><|assistant|>", 13)
    for arguments in ([model_folder, "--adapter", adapter_folder], [adapter_folder]):
        assert generated(veneer("generate", *arguments, "-p", "hi", "--max-new-tokens", 13)) == wanted


def test_an_adapter_of_a_larger_vocabulary_brings_its_tokenizer(
    veneer: Veneer, model_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<red>", "<blue>"])
    base.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(base, LoraConfig(r=3, modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        model.lm_head.weight += torch.randn_like(model.lm_head.weight)  # so that the new tokens are said
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = tokenizer("hi <red>", return_tensors="pt").input_ids
    output = model.eval().generate(ids, max_new_tokens=13, do_sample=False)
    wanted = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    command = ("-p", "hi <red>", "--raw", "--max-new-tokens", 13)
    assert generated(veneer("generate", model_folder, "-a", tmp_path / "adapter", *command)) == wanted


def test_sampling_follows_the_seed(veneer: Veneer, model_folder: Path) -> None:
    def sample(seed: int, *more: object) -> str:
        common = ("generate", model_folder, "-p", "hi", "--temperature", 1.5, "--max-new-tokens", 12)
        return generated(veneer(*common, "--seed", seed, *more))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    greedy = answer(model_folder, "<|user|>hi<|end|><|assistant|>", 12)
    assert sample(3) != greedy
    assert sample(3, "--top-k", 1) == greedy
    assert sample(3, "--top-p", 1e-9) == greedy


def test_the_answer_stops_at_the_end_of_the_context(veneer: Veneer, model_folder: Path) -> None:
    prompt = "x" * 120
    result = veneer("generate", model_folder, "-p", prompt, "--raw", "--max-new-tokens", 500)
    assert generated(result) == answer(model_folder, prompt, 11)
    too_long = veneer("generate", model_folder, "-p", "x" * 131, "--raw")
    assert (too_long.exit_code, "131 tokens and the model's context holds 131" in too_long.stderr) == (2, True)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_take_room_in_the_context(
    veneer: Veneer, model_folder: Path, tmp_path: Path, config: Any
) -> None:
    sizes = {"vocab_size": 260, "n_embd": 48, "n_layer": 1, "n_head": 3, "n_positions": 31}
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    base.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "gpt2")
    model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=7))
    model.save_pretrained(tmp_path / "front")
    command = ("generate", tmp_path / "gpt2", "-a", tmp_path / "front", "--raw", "--max-new-tokens", 500)
    assert veneer(*command, "-p", "x" * 20).exit_code == 0
    too_long = veneer(*command, "-p", "x" * 24)
    assert (too_long.exit_code, "24 tokens and the model's context holds 24" in too_long.stderr) == (2, True)


def test_an_empty_prompt_is_refused(veneer: Veneer, model_folder: Path) -> None:
    result = veneer("generate", model_folder, "-p", "", "--raw")
    assert (result.exit_code, "prompt is empty" in result.stderr) == (2, True)


def test_dtype_is_the_one_asked_for(veneer: Veneer, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr("veneer.cli.loading.answerer_of", lambda parts, *rest: seen.append(parts.base.dtype))
    veneer("generate", model_folder, "-p", "hi", "--dtype", "bfloat16")
    assert seen == [torch.bfloat16]
    result = veneer("generate", model_folder, "-p", "hi", "--dtype", "int3")
    assert (result.exit_code, "allowed: auto" in result.stderr) == (2, True)


@pytest.mark.parametrize("verb", [("generate", "-p", "hi"), ("chat",)])
def test_what_is_wrong_is_one_message(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, other_adapter: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        ("./nowhere",): "no such folder or file",
        (tmp_path / "empty",): "holds no config.json",
        (model_folder, "--adapter", tmp_path / "nowhere"): "there is no such folder",
        (model_folder, "--adapter", tmp_path / "empty"): "holds no adapter_config.json",
        (model_folder, "--adapter", other_adapter): "does not fit the model",
        (adapter_folder, "--adapter", other_adapter): "give the base as MODEL",
    }
    for arguments, message in cases.items():
        result = veneer(verb[0], *arguments, *verb[1:])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_a_damaged_adapter_is_told_alike_by_every_verb(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(adapter_folder, folder)
    file = folder / "adapter_model.safetensors"
    whole = file.stat().st_size
    os.truncate(file, whole - 1234)
    told = (
        f"error: {file} is damaged or was cut off (it holds {whole - 1234:,} bytes, but its header describes "
        f"{whole:,}: it is truncated); save or download it again\n"
    )
    for arguments in (("info", folder), ("generate", folder, "-p", "hi"), ("inspect", folder)):
        result = veneer(*arguments)
        assert (result.exit_code, result.stderr) == (2, told)


def test_an_adapter_that_names_no_base_asks_for_it(veneer: Veneer, other_adapter: Path) -> None:
    result = veneer("generate", other_adapter, "-p", "hi")
    assert (result.exit_code, "give the base as MODEL" in result.stderr) == (2, True)


def test_chat_keeps_the_conversation_until_new(veneer: Veneer, model_folder: Path) -> None:
    options = ("--temperature", 0, "--max-new-tokens", 7)
    result = veneer("chat", model_folder, *options, input="hi\n\nyes\n/new\nyes\n/exit\nnever\n")
    first = answer(model_folder, "<|user|>hi<|end|><|assistant|>", 7)
    second = answer(model_folder, f"<|user|>hi<|end|><|assistant|>{first}<|end|><|user|>yes<|end|><|assistant|>", 7)
    fresh = answer(model_folder, "<|user|>yes<|end|><|assistant|>", 7)
    assert result.exit_code == 0, result.output
    assert second != fresh
    assert result.stdout.replace("> ", "") == f"{first}\n{second}\n{fresh}\n"


@pytest.mark.parametrize(
    ("raised", "typed", "encoded", "told"),
    [
        (
            KeyboardInterrupt(),
            "one\ntwo\nthree\n",
            [["one"], ["one", "answer", "two"], ["one", "answer", "three"]],
            "stopped",
        ),
        (
            ConfigError("the prompt has 31 tokens and the model's context holds 29: shorten it"),
            "one\ntwo\n/new\nthree\n",
            [["one"], ["one", "answer", "two"], ["three"]],
            "shorten it, or /new forgets the conversation",
        ),
    ],
    ids=["Ctrl-C", "a full context"],
)
def test_an_answer_that_breaks_off_does_not_end_the_conversation(
    raised: BaseException,
    typed: str,
    encoded: list[list[str]],
    told: str,
    veneer: Veneer,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    class Fake:
        tokenizer = None

        def stream(self, turns: list[str], max_new_tokens: int) -> str:
            asked.append(turns)
            if len(asked) == 2:
                raise raised
            return "answer"

    monkeypatch.setattr("veneer.cli.chat.encode_chat", lambda tokenizer, turns: [t["content"] for t in turns])
    monkeypatch.setattr("veneer.cli.loading.answerer_of", lambda *rest: Fake())
    result = veneer("chat", model_folder, input=typed)
    assert result.exit_code == 0, result.output
    assert asked == encoded
    assert result.stdout.count(told) == 1


def test_chat_opens_with_model_adapter_and_commands(veneer: Veneer, model_folder: Path, adapter_folder: Path) -> None:
    said = veneer("chat", adapter_folder, "--system", "be brief", input="/exit\n")
    assert said.exit_code == 0, said.output
    assert f"{model_folder} with {adapter_folder}, told: be brief\n" in said.stderr
    assert all(command in said.stderr for command in ("/new", "/exit", "Ctrl-C"))
    assert "adapter" not in veneer("chat", model_folder, input="/exit\n").stderr


@pytest.mark.parametrize(
    ("typed", "encoded", "told"),
    [
        ("/nwe\nhi\n", [["hi"]], "no command /nwe: /new"),
        ("/system be brief\nhi\n", [["hi"]], "no command /system: /new"),
        ("/\n/help\nhi\n", [["hi"]], "no command /: /new"),
        (" /nwe\n", [["/nwe"]], ""),
        ("/etc/hosts lists what?\n", [["/etc/hosts lists what?"]], ""),
    ],
)
def test_an_unknown_command_is_no_message(
    typed: str, encoded: list[list[str]], told: str, veneer: Veneer, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    class Fake:
        tokenizer = None

        def stream(self, turns: list[str], max_new_tokens: int) -> str:
            asked.append(turns)
            return "answer"

    monkeypatch.setattr("veneer.cli.chat.encode_chat", lambda tokenizer, turns: [t["content"] for t in turns])
    monkeypatch.setattr("veneer.cli.loading.answerer_of", lambda *rest: Fake())
    result = veneer("chat", model_folder, input=typed)
    assert result.exit_code == 0, result.output
    assert asked == encoded
    assert told in result.stderr
    assert ("no command" in result.stderr) == bool(told)


def test_chat_with_a_system_message_ends_at_the_end_of_input(veneer: Veneer, model_folder: Path) -> None:
    result = veneer("chat", model_folder, "--system", "be", "--temperature", 0, "--max-new-tokens", 7, input="hi\n")
    wanted = answer(model_folder, "<|system|>be<|end|><|user|>hi<|end|><|assistant|>", 7)
    assert (result.exit_code, wanted in result.stdout) == (0, True)


def test_a_model_without_a_chat_template_cannot_chat(veneer: Veneer, model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    result = veneer("chat", folder)
    assert (result.exit_code, "no chat template" in result.stderr) == (2, True)
    plain = veneer("generate", folder, "-p", "hi", "--max-new-tokens", 9)
    assert generated(plain) == answer(model_folder, "hi", 9)


def test_a_base_in_4_bits_answers_like_its_dequantized_weights(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ModelParts] = []
    own = loading.answerer_of
    monkeypatch.setattr(loading, "answerer_of", lambda parts, *rest: seen.append(parts) or own(parts, *rest))
    short = ("--max-new-tokens", 3)
    result = veneer("generate", model_folder, "-a", adapter_folder, "-p", "hi", "--load-in-4bit", *short)
    assert result.exit_code == 0, result.output
    layer = seen[0].base.get_submodule("model.layers.0.mlp.down_proj")
    dense = AutoModelForCausalLM.from_pretrained(model_folder).get_submodule("model.layers.0.mlp.down_proj").weight
    assert layer.weight.numel() * layer.weight.element_size() <= dense.numel() / 2 + 64
    assert seen[0].adapters == (adapter_folder,)
