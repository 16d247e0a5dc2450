"""Adapter folders that are damaged, foreign or hostile: clear errors, and nothing is changed by them."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from veneer import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from veneer.contract import source as adapter_source
from veneer.errors import AdapterNameError, ConfigError, DiskError, FormatError

KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


def base(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 20, "intermediate_size": 23, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 2, **changes})).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_peft_model(base(), LoraConfig(r=3, lora_alpha=7, init_lora_weights=False)).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, **arguments: Any) -> str:
    """The one error that loading gives; the model is as it was after it."""
    model = base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormatError) as caught:
        PeftModel.from_pretrained(model, folder, **arguments)
    assert type(model) is LlamaForCausalLM
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(caught.value)


def test_one_error_lists_everything_that_does_not_fit(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[KEY.format(0, "q_proj", "A")]
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 20)
        tensors[KEY.format(0, "v_proj", "B")] = torch.ones(20, 5)
        tensors[KEY.format(1, "v_proj", "B")][3, 1] = torch.inf

    change_tensors(folder, change)
    lines = refused(folder).splitlines()
    assert lines[1:] == [
        "  missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "  unexpected: base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
        "  shape (20, 5), but the model needs (20, 3): base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight",
        "  holds NaN or infinity: base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight",
    ]


def test_a_base_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"shape \(3, 20\), but the model needs \(3, 12\)"):
        PeftModel.from_pretrained(base(hidden_size=12), folder)
    with pytest.raises(FormatError, match=r"unexpected: base_model\.model\.model\.layers\.1\."):
        PeftModel.from_pretrained(base(num_hidden_layers=1), folder)
    with pytest.raises(FormatError, match=r"missing: base_model\.model\.model\.layers\.2\."):
        PeftModel.from_pretrained(base(num_hidden_layers=3), folder)


def test_an_adapter_of_a_larger_model_is_told_by_size_and_a_few_names(tmp_path: Path) -> None:
    made = get_peft_model(base(num_hidden_layers=7), LoraConfig(r=3))
    made.save_pretrained(tmp_path)
    told = refused(tmp_path)
    first, *lines = told.splitlines()
    assert "trained for 7 layers of width 20, this model has 2 of 20" in first
    assert len(lines) == 1  # the sizes are the reason, so that one name is enough
    assert "unexpected: " in lines[0]
    assert lines[0].endswith(", and 19 more of these")  # of five more blocks with two modules of two factors
    with pytest.raises(FormatError, match="for 7 layers of width 20, this model has 2 of 12"):
        PeftModel.from_pretrained(base(hidden_size=12), tmp_path)


def test_a_failed_reload_leaves_the_adapter(folder: Path) -> None:
    model = PeftModel.from_pretrained(base(), folder)
    before = get_peft_model_state_dict(copy.deepcopy(model))
    change_tensors(folder, lambda tensors: tensors.update({KEY.format(1, "v_proj", "B"): torch.ones(20, 5)}))
    with pytest.raises(FormatError, match="does not fit"):
        model.load_adapter(folder, "default")
    with pytest.raises(FormatError, match="does not fit"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize("cut", [0, 5, 200, -7])
def test_truncated(folder: Path, cut: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "is damaged or was cut off" in refused(folder)


@pytest.mark.parametrize(
    "lie",
    [
        lambda h: h.update({next(iter(h)): {"dtype": "F32", "shape": [3, 20], "data_offsets": [0, 9_999_999_999]}}),
        lambda h: h.update(
            {next(k for k in h if k != "__metadata__"): {"dtype": "F32", "shape": [3, 21], "data_offsets": [0, 240]}}
        ),
        lambda h: h.update({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}),
    ],
    ids=["offsets", "shape", "dtype"],
)
def test_a_header_that_lies(folder: Path, lie: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    lie(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    assert "is damaged or was cut off" in refused(folder)


def test_a_header_length_that_lies(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "is damaged or was cut off" in refused(folder)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "a pickle, which can run any code" in refused(folder)
    (folder / "adapter_model.bin").unlink()
    assert "holds no adapter_model.safetensors" in refused(folder)


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors only"):
        get_peft_model(base(), LoraConfig()).save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alfa": 3}, "unknown key 'lora_alfa' (nearest: 'lora_alpha')"),
        (
            {"megatron_config": {"rank": 2}},
            "megatron_config={'rank': 2} asks for a feature of PEFT that is not supported here",
        ),
        ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]] asks for a feature"),
        ({"peft_type": "XLORA"}, "peft_type='XLORA' is not a known method"),
        ({"peft_type": None}, "peft_type=None is not a known method"),
        ({"r": -2}, "r=-2"),
        ({"rank_pattern": 3}, "adapter_config.json: "),
    ],
)
def test_configs_that_are_not_understood(folder: Path, values: Any, message: str) -> None:
    change_config(folder, **values)
    assert message in refused(folder)


def test_every_problem_of_a_config_is_in_one_error(folder: Path) -> None:
    change_config(folder, lora_alfa=3, megatron_config={"rank": 2})
    message = refused(folder)
    assert "lora_alfa" in message
    assert "megatron_config" in message


def test_neutral_values_of_peft_and_of_its_versions_are_read(folder: Path) -> None:
    change_config(
        folder, eva_config=None, loftq_config=None, peft_version="0.9.0", qalora_group_size=32, megatron_core="x"
    )
    PeftModel.from_pretrained(base(), folder)


def test_a_file_of_a_config_is_read_as_its_fields(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj", "q_proj"], alpha_pattern={"q_proj": 5})
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    assert LoraConfig.from_json_file(file) == config.to_dict()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    assert LoraConfig.from_json_file(str(file)) == config.to_dict()
    told = r"nowhere\.json cannot be read \(No such file or directory\): give the path of a readable nowhere\.json"
    with pytest.raises(FormatError, match=told):
        LoraConfig.from_json_file(tmp_path / "nowhere.json")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refused(folder)
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe{")
    assert "not text in UTF-8" in refused(folder)
    (folder / "adapter_config.json").unlink()
    assert "not the folder of an adapter" in refused(folder)


@pytest.mark.parametrize("opening", ["[", '{"a": '], ids=["lists", "objects"])
def test_a_config_nested_too_deeply(folder: Path, opening: str) -> None:
    (folder / "adapter_config.json").write_text('{"target_modules": ' + opening * 100_000)
    assert "nested too deeply to be read" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.complex64])
def test_values_in_a_dtype_that_no_adapter_is_trained_in(folder: Path, dtype: torch.dtype) -> None:
    key = KEY.format(1, "v_proj", "B")
    change_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    said = refused(folder)
    assert f"dtype {str(dtype).removeprefix('torch.')}, but an adapter's values must have one of float32, " in said
    assert said.endswith(key)


@pytest.mark.parametrize("subfolder", ["..", "x/../..", "/etc"])
def test_a_subfolder_does_not_leave_the_folder(folder: Path, subfolder: str) -> None:
    assert "leads out of the adapter's folder" in refused(folder, subfolder=subfolder)


def test_a_subfolder(folder: Path) -> None:
    assert PeftModel.from_pretrained(base(), folder.parent, subfolder="a").active_adapter == "default"
    assert PeftConfig.from_pretrained(str(folder.parent), subfolder="a") == PeftConfig.from_pretrained(str(folder))
    assert isinstance(LoraConfig(), PeftConfig)


def test_unknown_arguments_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['revison'\]; allowed.*revision"):
        PeftModel.from_pretrained(base(), folder, revison="x")


def test_the_folder_of_a_run_points_at_the_adapter_in_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "adapter")
    with pytest.raises(FormatError, match=r"run holds no adapter_config.json.*run/adapter holds one, give that folder"):
        PeftModel.from_pretrained(base(), tmp_path / "run")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")


def test_hub_ids_go_through_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder.parent)

    monkeypatch.setattr(adapter_source, "snapshot_download", download)
    PeftModel.from_pretrained(base(), "someone/adapters", subfolder="a", revision="v2", token="t")
    assert (asked["repo"], asked["revision"], asked["token"]) == ("someone/adapters", "v2", "t")
    files = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")
    assert asked["allow_patterns"] == [f"a/{name}" for name in files]


NO_RESPONSE: Any = types.SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError("Got: no connection\nTry again."), "no connection"),
        (
            huggingface_hub.errors.RepositoryNotFoundError("404.\nRepository Not Found", response=NO_RESPONSE),
            "there is no repository of that name, or it is private",
        ),
    ],
)
def test_a_hub_that_does_not_have_it(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def download(repo: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(adapter_source, "snapshot_download", download)
    told = f"no adapter 'someone/adapters': no such folder, and not on the hub: {reason}. "
    told += "Give the folder that training saved, or a hub id"
    assert refused(Path("someone/adapters")) == told


def test_pushing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, **options: Any) -> str:
            folder = Path(options["folder_path"])
            sent.update(options, files=sorted(p.name for p in folder.iterdir()))
            sent["tags"] = huggingface_hub.ModelCard.load(folder / "README.md").data.tags
            return "https://huggingface.co/someone/x/commit/1"

    monkeypatch.setattr("veneer.adapters.saving.HfApi", Api)
    model = get_peft_model(base(), LoraConfig())
    assert model.push_to_hub("someone/x", token="t", commit_message="m").endswith("commit/1")
    assert (sent["repo_id"], sent["token"], sent["commit_message"]) == ("someone/x", "t", "m")
    assert sent["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model.save_pretrained(tmp_path / "y", push_to_hub=True, repo_id="someone/y")
    assert sent["repo_id"] == "someone/y"
    model.push_to_hub("someone/x", commit_description="why")
    assert sent["commit_description"] == "why"
    model.push_to_hub("someone/x", tags=["mine", "sums"], safe_serialization=True, max_shard_size="5GB")
    assert sent["tags"] == ["lora", "mine", "sums", "transformers", "veneer"]
    model.save_pretrained(tmp_path / "z", tags="mine")
    tags = huggingface_hub.ModelCard.load(tmp_path / "z/README.md").data.tags
    assert tags == ["lora", "mine", "transformers", "veneer"]
    sent.clear()
    with pytest.raises(ConfigError, match="safe_serialization=False asks for a pickle"):
        model.push_to_hub("someone/x", safe_serialization=False)
    assert not sent


def test_a_full_disk_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"could not be written \(No space left on device\)"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("n_written", [0, 1])
def test_a_full_disk_leaves_neither_a_folder_nor_one_of_two_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    """The weights fit, the config does not: without both, nothing is replaced."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = get_peft_model(base(), LoraConfig(r=5, init_lora_weights=False))
    written = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > n_written:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for target in (folder, tmp_path / "new" / "adapter"):
        written.clear()
        with pytest.raises(DiskError, match=r"could not be written \(No space left on device\)"):
            model.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_crash_before_the_rename_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PeftModel.from_pretrained(base(), folder)
    before = (folder / "adapter_model.safetensors").read_bytes()
    model.model.layers[0].self_attn.q_proj.adapters["default"]["lora_A"].data.mul_(2)

    def crash(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_unknown_arguments_of_saving_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig())
    with pytest.raises(ConfigError, match=r"unknown arguments \['some_typo'\]; allowed .*'commit_message'"):
        model.save_pretrained(tmp_path / "a", some_typo=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match=r"unknown arguments \['comit_message'\]"):
        model.push_to_hub("someone/x", comit_message="m")


def test_arguments_that_transformers_and_peft_take_when_saving_are_taken(tmp_path: Path) -> None:
    """All of both, as their own signatures have them today."""
    model = get_peft_model(base(), LoraConfig())
    theirs = (inspect.signature(of.save_pretrained).parameters for of in (PreTrainedModel, peft.PeftModel))
    parameters = {name: spec for each in theirs for name, spec in each.items()}
    given = {name: spec.default for name, spec in parameters.items() if spec.default is not inspect.Parameter.empty}
    assert len(given) > 8
    model.save_pretrained(tmp_path / "a", **given)
    assert (tmp_path / "a/adapter_model.safetensors").is_file()


def test_saving_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    model = get_peft_model(base(), LoraConfig())
    with pytest.raises(FormatError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(DiskError, match="cannot be made a folder"):
        model.save_pretrained(tmp_path / "file" / "below")
    with pytest.raises(AdapterNameError, match="'x'"):
        model.save_pretrained(tmp_path / "z", selected_adapters=["x"])


def test_other_processes_do_not_write(tmp_path: Path) -> None:
    get_peft_model(base(), LoraConfig()).save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


def test_a_state_dict_that_was_gathered_elsewhere_is_what_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(r=3))
    gathered = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")[KEY.format(1, "q_proj", "B")]
    assert torch.equal(saved, torch.ones(20, 3))


def test_injected_adapters_are_read_and_set(folder: Path) -> None:
    model = base()
    assert inject_adapter_in_model(LoraConfig(r=3, lora_alpha=7), model, "x") is model
    assert type(model) is LlamaForCausalLM
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".adapters.x." in name
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, tensors, "x")
    back = get_peft_model_state_dict(model, adapter_name="x")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in back)
    ids = torch.arange(11)[None]
    expected = PeftModel.from_pretrained(base(), folder)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)
    with pytest.raises(FormatError, match="missing"):
        set_peft_model_state_dict(model, {}, "x")
    with pytest.raises(AdapterNameError, match=r"no adapter named 'y'; loaded: \['x'\]"):
        get_peft_model_state_dict(model, adapter_name="y")
    with pytest.raises(AdapterNameError, match=r"loaded: \[\]"):
        get_peft_model_state_dict(base())
    with pytest.raises(ConfigError, match="a PeftModel already"):
        inject_adapter_in_model(LoraConfig(), get_peft_model(base(), LoraConfig()), "z")
