"""``veneer combine`` and ``veneer inspect``: what they write is what the algebra says, and bad input is told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from veneer import LoraConfig, OFTConfig, PeftModel, PromptTuningConfig, get_peft_model
from veneer.adapters import chosen
from veneer.contract import MethodConfig

from .conftest import tiny_model, told_early

IDS = torch.tensor([[5, 71, 33, 140, 9, 250]])


@pytest.fixture(scope="session")
def second(model_folder: Path) -> Path:
    """Another rank, rsLoRA's scale, and other layers than the first."""
    return saved(
        model_folder,
        "second",
        LoraConfig(r=5, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )


@pytest.fixture(scope="session")
def decomposed(model_folder: Path) -> Path:
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["q_proj"], init_lora_weights=False)
    return saved(model_folder, "decomposed", config)


@pytest.fixture(scope="session")
def rotated(model_folder: Path) -> Path:
    return saved(model_folder, "rotated", OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False))


def saved(model_folder: Path, name: str, config: MethodConfig) -> Path:
    torch.manual_seed(23)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config)
    model.save_pretrained(model_folder.parent / name)
    return model_folder.parent / name


def weight_of(model_folder: Path, adapter: Path | None, path: str) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.get_submodule(path).weight.detach()


@pytest.mark.parametrize(
    "path", ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
)
def test_linear_is_the_weighted_sum(veneer, model_folder, adapter_folder, second, tmp_path, path):
    result = veneer("combine", adapter_folder, second, "--weights", "0.7, -0.4", "-o", tmp_path / "sum")
    assert result.exit_code == 0, result.output
    assert "exact on all 6 layers" in result.output
    own = weight_of(model_folder, None, path)
    expected = own + sum(
        w * (weight_of(model_folder, a, path) - own) for w, a in ((0.7, adapter_folder), (-0.4, second))
    )
    torch.testing.assert_close(weight_of(model_folder, tmp_path / "sum", path), expected, rtol=1e-4, atol=1e-5)


def test_with_the_base_dora_can_be_combined_and_the_error_is_told(
    veneer, model_folder, adapter_folder, decomposed, tmp_path
):
    result = veneer("combine", adapter_folder, decomposed, "-o", tmp_path / "sum", "--rank", 4, "--base", model_folder)
    assert result.exit_code == 0, result.output
    assert "relative error" in result.output
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    # up_proj, which only the first changes, keeps its rank of 3; on q_proj the sum is brought to 4.
    assert (config["r"], set(config["rank_pattern"].values())) == (3, {4})


def test_a_sum_that_would_lose_much_is_refused_and_names_the_rank_that_does(
    veneer, model_folder, adapter_folder, decomposed, tmp_path
):
    shutil.copytree(decomposed, tmp_path / "rescaled")
    tensors = load_file(decomposed / "adapter_model.safetensors")
    spread = {k: v * torch.linspace(0.5, 2, len(v)) if "magnitude" in k else v for k, v in tensors.items()}
    save_file(spread, tmp_path / "rescaled" / "adapter_model.safetensors")
    arguments = ["combine", adapter_folder, tmp_path / "rescaled", "-o", tmp_path / "sum", "--base", model_folder]
    refused = veneer(*arguments)
    assert refused.exit_code == 2
    told = re.search(r"give rank (\d+), which loses at most 10%.*merge-models", " ".join(refused.output.split()))
    assert told, refused.output
    assert not (tmp_path / "sum").exists()
    for rank, within in ((int(told[1]), True), (int(told[1]) - 1, False)):
        result = veneer(*arguments[:4], tmp_path / str(rank), *arguments[5:], "--rank", rank)
        assert result.exit_code == 0, result.output
        worst = float(re.search(r"q_proj +([\d.]+)%", result.output)[1])
        assert (worst <= 10) == within


@pytest.mark.parametrize("weights", [["0.7", "0.3"], ["0.7", "-0.3"], ["0.7 -0.3"]])
def test_weights_need_no_quotes(veneer, adapter_folder, second, weights, tmp_path):
    options = ["--how", "ties", "--density", 0.5, "-o", tmp_path / "c"]
    result = veneer("combine", adapter_folder, second, "--weights", *weights, *options)
    assert result.exit_code == 0, result.output
    last = veneer("combine", "--how", "cat", "-o", tmp_path / "d", adapter_folder, second, "--weights", *weights)
    assert last.exit_code == 0, last.output


def test_ties_writes_an_adapter_that_loads(veneer, model_folder, adapter_folder, second, tmp_path):
    result = veneer("combine", adapter_folder, second, "--how", "ties", "--density", 0.5, "-o", tmp_path / "ties")
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_folder), tmp_path / "ties")
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "0.5"], "1 numbers for 2 inputs"),
        (["--weights", "a b"], "must be numbers"),
        (["--how", "ties"], "needs a density"),
        (["--how", "slerp"], "how='slerp' must be 'linear', 'cat'"),
    ],
)
def test_bad_combinations_are_told_and_write_nothing(veneer, adapter_folder, second, tmp_path, arguments, message):
    result = veneer("combine", adapter_folder, second, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_what_needs_its_base_says_so(
    veneer, adapter_folder, second, decomposed, other_adapter, tmp_path
):
    kept = second / "adapter_config.json"
    before = kept.read_bytes()
    assert "nothing is overwritten" in veneer("combine", adapter_folder, "-o", second).output
    assert kept.read_bytes() == before
    nowhere = shutil.copytree(decomposed, tmp_path / "nowhere")
    config = nowhere / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    for needy, why in ((nowhere, f"{tmp_path / 'gone'}, is not found"), (other_adapter, "No config names it")):
        needs = f"the adapter {needy} scales or reads the weights of its base: give the base too (--base MODEL). "
        (code, told), (_, other) = told_early(
            [["inspect", str(needy)], ["combine", str(needy), str(needy), "-o", str(tmp_path / "x")]]
        )
        assert (code, needs in told, why in told, needs in other) == (2, True, True, True), told


def test_the_base_that_adapters_name_is_used_where_one_needs_it(
    veneer, model_folder: Path, adapter_folder: Path, decomposed: Path, rotated: Path, tmp_path: Path
) -> None:
    said = f"base: {model_folder}, as the adapters name it"
    for other in (decomposed, rotated):
        own, given = (
            veneer("inspect", adapter_folder, other, "--json", *base) for base in ((), ("--base", model_folder))
        )
        assert (own.exit_code, said in " ".join(own.stderr.split())) == (0, True), own.output
        assert json.loads(own.stdout) == json.loads(given.stdout)
        assert said not in given.stderr
    told = veneer("inspect", adapter_folder, rotated).output
    assert all(f"{folder}: updates by module" in told for folder in (adapter_folder, rotated))
    sums = []
    for name, base in (("own", ()), ("given", ("--base", model_folder))):
        result = veneer("combine", adapter_folder, rotated, "--rank", 4, "-o", tmp_path / name, *base)
        assert (result.exit_code, said in " ".join(result.stderr.split())) == (0, not base), result.output
        sums.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert sums[0] == sums[1]


def test_the_base_that_is_found_is_taken_of_equal_names(
    veneer, model_folder: Path, decomposed: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(decomposed, tmp_path / "elsewhere")
    config, gone = elsewhere / "adapter_config.json", tmp_path / model_folder.name
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(gone)}))
    told = veneer("inspect", elsewhere, decomposed)
    assert told.exit_code == 0, told.output
    assert f"base: {model_folder}, as the adapters name it" in " ".join(told.stderr.split())


def test_a_config_of_lists_where_texts_are_meant_is_told(veneer, decomposed: Path, tmp_path: Path) -> None:
    for field in ("base_model_name_or_path", "peft_type"):
        strange = shutil.copytree(decomposed, tmp_path / field)
        config = strange / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {field: []}))
        for command in (("inspect", strange), ("combine", strange, decomposed, "-o", tmp_path / "sum")):
            told = veneer(*command)
            assert (told.exit_code, field in told.stderr) == (2, True), told.output


def test_a_sum_with_a_rotation_needs_a_rank_and_no_model_is_loaded_to_say_so(
    veneer, model_folder: Path, adapter_folder: Path, rotated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("veneer.adapters.chosen.load_model", loads)
    for base in ((), ("--base", model_folder)):
        result = veneer("combine", adapter_folder, rotated, "-o", tmp_path / "sum", *base)
        said = f"the adapter {rotated} (OFT) rotates or scales inputs or outputs, so that its sum has full rank: give"
        assert (result.exit_code, said in " ".join(result.stderr.split())) == (2, True), result.output


def test_damaged_and_strange_tensors_are_told(veneer, adapter_folder, tmp_path):
    for name, change, message in (
        ("nan", lambda t: t[next(iter(t))].fill_(float("nan")), "NaN or infinity"),
        ("half", lambda t: t.pop(next(k for k in t if "lora_B" in k)), "which is no pair of low-rank factors"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((adapter_folder / "adapter_config.json").read_bytes())
        tensors = load_file(adapter_folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        result = veneer("inspect", folder)
        assert result.exit_code == 2
        assert message in result.output


def test_inspect_tells_norms_and_overlaps_and_draws(veneer, model_folder, adapter_folder, second, tmp_path):
    result = veneer("inspect", adapter_folder, second, "--png", tmp_path / "heat.png", "--json", "--top", 2)
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    first = next(x for x in told["layers"] if x["path"].endswith("0.self_attn.q_proj"))
    path = "model.layers.0.self_attn.q_proj"
    update = weight_of(model_folder, adapter_folder, path) - weight_of(model_folder, None, path)
    assert first["norm"] == pytest.approx(float(update.norm()), rel=1e-4)
    assert first["rank"] == 3
    assert {p["path"] for p in told["pairs"]} == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    alone = tmp_path / "alone.png"
    assert veneer("inspect", adapter_folder, "--png", alone).exit_code == 0
    assert imread(tmp_path / "heat.png").shape[0] > imread(alone).shape[0]  # both are drawn
    table = veneer("inspect", adapter_folder, second)
    assert "sign conflict" in table.output
    for place, message in (("heat.foo", "must end in .png"), ("no/heat.png", "there is no folder")):
        wrong = veneer("inspect", adapter_folder, "--png", tmp_path / place)
        assert (wrong.exit_code, message in wrong.stderr) == (2, True), wrong.output
    with_base = veneer("inspect", adapter_folder, "--base", model_folder, "--json")
    lines = json.loads(with_base.output)["layers"]
    assert next(x for x in lines if x["path"] == path)["norm"] == pytest.approx(first["norm"], rel=1e-4)
    assert [(x["path"], x["rank"]) for x in lines] == [(x["path"], x["rank"]) for x in told["layers"]]


def test_inspect_loads_a_base_once_and_refuses_what_has_no_update_before(
    veneer, model_folder: Path, adapter_folder: Path, decomposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, own = [], chosen.load_model
    monkeypatch.setattr(chosen, "load_model", lambda *args, **how: loads.append(args) or own(*args, **how))
    base = ("--base", model_folder, "--json")
    both = json.loads(veneer("inspect", adapter_folder, decomposed, *base).output)
    assert len(loads) == 1
    assert both["layers"] == json.loads(veneer("inspect", adapter_folder, *base).output)["layers"]
    assert both["pairs"]
    loads.clear()
    prompt = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    prompt.save_pretrained(tmp_path / "prompt")
    for given in ((tmp_path / "prompt",), (adapter_folder, tmp_path / "prompt")):
        refused = veneer("inspect", *given, *base)
        assert (refused.exit_code, "(PROMPT_TUNING) changes no weights" in refused.stderr) == (2, True), refused.output
    assert not loads


def test_a_config_that_lies_about_the_rank(veneer, adapter_folder: Path, second: Path, tmp_path: Path) -> None:
    shutil.copytree(second, tmp_path / "lying")
    config = json.loads((second / "adapter_config.json").read_text())
    (tmp_path / "lying" / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    result = veneer("combine", adapter_folder, tmp_path / "lying", "-o", tmp_path / "sum")
    assert result.exit_code == 2
    assert "where the config says (7, " in " ".join(result.output.split())
    assert not (tmp_path / "sum").exists()


def test_inspect_keeps_every_name_whole_at_80_columns(
    veneer, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = veneer("inspect", adapter_folder).output
    assert "…" not in told
    assert re.search(r"self_attn\.q_proj +2 +[\d.]+ \([\d.]+-[\d.]+\) +[\d.]+ \([\d.]+-[\d.]+\) +3 +\d+%", told), told


def test_the_help_of_eval_keeps_its_defaults(veneer) -> None:
    text = " ".join(veneer("eval", "--help").output.replace("│", " ").split())
    assert all(f"(default: {value})" in text for value in ("256", "1024", "context/2"))


@pytest.fixture(scope="module")
def of_another_base(model_folder: Path) -> Path:
    """A LoRA adapter of a model of another width."""
    folder = model_folder.parent / "narrow"
    tiny_model(hidden=24).save_pretrained(model_folder.parent / "narrow_base")
    base = LlamaForCausalLM.from_pretrained(model_folder.parent / "narrow_base")
    get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_adapters_of_two_bases_and_what_is_none_are_told_before_a_model_is_loaded(
    veneer, model_folder, adapter_folder, of_another_base, tmp_path, monkeypatch
):
    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("veneer.adapters.chosen.load_model", loads)
    nowhere, out = tmp_path / "nowhere", ("-o", tmp_path / "sum")
    based = ("--base", model_folder)
    cases = [
        (("inspect", adapter_folder, of_another_base), "are adapters of two bases"),
        (("inspect", adapter_folder, of_another_base), "narrow_base"),
        (("inspect", adapter_folder, nowhere), "there is no such folder"),
        (("inspect", of_another_base, *based), "does not fit the model"),
        (("inspect", adapter_folder, "--base", nowhere), "no such folder or file"),
        (("inspect", model_folder), "holds no adapter_config.json"),
        (("combine", adapter_folder, of_another_base, *out), "are adapters of two bases"),
        (("combine", adapter_folder, nowhere, *out), "there is no such folder"),
        (("combine", adapter_folder, of_another_base, *based, *out), "does not fit the model"),
        (("combine", adapter_folder, "--weights", "1 2", *out), "give one for each"),
        (("intrinsic", model_folder, "-d", nowhere, *out), "there is no file"),
        (("intrinsic", nowhere, "-d", __file__, *out), "no such folder or file"),
        (("intrinsic", model_folder, "-d", nowhere, "--dims", "0,3", *out), "must be 1 or more"),
    ]
    for command, message in cases:
        result = veneer(*command)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_bases_of_equal_shapes_and_other_names_are_told(veneer, adapter_folder, second, tmp_path):
    renamed = tmp_path / "renamed"
    shutil.copytree(second, renamed)
    config = json.loads((renamed / "adapter_config.json").read_text())
    (renamed / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/else"}))
    for use, command in (
        ("a comparison", ("inspect", adapter_folder, renamed)),
        ("their sum", ("combine", adapter_folder, renamed, "-o", tmp_path / "sum")),
    ):
        result = veneer(*command)
        assert result.exit_code == 0, result.output
        told = " ".join(result.stderr.split())
        assert (
            f"warning: {adapter_folder} was trained on {config['base_model_name_or_path']}, {renamed} was trained on "
            f"someone/else: {use} is meaningless unless these names mean one model" in told
        )
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "warning" not in veneer("inspect", adapter_folder, second).stderr
