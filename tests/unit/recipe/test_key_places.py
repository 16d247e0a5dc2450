"""Problems of a recipe are told with the line of their key, or the option that set it, before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from veneer import LoraConfig
from veneer.errors import ConfigError
from veneer.recipe.key_places import key_places
from veneer.recipe.ranges import OF_LORA, out_of_range

RECIPE = """# a comment
model: {source: smollm2-135m-instruct}
adapter:

  method: lora
  r: 0
training: {max_steps: 1,
  learning_rat: 1}
"""


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("adapter.r: 0 must be at least 1", "line 6: adapter.r: 0 must be at least 1"),
        ("training.learning_rat: unknown key", "line 8: training.learning_rat: unknown key"),
        ("adapter.num_virtual_tokens: is missing", "line 3: adapter.num_virtual_tokens: is missing"),
        ("training.max_steps: 'x'", "--set training.max_steps=x: training.max_steps: 'x'"),
        ("rewards, entry 1: its function is missing", "rewards, entry 1: its function is missing"),
        ("data.train: is missing", "data.train: is missing"),
    ],
)
def test_a_problem_has_the_place_of_its_key(problem, told, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert key_places(tmp_path / "recipe.yaml", ["training.max_steps=x"]).told(problem) == told


def test_an_option_for_a_whole_part_goes_before_the_lines_of_the_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    places = key_places(tmp_path / "recipe.yaml", ["adapter={r: 0}"])
    assert places.told("adapter.r: 0") == "--set adapter={r: 0}: adapter.r: 0"


def test_a_file_that_is_none_has_no_lines(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    assert key_places(tmp_path / "broken.yaml").told("a: x") == "a: x"
    assert key_places(Path("none.yaml")).told("a: x") == "a: x"


def test_a_part_that_holds_itself_or_is_repeated_without_end_is_read_once(tmp_path):
    (tmp_path / "loop.yaml").write_text("adapter: &a\n  r: 0\n  a: *a\n")
    assert key_places(tmp_path / "loop.yaml").lines == {"adapter": 1, "adapter.r": 2, "adapter.a": 3}
    levels = [f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}" for n in range(1, 30)]
    (tmp_path / "many.yaml").write_text("a0: &a0 {x: 1}\n" + "\n".join(levels))
    assert len(key_places(tmp_path / "many.yaml").lines) == 30 + 29 * 9 + 1


@pytest.mark.parametrize(("name", "values"), [("r", (0, -1)), ("lora_dropout", (-0.1, 1.0))])
def test_the_early_ranges_are_those_of_the_config(name, values):
    for value in values:
        assert out_of_range({name: value}, OF_LORA)
        with pytest.raises(ConfigError, match=name):
            LoraConfig(**{name: value})
    for value in {"r": (1,), "lora_dropout": (0.0, 0.99)}[name]:
        assert not out_of_range({name: value}, OF_LORA)
        LoraConfig(**{name: value})


def test_a_rank_of_none_is_refused_without_torch(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code = "import sys; from veneer.cli.app import main; sys.argv = ['veneer', 'train', 'recipe.yaml']; import atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "line 6: adapter.r: 0 must be at least 1" in done.stderr
    assert done.stdout.split() == ["False"]
