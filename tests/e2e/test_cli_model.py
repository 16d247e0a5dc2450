"""The commands on SmolLM2-135M-Instruct, as `veneer fetch` leaves it in the cache."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.store.known import model_folder

pytestmark = pytest.mark.model
NAME = "smollm2-135m-instruct"


def test_it_answers_a_question() -> None:
    question = ("-p", "What is the capital of France?", "--max-new-tokens", "12")
    command = ["generate", NAME, *question, "--dtype", "float32"]  # in bfloat16 the first token is tied with another
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stdout.strip()) == (0, "The capital of France is Paris.")


def test_the_tokenizer_is_that_of_the_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder(NAME))
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    for text in ("Hello  world\n\n 123 naïve é 日本 \t x 3.14", " leading", "<|im_start|>user\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n 12").input_ids) == ["ĊĊĠ", "1", "2"]
    turn = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
