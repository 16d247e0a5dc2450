"""Adapters whose files differ in values alone: read and packed by a table, they are what reading each anew gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.serve.conftest import make_model, save_adapter

from veneer import BottleneckConfig, IA3Config, LoraConfig
from veneer.errors import FormatError
from veneer.serve.adapters import layouts
from veneer.serve.runners import program_runner
from veneer.serve.runners.program_runner import ProgramAdapter, ProgramRunner, proved

EVEN = ["q_proj", "k_proj", "v_proj", "down_proj"]


def make_runner(dtype: torch.dtype = torch.float32) -> ProgramRunner:
    model = make_model("wide").to(dtype)
    return ProgramRunner(model, proved(model, 64), 5, 16)


def factors(adapter: Any) -> list[torch.Tensor]:
    assert isinstance(adapter, ProgramAdapter)
    return [own.pairs.factors for own in adapter.packed.linears if own is not None]


@pytest.fixture
def read_anew(monkeypatch) -> list[Path]:
    """The folders that were read tensor by tensor."""
    found: list[Path] = []
    read = program_runner.read_effects

    def counted(*given: Any, folder: Path) -> Any:
        found.append(folder)
        return read(*given, folder=folder)

    monkeypatch.setattr(program_runner, "read_effects", counted)
    return found


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtype", "stored", "at_once"),
    [(F32, F32, 100), (F32, F16, 1 << 20), (BF16, F32, 1 << 20), (BF16, BF16, 100)],
)
def test_the_second_is_what_it_is_when_it_is_read_anew(dtype, stored, at_once, tmp_path, read_anew, monkeypatch):
    monkeypatch.setattr(layouts, "_AT_ONCE", at_once)
    config = LoraConfig(r=3, target_modules=EVEN, rank_pattern={"q_proj": 5}, use_rslora=True, lora_alpha=7)
    folders = [save_adapter(tmp_path / str(i), config, "wide", seed=i) for i in range(3)]
    for folder in folders:
        file = folder / "adapter_model.safetensors"
        save_file({key: value.to(stored) for key, value in load_file(file).items()}, file, {"format": "pt"})
    runner = make_runner(dtype)
    found = [runner.read(folder) for folder in folders]
    assert read_anew == folders[:1]
    anew = [make_runner(dtype).read(folder) for folder in folders]
    assert len(factors(found[0])) == 2 * 2
    for mine, other in zip(found, anew, strict=True):
        assert all(map(torch.equal, factors(mine), factors(other)))
        assert [own and own.pairs.ranks for own in mine.packed.linears] == [
            own and own.pairs.ranks for own in other.packed.linears
        ]
        assert mine.n_bytes == other.n_bytes > 0
    assert not torch.equal(factors(found[0])[0], factors(found[1])[0])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, target_modules=EVEN, use_dora=True),
        LoraConfig(r=3, target_modules=EVEN, lora_bias=True),
        LoraConfig(r=3, target_modules=EVEN, modules_to_save=["lm_head"]),
        LoraConfig(r=3, target_modules=[*EVEN, "embed_tokens"]),
        LoraConfig(r=3, target_modules=EVEN, trainable_token_indices=[1, 7]),
        IA3Config(target_modules=EVEN, feedforward_modules=["down_proj"]),
        BottleneckConfig(reduction_factor=5),
    ],
    ids=lambda config: config.peft_type + str(getattr(config, "use_dora", "")),
)
def test_what_is_more_than_factors_is_read_anew(config, tmp_path, read_anew):
    folders = [save_adapter(tmp_path / str(i), config, "wide", seed=i) for i in range(2)]
    runner = make_runner()
    for folder in folders:
        runner.read(folder)
    assert read_anew == folders


def damage(file: Path, how: str) -> None:
    raw = file.read_bytes()
    if how == "nan":
        tensors = load_file(file)
        tensors[sorted(tensors)[-1]][2, 1] = float("nan")
        save_file(tensors, file, {"format": "pt"})
    else:
        file.write_bytes(raw[:-7] if how == "cut" else raw + b"7")


@pytest.mark.parametrize("how", ["nan", "cut", "longer"])
def test_what_is_wrong_with_a_file_is_told_as_ever(how, tmp_path):
    config = LoraConfig(r=3, target_modules=EVEN)
    folders = [save_adapter(tmp_path / str(i), config, "wide", seed=i) for i in range(3)]
    damage(folders[1] / "adapter_model.safetensors", how)
    runner, said = make_runner(), []
    runner.read(folders[0])
    for each in (runner, make_runner()):
        with pytest.raises(FormatError) as caught:
            each.read(folders[1])
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert factors(runner.read(folders[2]))


def test_a_folder_that_is_gone_is_told_as_ever(tmp_path):
    runner = make_runner()
    runner.read(save_adapter(tmp_path / "there", LoraConfig(r=3, target_modules=EVEN), "wide"))
    with pytest.raises(FormatError):
        runner.read(tmp_path / "gone")


def test_a_layout_is_remembered_only_where_its_table_gives_the_same(tmp_path):
    """Files may be replaced between reading them and looking at their header."""
    config = LoraConfig(r=3, target_modules=EVEN)
    first, other = (save_adapter(tmp_path / str(i), config, "wide", seed=i) for i in range(2))
    runner = make_runner()
    effects = program_runner.read_effects(runner._lookup, runner.interpreter.program, folder=first)
    packed, packed_of = runner.interpreter.packed_of(effects)
    fresh = layouts.Layouts()
    fresh.learn(other, packed.linears, packed_of)
    assert fresh.read(other) is None
    fresh.learn(first, packed.linears, packed_of)
    assert fresh.read(other) is not None


def test_the_last_few_layouts_are_kept(tmp_path, read_anew, monkeypatch):
    monkeypatch.setattr(layouts, "_KEPT", 2)
    folders = [save_adapter(tmp_path / str(r), LoraConfig(r=r, target_modules=EVEN), "wide", seed=r) for r in (3, 5, 7)]
    runner = make_runner()
    for folder in (*folders, *folders[1:], folders[0]):
        runner.read(folder)
    assert read_anew == [*folders, folders[0]]


def test_what_changes_no_layout_is_not_looked_at(tmp_path, read_anew):
    """The base's name, dropout, and the order in which modules are listed; a rank's alpha is looked at, and so is the
    order of patterns, of which the first counts."""
    config = LoraConfig(r=3, target_modules=EVEN)
    folders = [save_adapter(tmp_path / str(i), config, "wide", seed=i) for i in range(6)]
    alphas = {EVEN[0]: 4, f".*{EVEN[0]}": 7}
    told = (
        {"revision": "x", "lora_dropout": 0.3}, {"target_modules": EVEN[::-1]}, {"lora_alpha": 5},
        {"alpha_pattern": alphas}, {"alpha_pattern": dict(reversed(alphas.items()))},
    )  # fmt: skip
    for folder, changes in zip(folders[1:], told, strict=True):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    runner = make_runner()
    found = [runner.read(folder) for folder in folders]
    assert read_anew == [folders[0], *folders[3:]]
    for mine, folder in zip(found, folders, strict=True):
        assert all(map(torch.equal, factors(mine), factors(make_runner().read(folder))))
