"""The places that a model comes from, and the message where it does not come."""

from __future__ import annotations

import resource
import sys
import urllib.error
from collections.abc import Callable
from contextlib import nullcontext
from email.message import Message
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from veneer.disk.safetensors import header_bytes
from veneer.errors import ConfigError, FormatError, OutOfMemoryError
from veneer.store import hub as hub_module
from veneer.store import source as source_module
from veneer.store.bars import without_bars
from veneer.store.source import load_model, load_tokenizer, parse_dtype, resolve

Make = Callable[..., tuple[Path, Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(make_gguf: Make, tmp_path: Path) -> Path:
    """A model saved by transformers, without a tokenizer."""
    _, model = make_gguf("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def hub(monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
    def answer(*args: object, **options: object) -> Any:
        if error is not None:
            raise error
        return nullcontext(Mock(headers=Message()))

    monkeypatch.setattr(hub_module.urllib.request.OpenerDirector, "open", answer)


def test_a_folder_loads_in_its_dtype_or_the_one_asked_for(folder: Path) -> None:
    assert load_model(folder).dtype == torch.bfloat16
    model = load_model(str(folder), dtype="float32")
    assert model.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_gguf_file_of_any_family_loads_with_its_tokenizer(make_gguf: Make, family: str) -> None:
    path, model = make_gguf(family)
    ids = torch.tensor([[3, 17, 41, 5]])
    torch.testing.assert_close(load_model(path)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert load_tokenizer(path).eos_token_id == 0


def test_a_folder_without_a_config_is_not_a_model(tmp_path: Path, make_gguf: Make) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"no config\.json.*save_pretrained"):
        resolve(tmp_path / "empty")
    path, _ = make_gguf("llama", name="w.gguf")
    with pytest.raises(FormatError, match=r"give the file itself.*w\.gguf"):
        resolve(path.parent)


AS_ADAPTER = "give it in place of a model, or, where a base is asked for, beside its base"


@pytest.mark.parametrize(
    ("name", "file", "advice"),
    [
        ("model", "config.json", "give {}, which is one"),
        (
            "adapter",
            "adapter_config.json",
            f"{{}} is an adapter; {AS_ADAPTER}",
        ),
        ("checkpoint-5", "config.json", "give {}, which is one"),
    ],
)
def test_the_folder_of_a_run_leads_to_what_it_saved(tmp_path: Path, name: str, file: str, advice: str) -> None:
    for folder in {name, "checkpoint-5", "checkpoint-7"}:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    with pytest.raises(FormatError) as error:
        resolve(tmp_path)
    assert str(error.value).endswith(f"is not a model: {advice.format(tmp_path / name)}")


def test_an_adapter_is_told_apart_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="is an adapter, not a model"):
        resolve(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"model\.bin is a file"):
        resolve(tmp_path / "model.bin")


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load_model(folder)


def test_a_truncated_gguf_is_refused(make_gguf: Make) -> None:
    path, _ = make_gguf("llama")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FormatError, match="damaged GGUF"):
        load_model(path)


def test_weights_that_a_model_lacks_are_an_error_not_random_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_model(folder)


def test_a_config_that_transformers_refuses_is_a_clear_error(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(FormatError, match="cannot be loaded"):
        load_model(folder)


def test_a_model_without_a_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(FormatError, match="holds no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["smollm2-135m-instrct", "SmolLM2-135M-Instruct"])
def test_a_misspelt_name_gets_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m-instruct'"):
        resolve(name)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "no/such/folder", "missing.gguf", "two words"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder or file"):
        resolve(name)


def test_a_known_model_that_was_not_fetched_names_the_command() -> None:
    with pytest.raises(ConfigError, match="run `veneer fetch smollm2-135m-instruct`"):
        load_model("smollm2-135m-instruct")


def test_a_hub_id_is_kept_where_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, None)
    assert resolve("org/model") == "org/model"
    hub(monkeypatch, urllib.error.HTTPError("u", 403, "forbidden", Message(), None))
    assert resolve("gpt2") == "gpt2"


def test_an_id_that_the_hub_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = Message()
    headers["X-Error-Code"] = "RepoNotFound"
    hub(monkeypatch, urllib.error.HTTPError("u", 401, "unauthorized", headers, None))
    with pytest.raises(ConfigError, match=r"no model 'org/modle': .* has no such model, or it is private"):
        resolve("org/modle")


def test_a_misspelt_path_gets_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, urllib.error.URLError("no route"))
    (tmp_path / "runs" / "first" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, near in (
        ("runs/frist/adapter", "runs/first/adapter"),
        ("runs/frist", "runs/first"),
        ("./rnus/first/adaptor", "runs/first"),
        ("rums", "runs"),
    ):
        with pytest.raises(ConfigError, match=f"no model '{name}': .*; did you mean '{near}'\\?"):
            resolve(name)
    with pytest.raises(ConfigError, match=r"no such folder or file; `veneer fetch` knows"):
        resolve("no/such/folder")


def test_a_hub_that_cannot_be_reached_is_a_quick_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, urllib.error.URLError("no route"))
    with pytest.raises(ConfigError, match="cannot be reached"):
        resolve("org/model-that-no-cache-has")


def test_without_the_hub_its_cache_serves(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub(monkeypatch, urllib.error.URLError("no route"))
    monkeypatch.setattr(hub_module, "try_to_load_from_cache", lambda name, file: str(folder / file))
    assert resolve("org/model") == folder


def test_what_the_hub_says_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, None)

    def refuse(*args: object, **options: object) -> None:
        raise OSError("org/model is a gated repository\nlong explanation")

    monkeypatch.setattr(source_module.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(source_module.AutoTokenizer, "from_pretrained", refuse)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match=r"the hub says: org/model is a gated repository$"):
            load("org/model")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16), ("auto", "auto")])
def test_dtypes_by_name(name: str, dtype: object) -> None:
    assert parse_dtype(name) == dtype


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'int3' is unknown; allowed: auto, float32"):
        parse_dtype("int3")


def test_a_conversion_says_so_and_what_was_converted_says_nothing(
    make_gguf: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = make_gguf("llama")
    resolve(path)
    assert capsys.readouterr().err.startswith(f"converting {path.name} (")
    resolve(path)
    assert capsys.readouterr().err == ""


def test_a_download_is_told_where_transformers_bars_are_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(monkeypatch, None)
    logging.enable_progress_bar()  # of the hub too, whatever ran before
    shown: list[bool] = []

    def download(place: str, **options: Any) -> Any:
        shown.append(not are_progress_bars_disabled())
        raise OSError("it ends here")

    monkeypatch.setattr(source_module.AutoModelForCausalLM, "from_pretrained", download)
    with without_bars(), pytest.raises(ConfigError, match="it ends here"):
        load_model("org/name-that-no-cache-has")
    assert "downloading org/name-that-no-cache-has from the hub\n" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with without_bars(), pytest.raises(ConfigError, match="it ends here"):
        load_model("org/name-that-no-cache-has")
    assert shown == [False, True]
    assert not are_progress_bars_disabled()


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/status, which tells the addresses in use")
def test_a_limit_of_addresses_is_told_with_a_way_out(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=300_007, hidden_size=256, intermediate_size=8, num_hidden_layers=1)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in model.named_parameters()}
    header, _ = header_bytes(shapes, {"format": "pt"})
    with (tmp_path / "model.safetensors").open("wb") as file:  # zeros that take no room on disk
        file.write(header)
        file.truncate(len(header) + sum(value.nbytes for value in model.parameters()))
    status = Path("/proc/self/status").read_text()
    used = int(next(line for line in status.splitlines() if line.startswith("VmSize")).split()[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, before[1]))
    try:
        with pytest.raises(
            OutOfMemoryError, match=r"\(30\d\.\d+ MB on disk\) do not fit into .* \(ulimit -v\).*Raise the limit"
        ):
            load_model(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_that_is_not_given_is_told_and_other_errors_are_not_hidden(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, kind, told in (
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            OutOfMemoryError,
            "take a smaller base",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemoryError, "the memory of the GPU: take a smaller base"),
        (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
    ):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Mock(side_effect=error))
        with pytest.raises(kind, match=told):
            load_model(folder)


def test_weights_are_read_straight_to_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's loader is told the device: nothing is made in host memory and moved."""
    found, stop = [], RuntimeError("told")

    def told(*_: Any, **options: Any) -> Any:
        found.append(options.get("device_map"))
        raise stop

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", told)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in ("cuda", torch.device("cuda", 1), "cpu", None):
        with pytest.raises(RuntimeError, match="told"):
            load_model(folder, device=device)
    assert found == [{"": 3}, {"": 1}, None, None]
