"""`measure`: each metric is its definition; adapters side by side are each alone; results that are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from models import ROLES, byte_tokenizer, llama_config
from veneer import IA3Config, LoraConfig, get_peft_model
from veneer.data.windows import Windows
from veneer.errors import ConfigError, DataError, ShapeError
from veneer.evaluate import (
    ExactMatch,
    LabelChoice,
    RegexMatch,
    TokenPerplexity,
    compare,
    measure,
    measure_each,
)
from veneer.evaluate.accuracy import Accuracy, ScoredChoice
from veneer.evaluate.measurement import predictions_of
from veneer.evaluate.perplexity import perplexity
from veneer.evaluate.questions import QuestionReader
from veneer.evaluate.scoring import greedy_answers, log_probabilities
from veneer.evaluate.statistics import paired_means, paired_shares

ROWS = [{"prompt": f"text {i}:", "completion": (" good", " bad", " ugly")[i % 3]} for i in range(7)]
TOKENIZER = byte_tokenizer(ROLES[:2])
READER = QuestionReader(tokenizer=TOKENIZER)


def base() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = llama_config(vocab_size=259, initializer_range=0.3, eos_token_id=0, bos_token_id=None)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A model with two adapters of two methods, the first active."""
    model = get_peft_model(base(), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            parameter.data.normal_(0, 0.5)
    return model.eval()


def answers(model: Any, n: int) -> list[str]:
    asked = ExactMatch(max_new_tokens=n).ask(READER, ROWS)
    return greedy_answers(model, TOKENIZER, [question.prompt for question in asked.questions], asked.answering)


def by_label(model: Any, labels: tuple[str, ...] = ()) -> Accuracy:
    choice = ScoredChoice.of(TOKENIZER, READER.read(ROWS), labels)
    return choice.judged(log_probabilities(model, choice.items))


def test_a_name_is_the_metric_with_its_defaults(adapted: Any) -> None:
    assert measure(adapted, ROWS, tokenizer=TOKENIZER) == perplexity(adapted, TOKENIZER, ROWS)
    assert measure(adapted, ROWS, "labels", tokenizer=TOKENIZER) == by_label(adapted)


def test_settings_are_those_of_the_metric(adapted: Any) -> None:
    found = measure(adapted, ROWS, TokenPerplexity(context=9, stride=2, whole_rows=True), tokenizer=TOKENIZER)
    wanted = perplexity(adapted, TOKENIZER, ROWS, windows=Windows(context=9, stride=2), whole_rows=True)
    assert found == wanted != measure(adapted, ROWS, tokenizer=TOKENIZER)
    labels = ("ugly", "fair", "good", "bad")
    chosen = measure(adapted, ROWS, LabelChoice(labels=labels), tokenizer=TOKENIZER)
    assert chosen == by_label(adapted, labels)


def test_answers_are_judged_by_the_metric(adapted: Any) -> None:
    given = answers(adapted, 5)
    rows = [{**row, "completion": answer.upper()} for row, answer in zip(ROWS, given, strict=True)]
    for ignores, n_right in ((False, sum(a == a.upper() for a in given)), (True, 7)):
        metric = ExactMatch(ignore_case=ignores, max_new_tokens=5)
        found = measure(adapted, rows, metric, tokenizer=TOKENIZER)
        assert isinstance(found, Accuracy)
        assert (found.n_right, found.predictions) == (n_right, tuple(given))
    first = measure(adapted, [{**row, "completion": a[0] + "?"} for row, a in zip(ROWS, given, strict=True)],
                    RegexMatch(pattern="(?s)^(.)", max_new_tokens=5), tokenizer=TOKENIZER)  # fmt: skip
    assert first.value == 1


def test_rows_of_other_fields_are_read_by_a_template(adapted: Any) -> None:
    other = [{"n": i, "mood": [row["completion"], " any"]} for i, row in enumerate(ROWS)]
    how: dict[str, Any] = {"tokenizer": TOKENIZER, "prompt": "text {n}:", "answer_field": "mood"}
    assert measure(adapted, other, **how) == measure(adapted, ROWS, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "metric", [TokenPerplexity(), LabelChoice(), ExactMatch(max_new_tokens=3)], ids=lambda metric: metric.name
)
def test_adapters_side_by_side_are_each_alone(adapted: Any, metric: Any) -> None:
    done: list[tuple[int, int]] = []
    found = measure_each(
        adapted, metric.ask(READER, ROWS), ["__base__", "second", "default"], tokenizer=TOKENIZER,
        on_progress=lambda *at: done.append(at),
    )  # fmt: skip
    plain = base()
    assert done[-1][0] == done[-1][1]
    wanted = [measure(plain, ROWS, metric, tokenizer=TOKENIZER)]
    adapted.set_adapter("second")
    wanted += [measure(adapted, ROWS, metric, tokenizer=TOKENIZER)]
    adapted.set_adapter("default")
    wanted += [measure(adapted, ROWS, metric, tokenizer=TOKENIZER)]
    assert [each.value for each in found] == [pytest.approx(each.value, rel=1e-4) for each in wanted]
    if metric.name == "perplexity":
        assert len({each.value for each in found}) == 3


def test_results_of_one_metric_are_compared_row_by_row(adapted: Any) -> None:
    ours, theirs = measure(adapted, ROWS, tokenizer=TOKENIZER), measure(base(), ROWS, tokenizer=TOKENIZER)
    assert compare(ours, theirs) == paired_means(ours.row_nats, theirs.row_nats, ours.row_tokens)
    share, other = (measure(model, ROWS, "labels", tokenizer=TOKENIZER) for model in (adapted, base()))
    assert compare(share, other) == paired_shares(share.right, other.right)
    with pytest.raises(ShapeError, match="give two results of one metric"):
        compare(ours, share)
    with pytest.raises(ShapeError, match="measure an accuracy"):
        next(predictions_of(TokenPerplexity().ask(READER, ROWS), ours, TOKENIZER))


@pytest.mark.parametrize(
    ("metric", "how", "message"),
    [
        ("rouge", {}, "metric 'rouge' is unknown: give one of perplexity, exact-match, regex, labels"),
        ("regex", {}, r"give RegexMatch\(pattern=…\)"),
        ("perplexity", {"answer_field": "completion"}, "perplexity reads both"),
    ],
)
def test_what_cannot_be_measured_is_told(metric: str, how: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(None, ROWS, metric, tokenizer=TOKENIZER, **how)


def test_settings_are_checked_when_they_are_made() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        RegexMatch(pattern="(")
    with pytest.raises(ConfigError, match="less than the context"):
        TokenPerplexity(context=8, stride=8)
    with pytest.raises(DataError, match="row 2: it has the fields"):
        LabelChoice().ask(READER, [ROWS[0], {"a": "b"}])
