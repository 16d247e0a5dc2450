"""Combining whole checkpoints: mergekit's values, any shards, and the memory of a few tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launch import program
from veneer.combine.task_vectors import TaskVectors
from veneer.errors import CompositionError, FormatError
from veneer.export.combined import CombineOptions, combine_checkpoints

GOLDEN = Path(__file__).parents[2] / "golden" / "mergekit" / "merges.safetensors"
SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 1}


def golden() -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    sets: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(GOLDEN).items():
        name, tensor = key.split(":")
        sets.setdefault(name, {})[tensor] = value
    with safe_open(GOLDEN, "pt") as file:
        return sets, file.metadata()


SETS, FACTS = golden()
CASES = json.loads(FACTS["cases"])
WEIGHTS = json.loads(FACTS["weights"])


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The base and two models tuned from it, in several shards."""
    config = LlamaConfig(**SIZES, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=False)
    for name in ("base", "a", "b"):
        model = LlamaForCausalLM(config)
        model.load_state_dict(SETS[name])
        model.save_pretrained(tmp_path / name, max_shard_size="3KB")
        (tmp_path / name / "tokenizer.json").write_text(name)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    return {name: tmp_path / name for name in ("base", "a", "b")}


def pairs(folders: dict[str, Path]) -> list[tuple[str | Path, float]]:
    return list(zip((folders["a"], folders["b"]), WEIGHTS, strict=True))


def plan_of(case: dict[str, object]) -> TaskVectors:
    how = case["merge_method"]
    renamed = {"normalize": case.get("normalize"), "scale": case.get("lambda", 1.0), "density": case.get("density")}
    return TaskVectors(how=how, **renamed)


@pytest.mark.parametrize("case", CASES)
def test_equals_mergekit(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    n_bytes = combine_checkpoints(folders["base"], pairs(folders), tmp_path / "out", plan_of(CASES[case]))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == SETS[case].keys()
    assert n_bytes == 4 * sum(value.numel() for value in found.values())
    for name, value in SETS[case].items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_companions_are_the_bases_and_shards_are_as_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    options = CombineOptions(max_shard_bytes=2_000)
    combine_checkpoints(
        folders["base"],
        pairs(folders),
        tmp_path / "out",
        TaskVectors(),
        options=options,
        on_progress=lambda *event: told.append(event),
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "base"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert told == [(i + 1, len(SETS["base"])) for i in range(len(SETS["base"]))]


def test_a_draw_depends_on_the_seed_and_not_on_the_shards(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for name, seed, size in (("one", 3, 2_000), ("same", 3, 9_999_999), ("other", 4, 2_000)):
        plan = TaskVectors(how="dare_linear", density=0.5, seed=seed)
        options = CombineOptions(max_shard_bytes=size)
        combine_checkpoints(folders["base"], pairs(folders), tmp_path / name, plan, options=options)
        found[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
    assert all(torch.equal(found["same"][name], value) for name, value in found["one"].items())
    assert not all(torch.equal(found["other"][name], value) for name, value in found["one"].items())


def test_what_does_not_fit_is_told_and_nothing_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = dict(SETS["b"])
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:11].clone()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text((folders["b"] / "config.json").read_text())
    save_file(tensors, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(FormatError) as told:
        combine_checkpoints(folders["base"], [(tmp_path / "odd", 1.0)], tmp_path / "out", TaskVectors())
    for part in ("'model.norm.weight' is missing", "'model.norm.scale' is not in the base", "(11, 12) instead of"):
        assert part in str(told.value)
    with pytest.raises(CompositionError, match="at least one"):
        combine_checkpoints(folders["base"], [], tmp_path / "out", TaskVectors())
    assert not (tmp_path / "out").exists()


def test_codes_that_differ_are_not_added(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, code in (("base", 3), ("a", 5)):
        for shard in folders[name].glob("model*"):
            shard.unlink()
        save_file({"codes": torch.full((7,), code, dtype=torch.uint8)}, folders[name] / "model.safetensors")
    with pytest.raises(FormatError, match=r"uint8 and differs.*dense"):
        combine_checkpoints(folders["base"], [(folders["a"], 1.0)], tmp_path / "out", TaskVectors())
    combine_checkpoints(folders["base"], [(folders["base"], 1.0)], tmp_path / "out", TaskVectors())
    assert load_file(tmp_path / "out" / "model.safetensors")["codes"].tolist() == [3] * 7


MEASURE = """
import sys
from pathlib import Path
import torch, transformers
from peak_memory import give_back_what_is_freed, high_water
from veneer.combine.task_vectors import TaskVectors
from veneer.export.combined import combine_checkpoints

give_back_what_is_freed()
ties = TaskVectors(how="ties", density=0.4)
for size in ("small", "large"):
    before = high_water()
    base, a, out = (Path(sys.argv[1]) / size / name for name in ("base", "a", "out"))
    combine_checkpoints(base, [(a, 0.7), (a, 0.2)], out, ties)
print(high_water() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_memory_is_that_of_a_few_tensors_not_of_a_model(tmp_path: Path) -> None:
    for name, d, n_layers in (("small", 32, 1), ("large", 512, 15)):
        sizes = {"hidden_size": d, "intermediate_size": d, "num_hidden_layers": n_layers, "vocab_size": 97}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        model.save_pretrained(tmp_path / name / "a")
    model_bytes = sum(p.numel() * 2 for p in model.parameters())
    done = program(MEASURE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) < model_bytes / 2
