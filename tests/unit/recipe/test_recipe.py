import re

import pytest
import yaml

from veneer.errors import ConfigError
from veneer.methods import all_methods
from veneer.methods.bottleneck import BottleneckConfig
from veneer.methods.ia3 import IA3Config
from veneer.methods.lora import LoraConfig
from veneer.recipe.adapter import names_of
from veneer.recipe.commented import commented_recipe
from veneer.recipe.methods import imported
from veneer.recipe.problems import NOWHERE
from veneer.recipe.recipe import load_recipe, parse_recipe


def values(**changes):
    base = {"model": {"source": "somewhere"}, "data": {"train": "rows.jsonl"}, "output": "runs/x"}
    return {**base, **changes}


def recipe_with(**changes):
    return parse_recipe(values(**changes))


def test_the_commented_recipe_is_valid_and_names_only_keys_that_do_something(written):
    text = commented_recipe(names_of(imported().methods))
    recipe = load_recipe(written(text))
    assert recipe.adapter_config() == LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    assert recipe.training_config().learning_rate == 2e-4
    optional = [line.strip()[2:] for line in text.splitlines() if line.strip().startswith("# ") and ": " in line]
    keys = {"attention", "eval", "prompt", "completion", "chat", "system", "limit", "optim_args", "lora_plus"}
    found = {line.split(":")[0]: line.partition(": ")[2] for line in optional if line.split(":")[0] in keys}
    assert found.keys() == keys
    uncommented = recipe_with(training={"lora_plus": yaml.safe_load(found["lora_plus"])})
    assert uncommented.training_config().lora_plus == 16
    assert "METHODS" not in text
    assert all(f" {name} |" in text or f"| {name}" in text for name in names_of(imported().methods))


def test_what_yaml_makes_of_a_word_is_that_word():
    training = yaml.safe_load("{eval_strategy: no, save_strategy: no, fused: off, bf16: yes}")
    config = parse_recipe(values(training=training)).training_config()
    assert (config.eval_strategy, config.save_strategy, config.fused, config.bf16) == ("no", "no", "off", True)


def test_every_problem_is_told_at_once_with_the_nearest_key():
    wrong = values(
        model={"source": "x", "quantisation": "nf4"},
        adapter={"method": "lora", "metod": "dora", "lora_aplha": 3, "r": "many"},
        training={"learning_rat": 1, "max_length": "long", "output_dir": "y"},
        seeds=3,
    )
    with pytest.raises(ConfigError) as error:
        parse_recipe(wrong)
    told = str(error.value)
    for expected in (
        "model.quantisation: unknown key; the nearest is 'quantization'",
        "adapter.metod: unknown key; the nearest is 'method'",
        "adapter.lora_aplha: unknown key; the nearest is 'lora_alpha'",
        "adapter.r: 'many' does not fit",
        "training.learning_rat: unknown key; the nearest is 'learning_rate'",
        "training.max_length: 'long' does not fit",
        "training.output_dir: set it at the top, as output",
        "seeds: unknown key; the nearest is 'seed'",
    ):
        assert expected in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"method": "lora_"}}, "adapter.method: 'lora_' must be one of lora, .*the nearest is 'lora'"),
        ({"adapter": {"method": "full", "r": 3}}, "adapter.r: method full trains the whole model"),
        ({"training": {"run_name": True}}, "training.run_name: True does not fit"),
        ({"training": {"report_to": [1]}}, r"training\.report_to\.0: 1 does not fit: it must be text"),
        ({"training": {"report_to": 3}}, r"training\.report_to: 3 does not fit: it must be text or a list"),
        ({"adapter": {"rank_pattern": {"a": "x"}}}, r"adapter\.rank_pattern\.a: 'x' does not fit: it must be a whole"),
        ({"adapter": {"rank_pattern": 3}}, r"adapter\.rank_pattern: 3 does not fit: it must be an object"),
        ({"model": {"source": "x", 1: 3}}, r"model\.1: 1 does not fit: it must be text"),
        ({"training": {"gradient_checkpointing": "maybe"}}, "does not fit: it must be true or false or 'selective'"),
        ({"adapter": {"method": "ia3", "lora_alpha": 3}}, r"method ia3 has no such setting \(it belongs to .*lora"),
        ({"adapter": {"method": "full"}, "model": {"source": "x", "quantization": "nf4"}}, "weights are frozen"),
        ({"data": {"train": "a", "prompt": "{q}"}}, "belong together"),
        ({"data": {"train": "a", "eval": "b", "eval_fraction": 0.1}}, "not both"),
        ({"data": {"train": "a", "eval_fraction": 1.5}}, "data.eval_fraction: 1.5 does not fit"),
        ({"adapter": {"init_lora_weights": "eva"}}, "adapter: LORA with EvaConfig starts from a pass over data"),
        ({"data": {}}, "data.train: is missing"),
        ({"adapter": {"method": "prompt_tuning"}}, "adapter.num_virtual_tokens: is missing"),
        ({"adapter": {"method": "dora", "use_dora": False}}, "use_dora: False contradicts method dora"),
        ({"training": {"lora_plus": 0}}, "lora_plus=0.* must be above 0"),
        ({"training": {"optim": "galore_adamw", "optim_args": "rnk=3"}}, "'rnk=3' is not one of .*nearest is 'rank'"),
        ({"training": {"optim": "galore_adamw", "optim_args": "rank=x"}}, "rank='x' must be a number"),
        ({"training": {"optim": "adamw_8bit", "optim_args": "rank=3"}}, "has no effect with optim='adamw_8bit'"),
        (
            {"training": {"optim": "galore_adamw_layerwise", "max_grad_norm": 1, "gradient_accumulation_steps": 2}},
            "(?s)so max_grad_norm must be 0, not 1.0\n.*so gradient_accumulation_steps must be 1, not 2",
        ),
        ({"adapter": {"r": 0}}, "adapter.r: 0 must be at least 1"),
        ({"training": {"packing": True, "max_length": None}}, "packing=True needs max_length"),
    ],
)
def test_what_is_wrong_is_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(values(**changes))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", LoraConfig(target_modules="all-linear")),
        ("rslora", LoraConfig(target_modules="all-linear", use_rslora=True)),
        ("dora", LoraConfig(target_modules="all-linear", use_dora=True)),
        ("lora_bias", LoraConfig(target_modules="all-linear", lora_bias=True)),
        ("ia3", IA3Config()),
        ("full", None),
    ],
)
def test_methods(method, expected):
    assert recipe_with(adapter={"method": method}).adapter_config() == expected


def test_every_method_of_the_registry_has_a_name():
    needed = {"num_virtual_tokens": 3, "total_step": 7, "oft_block_size": 4, "token_indices": [3]}
    needed |= {"adapter_len": 3, "adapter_layers": 2, "cpt_token_ids": [5, 8, 3]}
    for peft_type, cls in all_methods().items():
        own = {k: v for k, v in needed.items() if k in cls.__dataclass_fields__}
        recipe = recipe_with(adapter={"method": peft_type.lower(), **own})
        assert type(recipe.adapter_config()) is cls
        assert recipe.training_config().learning_rate == cls.usual_learning_rate


def test_a_method_dropped_into_the_folder_is_known(dropped_method):
    dropped_method(
        "loud",
        "from dataclasses import dataclass\n"
        "from veneer.methods.ia3 import IA3Config\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class LoudConfig(IA3Config):\n"
        "    peft_type = 'LOUD'\n"
        "    loudness: float\n",
    )
    assert recipe_with(adapter={"method": "loud", "loudness": "1e-2"}).adapter_config().loudness == 0.01
    with pytest.raises(ConfigError, match=r"(?s)loudnes: unknown key; the nearest is 'loudness'.*loudness: is missing"):
        recipe_with(adapter={"method": "loud", "loudnes": 3})
    assert "| loud |" in commented_recipe(names_of(imported().methods))


def test_float32_is_float32_unless_autocast_is_asked_for(written):
    for override, autocast in (
        ("model.dtype=auto", True),
        ("model.dtype=float32", False),
        ("training.bf16=true", True),
    ):
        recipe = load_recipe(written(values(model={"source": "somewhere", "dtype": "float32"})), [override])
        assert recipe.training_config().bf16 is autocast


def test_numbers_that_yaml_reads_as_text_are_numbers(written):
    recipe = load_recipe(written(values()), ["training.learning_rate=3e-4", "adapter.target_modules=[q_proj]"])
    assert recipe.training_config().learning_rate == 3e-4
    assert recipe.adapter_config().target_modules == ("q_proj",)


def test_files_beside_the_recipe_are_found_and_overrides_are_taken_as_given(written, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    assert load_recipe(written(values())).data.train == str(tmp_path / "rows.jsonl")
    assert load_recipe(written(values()), ["data.train=rows.jsonl"]).data.train == "rows.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output", "must have the form key=value"),
        ("~", "or ~key, which removes a key"),
        ("~output=3", "~output"),
        ("~data.eval", "data.eval is not in the recipe; here are train"),
        ("~training.max_steps", "training.max_steps is not in the recipe"),
        ("~output.x", "output.x is not in the recipe"),
        ("output.x=1", "output is a value, not a section"),
        ("seed=[1", "the value is not YAML"),
    ],
)
def test_overrides_that_cannot_be_read(written, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(values()), [override])


def test_a_key_is_removed_as_if_the_file_did_not_have_it(written):
    given = written(values(adapter={"method": "lora", "r": 3}, training={"max_steps": 5}))
    recipe = load_recipe(given, ["~adapter.r", "~training", "seed=7", "~seed"])
    assert recipe.adapter_config().r == LoraConfig().r
    assert (recipe.training_config().max_steps, recipe.seed) == (-1, recipe_with().seed)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Message: {txt}", "Message: {txt}"),
        ("{txt}", "{txt}"),
        ("[a] # b", "[a] # b"),
        ("17", "17"),
        ("'quoted: {txt}'", "quoted: {txt}"),
    ],
)
def test_text_in_an_override_is_taken_as_it_stands(written, text, read):
    recipe = load_recipe(written(values()), [f"data.prompt={text}", "data.completion={label}"])
    assert recipe.data.prompt == read
    assert load_recipe(written(values()), ["data.system=null"]).data.system is None


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("adapter.rank", "r"),
        ("adapter.alpha", "lora_alpha"),
        ("adapter.dropout", "lora_dropout"),
        ("training.lr", "learning_rate"),
        ("training.epochs", "num_train_epochs"),
        ("training.batch_size", "per_device_train_batch_size"),
    ],
)
def test_other_words_of_the_field_are_known(written, key, meant):
    with pytest.raises(ConfigError, match=f"{key}: unknown key; the nearest is '{meant}'"):
        load_recipe(written(values()), [f"{key}=1"])


@pytest.mark.parametrize(
    ("content", "message"), [("a: [1", "is not YAML"), ("- 1", "must hold keys and values"), ("", "must hold keys")]
)
def test_files_that_are_no_recipe(written, content, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(content))


@pytest.mark.parametrize(
    ("content", "line", "column", "wrong"),
    [
        ("seed: 3\noutput: a: b", 2, 10, "': ' has no place here"),
        ("data:\n   train: a\n  eval: b", 3, 3, "the indentation fits no line above"),
        ("output: 'don't'", 1, 14, "text follows a closing quote"),
        ('data:\n  train: "a" b', 2, 14, "text follows a closing quote"),
        ("data: {train: a} b", 1, 18, "text follows a closing quote or bracket"),
        ("seed: 3\ndata: {train: a", 2, 16, "a comma or a closing bracket is missing"),
        ("data: {train: a eval: b}", 1, 21, "a comma or a closing bracket is missing"),
        ("data: {train: a]", 1, 16, "a comma or a closing bracket is missing"),
        ("output: 'a\nb", 2, 2, "a quotation mark is not closed"),
        ("data:\n\ttrain: a", 2, 1, "a tab is not allowed"),
        ("output: @a", 1, 9, "no value begins with this sign"),
        ("output: *a", 1, 9, "no anchor"),
        ("output: !a b", 1, 9, "a tag"),
        ("seed: 3\n---\nseed: 4", 2, 1, "a second document"),
        ("seed: 3\noutput: a\x07", 2, 10, "the character U\\+0007"),
    ],
)
def test_yaml_errors_are_one_line_with_place_reason_and_remedy(written, content, line, column, wrong):
    with pytest.raises(ConfigError) as error:
        load_recipe(written(content))
    assert re.fullmatch(rf".*\.yaml is not YAML at line {line}, column {column}: {wrong}.*\. .+", str(error.value))


@pytest.mark.parametrize(
    ("content", "override"),
    [
        ("training: {}\noutput: o\ntraining: {max_steps: 3}", ()),
        ("training:\n  seed: 1\n  seed: 2", ()),
        ("{}", ["training={max_steps: 3, max_steps: 4}"]),
    ],
)
def test_a_key_that_is_there_twice(written, content, override):
    with pytest.raises(ConfigError, match=r"line [13]: the key \w+ is there twice in one part; keep one"):
        load_recipe(written(content), override)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"completion_only_loss": True}}, "training.completion_only_loss: set it as data.train_on"),
        ({"training": {"assistant_only_loss": False}}, "training.assistant_only_loss: set it as data.train_on"),
        ({"data": {"train": "x", "eval_limit": 3}}, "data.eval_limit: limits the rows of data.eval"),
        ({"data": {"train": "x", "eval_limit": 3, "eval_fraction": 0.2}}, "data.eval_limit: limits the rows"),
        ({"model": {"source": "x", "double_quantization": True}}, "model.quantization is none"),
        (
            {"training": {"resume_from_checkpoint": "x"}},
            "training.resume_from_checkpoint: set it as veneer train --res",
        ),
        ({"training": {"optim_args": "rank=3"}}, "optim_args='rank=3' has no effect with optim='adamw_torch"),
        (
            {"training": {"optim": "adamw_8bit", "optim_target_modules": ["q"]}},
            r"optim_target_modules=\['q'\] has no effect with",
        ),
        ({"training": {True: 3}}, "training.True: unknown key"),
        (
            {"training": {"qqxx": 3}},
            "training.qqxx: unknown key; `veneer train --print-recipe` shows the usual ones of",
        ),
        (
            {"data": {"train": "x", "qqxx": 3}},
            "data.qqxx: unknown key; known: train, more, chat_template, response_template, eval",
        ),
        (
            {"model": {"source": "x", "quantization": "int8", "double_quantization": False}},
            "model.double_quantization: it applies only to nf4 and fp4, and model.quantization is int8",
        ),
    ],
)
def test_a_key_that_cannot_take_effect_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        parse_recipe(values(**changes))


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_fields_of_trainers_that_change_nothing_are_refused_by_name(task):
    """They are refused with any value: ``trust_remote_code`` would look like a switch of security."""
    given = dict.fromkeys(NOWHERE, False)
    with pytest.raises(ConfigError) as caught:
        parse_recipe(values(task=task, training=given))
    for key, reason in NOWHERE.items():
        assert f"training.{key}: has no effect: {reason}; drop it" in str(caught.value)
    assert "unknown key" not in str(caught.value)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel"])
def test_presets_of_a_method_are_methods_and_own_fields_hold(name: str):
    recipe = recipe_with(adapter={"method": name, "scaling": 0.7})
    assert recipe.adapter_config() == getattr(BottleneckConfig, name)(scaling=0.7)
