"""Advice on recipes: a key in another part, words of other tools, values that cannot be meant, sources and metrics."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.errors import ConfigError
from veneer.recipe.advice import in_recipe_words, odd_rate
from veneer.recipe.recipe import parse_recipe


def recipe(**parts: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"model": {"source": "x"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    for key, value in parts.items():
        part, _, name = key.partition("__")
        if name:
            values.setdefault(part, {})[name] = value
        else:
            values[part] = value
    return values


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: unknown key; it belongs elsewhere: training.learning_rate"),
        ({"training__r": 8}, "training.r: unknown key; it belongs elsewhere: adapter.r"),
        ({"adapter__path": "runs/a"}, "adapter.path: unknown key; to train a saved adapter on, say adapter.from"),
        ({"adapter__method": "qlora"}, "say adapter.method: lora and model.quantization: nf4"),
        ({"model__quantization": "4bit"}, "say nf4"),
        ({"training__optim": "adamw8bit"}, "the nearest is 'adamw_8bit'"),
        ({"training__optim": "galore_adamw"}, "projects the gradients of whole weights, and method lora trains none"),
        ({"adapter__lora_alpha": -16}, "adapter.lora_alpha: -16 must be above 0: the update would be subtracted"),
        ({"adapter__lora_alpha": 0}, "adapter.lora_alpha: 0 must be above 0"),
        ({"training__learning_rate": 200}, "must be at most 10; perhaps 2e-4 is meant"),
        ({"training__max_grad_norm": -1.0}, "training.max_grad_norm: -1.0 must be at least 0"),
        ({"training__report_to": "wandbb"}, "report_to='wandbb' is unknown"),
        ({"training__report_to": "comet_ml"}, "needs a package that is not installed"),
        ({"training__fp16": True, "training__bf16": False}, "fp16=True needs a GPU, and this run is on the CPU"),
        ({"model__attention": "flash_attention_2"}, "needs the package flash-attn, which is not installed"),
        ({"training__load_best_model_at_end": True, "training__eval_strategy": "no"}, "no"),
        ({"data__more": [{"source": "b", "weight": 0}]}, "data.more.0.weight: 0 does not fit"),
        ({"data__more": [{"source": "b", "weight": -2}]}, "data.more.0.weight: -2 does not fit"),
        ({"data__more": [{"source": "b", "wieght": 2}]}, "data.more.0.wieght: unknown key; the nearest is 'weight'"),
        ({"data__more": [{"source": "b", "weight": 2, "count": 3}]}, "entry 1: give weight or count, not both"),
        ({"data__more": [{"source": "b", "prompt": "{x}"}]}, "entry 1: prompt and completion belong together"),
        ({"data__more": [{"weight": 2}]}, "data.more.0.source: is missing"),
        ({"rollouts": {"enginee": "auto"}}, "rollouts.enginee: unknown key; the nearest is 'engine'"),
        ({"metric": {"name": "labels"}}, "metric: is measured on held-out rows, and there are none"),
        ({"metric": {"name": "regex"}, "data__eval_fraction": 0.1}, "metric.pattern: is missing"),
        ({"metric": {"name": "labels", "pattern": "x"}, "data__eval_fraction": 0.1}, "is read by regex alone"),
        ({"metric": {"name": "regex", "pattern": "("}, "data__eval_fraction": 0.1}, "is not a regular expression"),
        ({"metric": {"name": "accuracy"}, "data__eval_fraction": 0.1}, "metric.name: 'accuracy' does not fit"),
    ],
)
def test_what_is_said_of_it(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(recipe(**changes))
    assert told in str(error.value)
    assert "Strategy." not in str(error.value)
    assert "--" not in str(error.value)


def test_words_of_libraries() -> None:
    assert in_recipe_words("--tf32 requires Ampere") == "training.tf32 requires Ampere"
    assert in_recipe_words("found IntervalStrategy.NO\n- Eval: SaveStrategy.STEPS") == "found no - Eval: steps"
    assert in_recipe_words("a--b --") == "a--b --"


def test_a_rate_far_above_the_usual_one() -> None:
    assert odd_rate(2e-4, 2e-4, "lora") is None
    assert "1,500 times the usual one of method lora" in (odd_rate(0.3, 2e-4, "lora") or "")
