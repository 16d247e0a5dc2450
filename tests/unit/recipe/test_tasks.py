"""Tasks of a recipe: which keys belong to which, reward functions by name, and a saved adapter that is trained on."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

import veneer
from models import llama_config
from veneer import DPOConfig, GRPOConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from veneer.data.tasks import OF_REWARDS
from veneer.errors import ConfigError
from veneer.recipe.recipe import load_recipe, parse_recipe
from veneer.recipe.tasks import TASKS, settings_of, trainer_of
from veneer.train.recipe_trainer import with_saved_adapter
from veneer.train.sweep.recipe import parse_sweep


@pytest.fixture(autouse=True)
def shots(tmp_path, monkeypatch):
    """Run in a folder with a prompt of the teacher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shots.txt").write_text("1: one\n")


DISTILL = {"task": "distill", "distill": {"teacher_prompt": "shots.txt"}}
GRPO = {"task": "grpo", "rewards": ["exact-match"]}
REWARDS = [{"function": "exact-match", "column": "answer", "weight": 0.7}, "regex"]


def values(task="dpo", **changes):
    base = {
        "task": task, "model": {"source": "base"}, "data": {"train": "rows.jsonl"}, "output": "runs/x",
        **({"rewards": ["exact-match"]} if task in OF_REWARDS else {}),
        **(DISTILL if task == "distill" else {}),
    }  # fmt: skip
    return {**base, **changes}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_trainer_and_settings_of_its_own(task):
    recipe = parse_recipe(values(task))
    args = recipe.training_config()
    assert isinstance(args, settings_of(task))
    assert args.learning_rate == pytest.approx(2e-4 if task in ("sft", "reward", "best_of", "distill") else 2e-5)
    assert trainer_of(task).__name__ in veneer.__all__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "dop"}, r"task: 'dop' does not fit: it must be 'sft', 'dpo', 'kto', 'reward', "),
        ({"task": "sft", "training": {"beta": 0.2}}, "beta: belongs to task dpo, kto, grpo, rloo, best_of, distill"),
        ({"training": {"num_generations": 4}}, "num_generations: belongs to task grpo, rloo, best_of, and"),
        ({"training": {"bta": 0.2}}, "training.bta: unknown key; the nearest is 'beta'"),
        ({"training": {"packing": True}}, "training.packing: belongs to task sft"),
        ({"data": {"train": "r", "train_on": "answers"}}, "data.train_on: belongs to task sft, and the task"),
        ({"data": {"train": "r", "completion": "{a}"}}, "data.completion: belongs to task sft"),
        ({"distill": {"teacher_prompt": "shots.txt"}}, "distill: belongs to task distill, and the task here is dpo"),
        ({"task": "distill"}, "distill: is missing; say what the teacher reads"),
        ({**DISTILL, "distill": {"teacher_prompt": "no.txt"}}, r"distill.teacher_prompt: no.txt cannot be read"),
        ({**DISTILL, "distill": {"teacher": "base"}}, "distill.teacher_prompt: is missing, so the teacher would be"),
        ({**DISTILL, "training": {"beta": 1.5}}, "training.beta: 1.5 must be between 0 and 1"),
        ({**DISTILL, "training": {"lmbda": -0.5}}, "training.lmbda: -0.5 must be between 0 and 1"),
        ({**DISTILL, "training": {"teacher_prompt": "x"}}, "training.teacher_prompt: set it in distill"),
        ({**DISTILL, "adapter": {"method": "full"}}, "adapter.method: full has no adapter, which distillation trains"),
        ({**DISTILL, "rewards": ["regex"]}, "rewards: belongs to task grpo, rloo, best_of, and .* is distill"),
        ({"rewards": ["regex"]}, "rewards: belongs to task grpo, rloo, best_of, and .* is dpo"),
        ({"task": "grpo"}, "rewards: is missing; grpo learns from rewards"),
        ({"rollouts": {"engine": "engine"}}, "rollouts: belongs to task grpo, rloo, best_of, and .* is dpo"),
        ({**GRPO, "rollouts": {"engine": "vllm"}}, "rollouts.engine: .*'auto', 'engine' or 'generate'"),
        ({**GRPO, "training": {"rollout_engine": "auto"}}, "rollout_engine: .*in rollouts, as engine"),
        ({**GRPO, "training": {"reward_floor": 1}}, "reward_floor: belongs to task best_of, and the task here is grpo"),
        ({**GRPO, "task": "best_of", "training": {"beta": 0.2}}, "beta=0.2 has no effect on the likelihood"),
        ({"task": "kto", "training": {"per_device_train_batch_size": 1}}, "leaves KTO nothing to estimate its KL term"),
        ({"task": "grpo", "rewards": ["exact-mach"]}, "'exact-mach' is no reward.*the nearest is 'exact-match'"),
        ({"task": "grpo", "rewards": ["regex"]}, "the reward function regex: pattern: is missing"),
        (
            {"task": "grpo", "rewards": [{"function": "regex", "pattern": "("}]},
            r"pattern: '\(' is no regular expression",
        ),
        ({"task": "grpo", "rewards": [{"function": "length", "target": 0}]}, "target: 0 must be a number of tokens"),
        (
            {"task": "grpo", "rewards": [{"function": "length", "goal": 3}]},
            r"goal: unknown key; known: target\n\s+target: is missing",
        ),
        ({"task": "grpo", "rewards": [{"pattern": "a"}]}, "rewards, entry 1: its function is missing"),
        ({"task": "grpo", "rewards": ["no_such_module:f"]}, "no_such_module cannot be imported.*ModuleNotFoundError"),
        ({"task": "grpo", "rewards": ["no.py:f"]}, "there is no file no.py"),
        ({"task": "grpo", "rewards": ["math:square"]}, "math has no function 'square'"),
        (
            {**GRPO, "training": {"per_device_train_batch_size": 6, "num_generations": 4}},
            r"per_device_train_batch_size=6 × 1 steps × 1 processes = 6 completions are not a multiple of "
            r"num_generations=4.*use per_device_train_batch_size=8",
        ),
        (
            {"task": "grpo", "rewards": ["exact-match"], "training": {"num_generations": 1}},
            "num_generations=1 must be at least 2",
        ),
    ],
)  # fmt: skip
def test_keys_of_other_tasks_and_wrong_rewards_are_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe({**values(), **changes})


def test_rewards_are_functions_with_weights(tmp_path):
    (tmp_path / "own.py").write_text("def short(completions, **row):\n    return [1.0 for _ in completions]\n")
    rewards = [*REWARDS[:1], "own.py:short"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values("grpo", rewards=rewards)))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    functions, weights = recipe.reward_functions()
    assert weights == [0.7, 1.0] == recipe.training_config().reward_weights
    assert isinstance(recipe.training_config(), GRPOConfig)
    assert recipe.training_config().rollout_engine == "auto"
    chosen = parse_recipe(values("grpo", rewards=["exact-match"], rollouts={"engine": "generate"}))
    assert chosen.training_config().rollout_engine == "generate"
    assert functions[0](completions=[" 7 ", "8"], answer=["7", "9"]) == [1.0, 0.0]
    assert functions[1](completions=["a"]) == [1.0]


def test_a_sweep_is_for_tasks_whose_runs_share_a_pass_or_an_engine(tmp_path):
    with pytest.raises(ConfigError, match="sweep: belongs to task sft, grpo, rloo, and the task here is dpo"):
        parse_sweep(values(sweep={"grid": {"training.learning_rate": [1e-4, 1e-5]}}), tmp_path / "r.yaml")


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(3)
    model = get_peft_model(
        LlamaForCausalLM(llama_config()), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], lora_dropout=0.1)
    )
    model.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_a_saved_adapter_is_trained_on_as_it_is(saved):
    recipe = parse_recipe(values(adapter={"from": saved, "lora_dropout": 0.3}))
    config = recipe.adapter_config()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.3)
    assert recipe.method == "lora"
    assert isinstance(recipe.training_config(), DPOConfig)
    parse_recipe(values(adapter={"from": saved, "method": "lora", "r": 3, "target_modules": ["q_proj"]}))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 4}, r"adapter.r: 4 here, 3 in .*saved\. An adapter that is trained on stays the adapter that it is"),
        ({"r": 4, "lora_alpha": 7}, "adapter.r: 4 here, 3 in .*; adapter.lora_alpha: 7 here, 5 in"),
        ({"target_modules": ["v_proj"]}, r"adapter.target_modules: \['v_proj'\] here, \['q_proj'\] in"),
        ({"method": "ia3"}, "adapter.method: ia3 here, lora in"),
        ({"method": "dora"}, "adapter.method: dora here, lora in"),
        ({"method": "full"}, "adapter.method: full here, lora in"),
        ({"method": "lroa"}, "adapter.method: 'lroa' must be one of"),
        ({"metod": "dora"}, "adapter.metod: unknown key; the nearest is 'method'"),
        ({"rank": 3}, "adapter.rank: unknown key; the nearest is 'r'"),
    ],
)
def test_what_a_saved_adapter_is_may_not_differ(saved, adapter, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(values(adapter={"from": saved, **adapter}))


def test_all_linear_is_compared_with_the_modules_of_a_saved_adapter(saved, tmp_path):
    """Its file lists names, which are those of all linear layers or not as the base has it."""
    with pytest.raises(ConfigError, match=r"target_modules: all-linear here, and .*saved differs .* in \d+ modules"):
        with_saved_adapter({"from": saved, "target_modules": "all-linear"}, "sft", LlamaForCausalLM(llama_config()))
    whole, base = str(tmp_path / "whole"), LlamaForCausalLM(llama_config())
    get_peft_model(base, LoraConfig(r=3, target_modules="all-linear")).save_pretrained(whole)
    recipe = parse_recipe(values(adapter={"from": whole, "target_modules": "all-linear"}))
    assert "gate_proj" in recipe.adapter_config().target_modules
    with_saved_adapter(recipe.adapter, recipe.task, LlamaForCausalLM(llama_config()))
    front = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(LlamaForCausalLM(llama_config()), front).save_pretrained(whole)
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: unknown key"):
        parse_recipe(values(adapter={"from": whole, "target_modules": "all-linear"}))


def test_target_modules_that_mean_the_same_modules_are_those_of_a_saved_adapter(saved, tmp_path):
    pattern = r".*\.(q|v)_proj"
    by_pattern = str(tmp_path / "by-pattern")
    get_peft_model(LlamaForCausalLM(llama_config()), LoraConfig(r=3, target_modules=pattern)).save_pretrained(
        by_pattern
    )
    for place, given in ((saved, r".*self_attn\.q_proj"), (by_pattern, ["v_proj", "q_proj"]), (by_pattern, pattern)):
        recipe = parse_recipe(values(adapter={"from": place, "target_modules": given}))
        with_saved_adapter(recipe.adapter, recipe.task, LlamaForCausalLM(llama_config()))
    for place, given in ((saved, pattern), (by_pattern, ["q_proj"])):
        recipe = parse_recipe(values(adapter={"from": place, "target_modules": given}))
        with pytest.raises(
            ConfigError, match=r"target_modules: .* here, and .* differs from that in 2 modules, such as"
        ):
            with_saved_adapter(recipe.adapter, recipe.task, LlamaForCausalLM(llama_config()))


def test_a_place_without_an_adapter_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"^recipe: adapter\.from: .*no-such-folder does not exist") as error:
        parse_recipe(values(adapter={"from": str(tmp_path / "no-such-folder")}))
    assert "training" not in str(error.value)
    with pytest.raises(ConfigError, match=r"adapter\.from: 3 must be the folder of a saved adapter"):
        parse_recipe(values(adapter={"from": 3}))


def test_another_method_goes_on_under_its_own_name(tmp_path):
    get_peft_model(LlamaForCausalLM(llama_config()), IA3Config()).save_pretrained(tmp_path)
    recipe = parse_recipe(values("sft", adapter={"from": str(tmp_path)}))
    assert recipe.method == "ia3"
    assert recipe.training_config().learning_rate == IA3Config.usual_learning_rate


def test_experts_are_named_by_one_key() -> None:
    def adapter(**given: object) -> object:
        recipe = {"model": {"source": "m"}, "data": {"train": "t.jsonl"}, "adapter": given, "output": "o"}
        return parse_recipe(recipe).adapter_config()

    assert adapter(experts=True) == LoraConfig(target_modules="all-linear", target_parameters=["all-experts"])
    both = adapter(experts=True, target_modules=["q_proj"], target_parameters=["gate.weight"])
    assert both == LoraConfig(target_modules=["q_proj"], target_parameters=["gate.weight", "all-experts"])
    assert adapter(experts=False) == adapter()
    with pytest.raises(ConfigError, match=r"adapter.experts: 'all' must be true \(stacks of experts"):
        adapter(experts="all")


@pytest.mark.parametrize(("content", "message"), [(b" \n", "is empty"), (b"\xff", "is not text in UTF-8")])
def test_a_teachers_prompt_without_text_is_told(content, message, tmp_path):
    (tmp_path / "shots.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=f"distill.teacher_prompt: shots.txt {message}"):
        parse_recipe(values("distill"))


def test_a_teachers_prompt_is_read_from_the_recipes_folder(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values("distill")))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load_recipe(tmp_path / "recipe.yaml").training_config().teacher_prompt == "1: one\n"
