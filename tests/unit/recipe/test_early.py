"""Recipes that are refused before torch is imported."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
from tests.unit.recipe.test_recipe import values

from veneer.errors import ConfigError
from veneer.recipe.early import refuse_early
from veneer.recipe.recipe import parse_recipe
from veneer.train.sweep.recipe import parse_sweep

USUAL = {"adapter": {"method": "lora", "r": 4}, "training": {"max_steps": 9, "learning_rate": 1e-4}}


@pytest.mark.parametrize(
    "changes",
    [
        {"trianing": {"learning_rate": 1}},
        {"model": {"source": "x", "quantisation": "nf4", "dtype": "int3"}, "seeds": 3, **USUAL},
        {"data": {"train": "a", "prompt": "{q}", "eval_fraction": 2}, "output": None},
        {"model": "x", "adapter": "lora"},
        {"model": {"source": "x", "double_quantization": True}, **USUAL},
        {"seeds": 3, "training": {"learning_rat": 1e-4, "max_length": "long"}},
        {"adapter": {"method": "ia3", "r": 4, "path": "x", "target_modules": 3}},
        {"adapter": {"method": "vear"}, "training": {"optim": "galore_adamw"}},
        {"task": "grpo", "adapter": {"method": "dora", "use_dora": False}, "training": {"loss_type": 3, "packing": 1}},
        {"adapter": {"method": "prompt_tuning", "rank": 3}, "training": {"max_steps": 0, "adam_beta2": 1}},
        {"adapter": {"from": "", "method": "lroa"}},
        {"adapter": {"lora_alpha": -2}},
    ],
)
def test_all_that_values_and_keys_tell_is_told_early_and_whole(changes):
    with pytest.raises(ConfigError) as whole:
        parse_recipe(values(**changes))
    with pytest.raises(ConfigError) as early:
        refuse_early(values(**changes))
    assert str(early.value) == str(whole.value)


@pytest.mark.parametrize("changes", [{}, USUAL, {"training": {"optim": "adamw_8bit", "save_strategy": False}}])
def test_a_recipe_without_problems_is_not_refused_early(changes):
    refuse_early(values(**changes))


NAMES = ("model.layers.0.q_proj.weight", "model.layers.0.k_proj.weight", "model.layers.0.v_proj.bias", "alone")


@pytest.fixture
def base(tmp_path):
    """The folder of a model as far as headers tell of it."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    table = json.dumps({name: {} for name in NAMES}).encode()
    (folder / "model.safetensors").write_bytes(len(table).to_bytes(8, "little") + table)
    return folder


def sharded(base):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(NAMES, "a")}))


def renamed(base):
    (base / "config.json").write_text('{"model_type": "mixtral"}')


def broken(base):
    (base / "model.safetensors").write_bytes(b"short")


@pytest.mark.parametrize(
    ("change", "targets", "judged"),
    [
        (None, ["w_proj"], True),
        (sharded, ["w_proj", "0.v_proj"], True),
        (None, ["layers.0.q_proj"], False),
        (None, ["lm_head", "score", "embed_tokens"], False),  # tied or new: in no file
        (None, ".*w_proj", False),
        (renamed, ["w_proj"], False),
        (broken, ["w_proj"], False),
    ],
)
def test_target_modules_are_checked_against_the_headers_of_a_base(base, change, targets, judged):
    if change is not None:
        change(base)
    asked = values(model={"source": str(base)}, adapter={"target_modules": targets})
    told = pytest.raises(ConfigError, match=r"'w_proj' matches no module of .*; the nearest: v_proj, q_proj, k_proj")
    with told if judged else nullcontext():
        refuse_early(asked)


def test_a_full_path_fits_a_base_that_was_saved_without_its_prefix(base):
    table = json.dumps({"layers.0.q_proj.weight": {}, "h.0.c_fc.weight": {}}).encode()
    (base / "model.safetensors").write_bytes(len(table).to_bytes(8, "little") + table)
    paths = ["model.layers.0.q_proj", "transformer.h.0.c_fc"]
    refuse_early(values(model={"source": str(base)}, adapter={"target_modules": paths}))
    wrong = values(model={"source": str(base)}, adapter={"target_modules": [*paths, "model.layers.1.q_proj"]})
    with pytest.raises(ConfigError, match=r"'model.layers.1.q_proj' matches no module") as told:
        refuse_early(wrong)
    assert str(told.value).count("matches no module") == 1


@pytest.mark.parametrize("method", ["prompt_tuning", "full"])
def test_targets_of_a_method_that_has_none_are_one_problem(base, method):
    adapter = {"method": method, "target_modules": ["w_proj"]}
    with pytest.raises(ConfigError) as told:
        refuse_early(values(model={"source": str(base)}, adapter=adapter))
    assert str(told.value).count("adapter.target_modules") == 1


def test_missing_files_are_told_with_what_else_is_wrong_as_a_run_begins(tmp_path):
    data = {
        "train": str(tmp_path / "a.jsonl"),
        "eval": 3,
        "more": [{"source": str(tmp_path / "b.csv"), "wieght": 2}, 7],
    }
    with pytest.raises(
        ConfigError, match=r"(?s)data.eval: 3 does not fit.*data.train: there is no file .*a.jsonl.*b.csv"
    ):
        refuse_early(values(data=data), begins=True)
    missing = values(data={"train": str(tmp_path / "a.jsonl")}, output=str(tmp_path / "run"))
    refuse_early(missing)
    with pytest.raises(ConfigError, match="there is no file"):
        refuse_early(missing, begins=True)
    (tmp_path / "run").mkdir()
    refuse_early(missing, begins=True)  # told with what is wrong with the output


def test_the_members_of_a_sweep_are_checked_early_as_they_are_read(tmp_path):
    sweep = {"members": [{"name": "a", "adapter.rr": 3}, {"name": "b", "model.dtype": "float32"}, {"name": "b"}]}
    with pytest.raises(ConfigError) as whole:
        parse_sweep(values(sweep=sweep), tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError) as early:
        refuse_early(values(sweep=sweep), str(tmp_path / "recipe.yaml"))
    assert str(early.value) == str(whole.value)
    assert "adapter.rr: unknown key" in str(early.value)
    assert "sweep: several members are called ['b']" in str(early.value)
    with pytest.raises(ConfigError, match=r"sweep.grid.adapter.r: 4 must be a list of values to try"):
        refuse_early(values(sweep={"grid": {"adapter.r": 4}}))
    refuse_early(values(sweep={"grid": {"adapter.r": [4, 8]}}))


def test_a_sweep_says_which_engines_and_schedulers_there_are(tmp_path):
    with pytest.raises(ConfigError) as raised:
        refuse_early(values(sweep={"engine": "rey", "scheduler": "hyperband", "reduction": 1}))
    told = str(raised.value)
    assert "sweep: must hold members" in told
    assert "sweep.engine: 'rey' is unknown: it is one of process, ray. Take one of them." in told
    assert "sweep.scheduler: 'hyperband' is unknown: it is one of none, asha" in told
    assert "sweep.reduction: 1 is no whole number of at least 2" in told
    grid = {"adapter.r": [4, 8]}
    with pytest.raises(ConfigError, match="only the scheduler asha reads it"):
        refuse_early(values(sweep={"grid": grid, "reduction": 2}))
    asha = {"grid": grid, "scheduler": "asha", "reduction": 2, "engine": "ray"}
    sweep = parse_sweep(values(sweep=asha), tmp_path / "recipe.yaml")
    assert (sweep.engine, sweep.scheduler, sweep.reduction) == ("ray", "asha", 2)
    with pytest.raises(ConfigError, match="save_only_model saves no optimizer state"):
        parse_sweep(values(sweep={**asha, "members": [{"training.save_only_model": True}]}), tmp_path / "recipe.yaml")


def test_a_wrong_recipe_is_told_without_importing_torch(written, base):
    adapter = {"method": "dora", "rank": 3, "target_modules": ["w_proj", "q_proj", "lm_head"]}
    wrong = values(adapter=adapter, training={"max_steps": 0, "learning_rat": 1}, model={"source": str(base)})
    path = written({**wrong, "modle": {}})
    code = "import sys; from veneer.cli.app import main; sys.argv = ['veneer', 'train', sys.argv[1]]; import atexit; "
    code += "atexit.register(lambda: print({'torch', 'transformers', 'trl'} & set(sys.modules))); main()"
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "set()\n")
    lines = [line.strip().split(":")[0].strip("\"'") for line in path.read_text().splitlines()]
    told = [f"  line {lines.index(key) + 1}: " for key in ("modle", "rank", "learning_rat", "max_steps")]
    assert result.stderr == (
        f"error: {path}: 6 problems\n"
        f"{told[0]}modle: unknown key; the nearest is 'model'\n"
        f"{told[1]}adapter.rank: unknown key; the nearest is 'r'\n"
        f"{told[2]}training.learning_rat: unknown key; the nearest is 'learning_rate'\n"
        f"{told[3]}training.max_steps: 0 must be at least 1, or -1 to train num_train_epochs\n"
        f"  line {lines.index('target_modules') + 1}: adapter.target_modules: 'w_proj' matches no module of {base}; "
        "the nearest: v_proj, q_proj, k_proj\n"
        f"  line {lines.index('train') + 1}: data.train: there is no file rows.jsonl\n"
    )
