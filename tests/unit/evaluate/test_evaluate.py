"""Evaluation: log-probabilities and answers in batches equal those alone, and the figures equal their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from models import ROLES, byte_tokenizer, gpt2_config, llama_config
from veneer.data.asked_rows import as_trained, read_rows
from veneer.data.reader import RowReader
from veneer.data.windows import Windows
from veneer.errors import ConfigError, DataError
from veneer.evaluate.accuracy import Accuracy, ScoredChoice, answer_accuracy, exact_match, regex_match
from veneer.evaluate.perplexity import Texts, perplexity
from veneer.evaluate.questions import Question, QuestionReader
from veneer.evaluate.scoring import Answering, Batching, Scored, context_length, greedy_answers, log_probabilities
from veneer.evaluate.statistics import wilson_interval


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(ROLES[:2])


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(vocab_size=259, initializer_range=0.3, eos_token_id=0, bos_token_id=None))


def gpt2() -> GPT2LMHeadModel:
    config = gpt2_config(vocab_size=259, n_positions=97, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def short_gpt2() -> GPT2LMHeadModel:
    """A model of one layer and a context of 19 tokens."""
    sizes = {"vocab_size": 259, "n_layer": 1, "n_positions": 19, "initializer_range": 0.3}
    return GPT2LMHeadModel(gpt2_config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return request.param().eval()


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, from one plain forward pass."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_batched_log_probabilities_are_those_of_each_row_alone(model: Any) -> None:
    rows = [[5, 9, 200, 31], [7, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [41, 5]]
    items = [Scored(tuple(r), 1, len(r)) for r in rows] + [Scored(tuple(rows[2]), 4, 6)]
    for batching in (Batching(), Batching(n_rows=1), Batching(n_rows=3, n_tokens=12)):
        found = log_probabilities(model, items, batching)
        for values, row in zip(found, rows, strict=False):
            torch.testing.assert_close(values.double(), alone(model, row), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[-1].double(), alone(model, rows[2])[3:5], rtol=1e-4, atol=1e-5)


def test_sequences_that_differ_in_the_last_token_share_a_pass(model: Any) -> None:
    calls: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: calls.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    log_probabilities(model, [Scored((4, 5, last), 2, 3) for last in range(11)])
    hook.remove()
    assert calls == [(1, 2)]


def test_batched_answers_are_those_of_each_prompt_alone(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tokenizer(text).input_ids for text in ("a", "the longest prompt of them", "xyz", "b")]
    wanted = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0)
        wanted.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    # What a checkpoint says of sampling and searching does not make an answer less than the likeliest.
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.7)
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    for batching in (Batching(), Batching(n_rows=2), Batching(n_rows=3, n_tokens=50)):
        assert greedy_answers(model, tokenizer, prompts, Answering(max_new_tokens=9), batching) == wanted
    whole = wanted[1]
    cut = greedy_answers(model, tokenizer, prompts, Answering(max_new_tokens=9, stop=(whole[3],)))[1]
    assert cut == whole[: whole.index(whole[3])]


def test_the_mode_of_each_module_is_put_back(model: Any) -> None:
    model.train().base_model.eval()
    log_probabilities(model, [Scored((1, 2), 1, 2)])
    assert (model.training, model.base_model.training) == (True, False)
    model.eval()


@pytest.mark.parametrize(
    ("n", "context", "stride"), [(1, 4, 2), (2, 4, 2), (23, 7, 3), (23, 50, 25), (9, 4, 1), (8, 4, 3)]
)
def test_windows_score_every_token_once_with_something_before_it(n: int, context: int, stride: int) -> None:
    spans = Windows(context=context, stride=stride).spans(n)
    scored = [t for begin, start, end in spans for t in range(start, end) if begin < t]
    assert scored == list(range(1, n))
    assert all(end - begin <= context for begin, _, end in spans)


def test_perplexity_of_text_is_its_definition(model: Any, tokenizer: Any) -> None:
    texts = ["some words of text", "and a few more of them, longer"]
    ids = [tokenizer(text).input_ids for text in texts]
    scores = torch.cat([alone(model, row) for row in ids])
    found = perplexity(model, tokenizer, [{"text": text} for text in texts])
    assert found.value == pytest.approx(math.exp(-scores.mean()), rel=1e-5)
    assert (found.n_tokens, found.n_rows) == (len(scores), 2)


def test_perplexity_in_windows_sees_what_the_windows_hold(model: Any, tokenizer: Any) -> None:
    text = "a text of more tokens than one window has"
    ids = tokenizer(text).input_ids
    total = 0.0
    for begin, start, end in Windows(context=11, stride=4).spans(len(ids)):
        total += float(alone(model, ids[begin:end])[start - begin - 1 :].sum())
    found = perplexity(model, tokenizer, [{"text": text}], windows=Windows(context=11, stride=4))
    assert found.n_tokens == len(ids) - 1
    assert found.nats_per_token == pytest.approx(-total / (len(ids) - 1), rel=1e-5)


def test_perplexity_of_answers_leaves_the_prompts_out_unless_asked(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for row, text, answer in (
        ({"messages": chat}, "<|user|>hi<|end|><|assistant|>yes<|end|>", len("yes") + 1),
        ({"prompt": "one:", "completion": " two"}, "one: two<|end|>", len(" two") + 1),
    ):
        scores = alone(model, tokenizer(text).input_ids)
        found = perplexity(model, tokenizer, [row])
        assert found.n_tokens == answer
        assert found.nats_per_token == pytest.approx(-float(scores[-answer:].mean()), rel=1e-5)
        whole = perplexity(model, tokenizer, [row], whole_rows=True)
        assert whole.nats_per_token == pytest.approx(-float(scores.mean()), rel=1e-5)


def of_labels(model: Any, tokenizer: Any, questions: Any, labels: Any = ()) -> Accuracy:
    choice = ScoredChoice.of(tokenizer, questions, labels)
    return choice.judged(log_probabilities(model, choice.items))


def test_labels_are_compared_by_their_summed_log_probabilities(model: Any, tokenizer: Any) -> None:
    rows = [{"prompt": f"text {i}:", "completion": f" {'positive' if i % 2 else 'bad'}"} for i in range(6)]
    questions = QuestionReader(tokenizer=tokenizer).read(rows)
    found = of_labels(model, tokenizer, questions)
    for row, prediction in zip(rows, found.predictions, strict=True):
        sums = {}
        for label in ("bad", "positive"):
            n = len(f" {label}")
            sums[label] = float(alone(model, tokenizer(f"{row['prompt']} {label}").input_ids)[-n:].sum())
        assert prediction == max(sums, key=sums.get)
    right = [row["completion"].strip() == p for row, p in zip(rows, found.predictions, strict=True)]
    assert (found.right, found.n_right, found.value) == (tuple(right), sum(right), sum(right) / 6)


def test_a_third_label_takes_part_and_an_unknown_answer_is_refused(model: Any, tokenizer: Any) -> None:
    questions = QuestionReader(tokenizer=tokenizer, prompt="{t}:", answer_field="l").read([{"t": "x", "l": "a"}])
    few = of_labels(model, tokenizer, questions, ["a", "zz"])
    assert few.predictions[0] in ("a", "zz")
    with pytest.raises(DataError, match=r"none of the labels \['b', 'c'\]: \['a'\]"):
        of_labels(model, tokenizer, questions, ["b", "c"])
    with pytest.raises(ConfigError, match="two or more different words"):
        of_labels(model, tokenizer, questions)


def test_a_label_that_nothing_precedes_is_refused(model: Any, tokenizer: Any) -> None:
    questions = QuestionReader(tokenizer=tokenizer).read([{"prompt": "", "completion": c} for c in ("a", "bc")])
    with pytest.raises(ConfigError, match=r"prompt is empty.*nothing to continue"):
        of_labels(model, tokenizer, questions)


def test_answers_are_judged_row_by_row(model: Any, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "?"}]} for c in "abc"]
    questions = QuestionReader(tokenizer=tokenizer).read(rows)
    answers = greedy_answers(model, tokenizer, [q.prompt for q in questions], Answering(max_new_tokens=5))
    right = [Question(q.prompt, (f" {a}\n",)) for q, a in zip(questions, answers, strict=True)]
    mixed = [right[0], questions[1], right[2]]
    found = answer_accuracy(mixed, answers, exact_match())
    assert (found.right, found.predictions) == ((True, False, True), tuple(answers))
    assert found.interval == wilson_interval(2, 3)


def test_judges() -> None:
    assert exact_match()(" yes\n", ["no", "yes"])
    assert not exact_match()("Yes", ["yes"])
    assert exact_match(fold=True)("SELECT  a\nFROM b", ["select a from B"])
    number = regex_match(r"####\s*(-?[\d,]+)")
    assert number("2 + 2 = 4\n#### 4", ["the sum is #### 4"])
    assert number("#### 3 no, #### 4", ["4"])
    assert not number("4", ["4"])
    assert regex_match(r"\d+")("it is 12", ["12"])
    assert regex_match("x(.*)")("x", ["its x"])
    with pytest.raises(ConfigError, match="not a regular expression"):
        regex_match("(")


def test_accuracy_counts() -> None:
    found = Accuracy.of(["a", "b"], [True, False])
    assert (found.value, found.n_right, found.n_rows) == (0.5, 1, 2)


def test_prompts_from_fields_and_lists_of_answers(tokenizer: Any) -> None:
    reader = QuestionReader(tokenizer=tokenizer, prompt="Q: {q}\nA:", answer_field="a")
    question = reader.read([{"q": "why", "a": ["x", 7]}])[0]
    assert (question.text, question.answers) == ("Q: why\nA:", ("x", "7"))
    assert list(question.prompt) == tokenizer("Q: why\nA:").input_ids


def test_a_prompt_from_fields_is_a_turn_of_a_chat_as_in_training(tokenizer: Any) -> None:
    reader = QuestionReader(tokenizer=tokenizer, prompt="{q}?", answer_field="a", chat=True, system="be brief")
    rows = [{"q": "why", "a": "so"}]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    alike = QuestionReader(tokenizer=tokenizer).read([{"messages": [*turns, {"role": "assistant", "content": "so"}]}])
    assert reader.read(rows) == alike


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({}, {"text": "x", "label": "y"}, r"row 1: it has the fields \['label', 'text'\]"),
        ({"prompt": "{z}", "answer_field": "a"}, {"a": "x"}, "asks for the field 'z'"),
        ({"prompt": "{", "answer_field": "a"}, {"a": "x"}, "does not fit the columns"),
        ({"prompt": "q"}, {"a": "x"}, "--answer-field"),
        ({"prompt": "q", "answer_field": "b"}, {"a": "x"}, "no field 'b'"),
        ({"prompt": "q", "answer_field": "a"}, {"a": None}, "row 1: the field 'a' holds no answer, but None"),
        ({"prompt": "q", "answer_field": "a"}, {"a": []}, "holds no answer"),
        ({"prompt": "{a}", "answer_field": "a"}, {"a": None}, "row 1: the field 'a' of the template is empty"),
        ({}, {"messages": [{"role": "user", "content": "x"}]}, "not a text of the assistant"),
        ({}, {"messages": []}, "not a text of the assistant"),
        ({}, {"messages": [{"role": "assistant", "content": "x"}]}, "no turn precedes the answer"),
    ],
)
def test_rows_that_are_no_questions_are_named(tokenizer: Any, options: dict[str, str], row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        QuestionReader(tokenizer=tokenizer, **options).read([row])


def test_no_rows_and_nothing_to_score_are_errors(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no rows"):
        QuestionReader(tokenizer=tokenizer).read([])
    with pytest.raises(DataError, match="no rows"):
        perplexity(model, tokenizer, [])
    with pytest.raises(DataError, match="two tokens or more"):
        perplexity(model, tokenizer, [{"text": "a"}])


def test_spans_batches_and_windows_are_checked(model: Any, tokenizer: Any) -> None:
    for start, end in ((0, 2), (2, 1), (1, 4)):
        with pytest.raises(ConfigError, match="does not lie in a sequence of 3"):
            log_probabilities(model, [Scored((1, 2, 3), start, end)])
    with pytest.raises(ConfigError, match="at least one row"):
        Batching(n_rows=0)
    with pytest.raises(ConfigError, match="less than the context"):
        Windows(context=4, stride=4)
    with pytest.raises(ConfigError, match="prompt is empty"):
        greedy_answers(model, tokenizer, [[]])


def test_answers_end_with_the_context_and_short_prompts_are_not_cut_with_long_ones(tokenizer: Any) -> None:
    torch.manual_seed(5)
    model = short_gpt2()
    prompts = [[5, 9, 11], [7] * 16, [3, 4] * 6]
    wanted = []
    for prompt, n in zip(prompts, (9, 3, 7), strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0)
        wanted.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    assert greedy_answers(model, tokenizer, prompts, Answering(max_new_tokens=9)) == wanted
    with pytest.raises(ConfigError, match="a prompt has 19 tokens and the model's context holds 19"):
        greedy_answers(model, tokenizer, [[7] * 19])


def test_the_context_of_a_composite_model_is_that_of_its_text() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 3}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 59, "max_position_embeddings": 19}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        assert context_length(Gemma3ForConditionalGeneration(config)) == 19


def test_long_texts_are_read_in_windows_that_the_model_holds(tokenizer: Any) -> None:
    model = short_gpt2()
    rows = [{"text": "a text of more tokens than this model's context has"}]
    found = perplexity(model, tokenizer, rows)
    assert found == perplexity(model, tokenizer, rows, windows=Windows(context=19, stride=9))
    assert Windows.within(4096) == Windows.within(None) == Windows()
    for limit, given in ((19, {"context": 20}), (1, {}), (0, {}), (-3, {})):
        with pytest.raises(ConfigError, match=f"more than the {limit} that the model's context holds"):
            Windows.within(limit, **given)
    with pytest.raises(ConfigError, match="a text has 20 tokens and the model's context holds 19"):
        perplexity(model, tokenizer, rows, windows=Windows(context=20, stride=9))
    with pytest.raises(ConfigError, match="a text has 23 tokens"):
        of_labels(model, tokenizer, [Question(tuple(range(3, 25)), ("a",))], ("a", "b"))


def test_data_files(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b"}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.txt").write_text("whole\n\ntext")
    assert read_rows(tmp_path / "a.jsonl") == rows
    assert read_rows(tmp_path / "a.json") == rows
    assert read_rows(tmp_path / "a.txt") == [{"text": "whole\n\ntext"}]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a":', DataError, "row 2: not JSON"),
        ("a.jsonl", b"[1]", DataError, "row 1: must be an object, not list"),
        ("a.json", b'{"a": 1}', DataError, "must hold a list"),
        ("a.jsonl", b"\xff\xfe", DataError, "UTF-8"),
        ("a.xlsx", b"a,b", DataError, r"must end in \.jsonl, .*\.parquet or \.txt"),
        ("a.csv", b"", DataError, "is empty: its first line must name the columns"),
        ("a.csv", b"a,a\n1,2", DataError, r"each once, and it has \['a'\] twice"),
        ("a.csv", b"a,\n1,2", DataError, "a column without a name"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", DataError, "row 3: 3 cells, and the first line names 2 columns"),
        ("a.csv", b'a,b\n1,"2\n', DataError, "not CSV"),
        ("a.csv", b"a,b\n\xff,2\n", DataError, "UTF-8"),
    ],
)
def test_damaged_data_files_are_named(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_rows(tmp_path / name)
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_rows_are_asked_in_the_form_that_training_gives_them():
    rows = [{"prompt": "two and two", "completion": " four", "label": "4"}]
    assert as_trained(rows, RowReader()) == rows
    turns = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": " four"}]
    assert as_trained(rows, RowReader(chat=True)) == [{"label": "4", "messages": turns}]
    alpaca = [{"instruction": "add", "input": "2 2", "output": "4"}]
    assert as_trained(alpaca, RowReader()) == [{"prompt": "add\n\n2 2", "completion": "4"}]
    with pytest.raises(DataError, match=r"row 1: .*columns.* say how to read them: in two words"):
        as_trained([{"question": "?"}], RowReader(advice="in two words"))
    with pytest.raises(DataError, match="row 2: 'prompt' must be a string, not missing"):
        as_trained([rows[0], {"text": "plain"}], RowReader())
    told = as_trained(rows, RowReader(chat=True, system="be brief"))[0]["messages"][0]
    assert told == {"role": "system", "content": "be brief"}


def test_rows_of_two_forms_have_no_perplexity(tokenizer):
    with pytest.raises(DataError, match="row 3 is of the form text, and row 1 of the form prompt-completion"):
        Texts.of(tokenizer, [{"prompt": "two", "completion": " four"}] * 2 + [{"text": "plain"}], Windows())


def test_text_that_is_none_has_no_perplexity(tokenizer):
    with pytest.raises(DataError, match="row 2: 'text' must be a string, not NoneType"):
        Texts.of(tokenizer, [{"text": "plain"}, {"text": None}], Windows())
