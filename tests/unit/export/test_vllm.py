"""Adapters as plain LoRA: PEFT finds the same change in what was written, or the refusal tells why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from models import llama_config
from veneer.adapters.peft_model import get_peft_model
from veneer.cli.app import app
from veneer.cli.export_vllm import _for_vllm
from veneer.errors import CompositionError, ConfigError, FormatError
from veneer.export.vllm.adapter import VllmOptions, VllmReport, export_vllm
from veneer.methods.adalora import AdaLoraConfig
from veneer.methods.bottleneck import BottleneckConfig
from veneer.methods.fourierft import FourierFTConfig
from veneer.methods.hra import HRAConfig
from veneer.methods.ia3 import IA3Config
from veneer.methods.loha import LoHaConfig
from veneer.methods.lokr import LoKrConfig
from veneer.methods.lora import LoraConfig
from veneer.methods.oft import OFTConfig
from veneer.methods.prefix import PrefixTuningConfig
from veneer.methods.prompt import PromptTuningConfig
from veneer.methods.vera import VeraConfig
from veneer.store import named
from veneer.store.known import model_folder

LAYERS = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 13}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "base"
    torch.manual_seed(3)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    return folder


def with_values(model: Any, folder: Path) -> Path:
    """The adapter of a model, with random values, in a folder."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, config: Any) -> Path:
    return with_values(get_peft_model(LlamaForCausalLM.from_pretrained(base), config), folder)


def changes(base: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The change of each weight by PEFT's merge. Its starts from the weight take no float64."""
    own = LlamaForCausalLM.from_pretrained(base).to(dtype)
    before = {name: value.detach().clone() for name, value in own.named_parameters()}
    after = peft.PeftModel.from_pretrained(own, adapter).to(dtype).merge_and_unload()
    found = {name: value.detach() - before[name] for name, value in after.named_parameters()}
    return {name: change.double() for name, change in found.items() if change.any()}


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_change(
    base: Path, adapter: Path, written: Path, report: VllmReport, dtype: torch.dtype = torch.float64
) -> None:
    expected, found = changes(base, adapter, dtype), changes(base, written)
    assert expected.keys() == found.keys()
    assert len(found) == report.n_layers > 0
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=2e-6 * float(change.abs().max() + 1))


def assert_plain(written: Path, rank: int) -> None:
    """One rank and a scale of 1 in what is written, and two factors in float32 for a layer of every block."""
    config, tensors = config_in(written), load_file(written / "adapter_model.safetensors")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora"} & config.keys()
    assert {key.split(".")[-2] for key in tensors} == {"lora_A", "lora_B"}
    assert {value.shape["lora_B" in key] for key, value in tensors.items()} == {rank}
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    blocks = [{key.replace(f".layers.{n}.", ".") for key in tensors if f".layers.{n}." in key} for n in range(2)]
    assert blocks[0] == blocks[1]


EXACT: dict[str, tuple[Any, int]] = {
    "rslora, patterns": (LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=LAYERS, **PATTERNS), 8),
    "wide": (LoraConfig(r=9, lora_alpha=7, use_rslora=True, target_modules=LAYERS), 16),
    "one block": (LoraConfig(r=3, lora_alpha=7, target_modules=LAYERS, layers_to_transform=[1]), 8),
    "adalora": (AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, total_step=9, target_modules=LAYERS), 8),
    "vera": (VeraConfig(r=11, target_modules=["q_proj", "o_proj"]), 16),
    "loha": (LoHaConfig(r=3, alpha=5, target_modules=LAYERS), 16),
    "hra": (HRAConfig(r=4, target_modules=LAYERS), 8),
}


@pytest.mark.parametrize("case", EXACT)
def test_low_rank_methods_are_exact(base: Path, tmp_path: Path, case: str) -> None:
    config, rank = EXACT[case]
    adapter = trained(base, tmp_path / "a", config)
    report = export_vllm(adapter, tmp_path / "b")
    assert (report.rank, report.error, report.worst, report.copied) == (rank, 0, 0, False)
    assert_same_change(base, adapter, tmp_path / "b", report)
    assert_plain(tmp_path / "b", rank)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_s_starts_that_change_the_base_become_plain(base: Path, tmp_path: Path, start: str) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=LAYERS, init_lora_weights=start)
    adapter = with_values(peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config), tmp_path / "a")
    assert config_in(adapter)["init_lora_weights"] == start
    report = export_vllm(adapter, tmp_path / "b")
    assert (report.rank, report.error, report.copied) == (8, 0, False)
    assert_same_change(base, adapter, tmp_path / "b", report, torch.float32)
    assert_plain(tmp_path / "b", 8)


WHOLE: dict[str, Any] = {
    "dora": LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=LAYERS),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "lokr": LoKrConfig(r=5, alpha=7, decompose_factor=3, target_modules=LAYERS),
    "fourierft": FourierFTConfig(n_frequency=150, scaling=90.0, target_modules=LAYERS),
    "loha": LoHaConfig(r=4, alpha=7, target_modules=LAYERS),  # of rank 16, cut
}


@pytest.mark.parametrize("case", WHOLE)
def test_others_are_the_nearest_of_a_rank_and_the_error_is_told(base: Path, tmp_path: Path, case: str) -> None:
    adapter = trained(base, tmp_path / "a", WHOLE[case])
    report = export_vllm(adapter, tmp_path / "b", VllmOptions(rank=8))
    assert_plain(tmp_path / "b", 8)
    wanted, found = changes(base, adapter), changes(base, tmp_path / "b")
    assert wanted.keys() == found.keys()
    lost = {name: float((found[name] - change).square().sum()) for name, change in wanted.items()}
    least = {name: float(torch.linalg.svdvals(change)[8:].square().sum()) for name, change in wanted.items()}
    all_of = {name: float(change.square().sum()) for name, change in wanted.items()}
    assert sum(lost.values()) == pytest.approx(sum(least.values()), rel=1e-3)
    assert report.error == pytest.approx((sum(lost.values()) / sum(all_of.values())) ** 0.5, rel=1e-3)
    assert report.error > 0.01
    worst = max(wanted, key=lambda name: lost[name] / all_of[name])
    assert report.worst_layer == worst.removesuffix(".weight")
    assert report.worst == pytest.approx((lost[worst] / all_of[worst]) ** 0.5, rel=1e-3)


def test_what_both_take_is_copied_bit_for_bit(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", LoraConfig(r=3, lora_alpha=7, target_modules=LAYERS))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    report = export_vllm(adapter, tmp_path / "b")
    assert report.copied
    assert (report.method, report.rank, report.n_layers, report.base) == ("LORA", 3, 6, str(base))
    files = [folder / "adapter_model.safetensors" for folder in (adapter, tmp_path / "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert report.n_bytes == files[1].stat().st_size
    config = config_in(tmp_path / "b")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 7, sorted(LAYERS))
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_rank_below_the_adapter_s_cuts_it(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", LoraConfig(r=9, lora_alpha=7, target_modules=["q_proj", "k_proj"]))
    report = export_vllm(adapter, tmp_path / "b", VllmOptions(rank=8))
    assert 0 < report.error < report.worst < 1
    assert "q_proj" in report.worst_layer  # k has eight outputs
    assert_plain(tmp_path / "b", 8)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), r"0\S+k_proj \(and 1 more\) is scaled"),
        (BottleneckConfig(), "BOTTLENECK does not change weights"),
        (PromptTuningConfig(num_virtual_tokens=3), "PROMPT_TUNING does not change weights"),
        (PrefixTuningConfig(num_virtual_tokens=3), "PREFIX_TUNING does not change weights"),
        (LoraConfig(r=3, target_modules=LAYERS, modules_to_save=["norm"]), "whole modules, biases or rows: .*norm"),
        (LoraConfig(r=3, target_modules=LAYERS, trainable_token_indices=[4]), "whole modules, biases or rows"),
        (LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True), r"q_proj \(and 1 more\) trains a bias"),
        (LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]), "embed_tokens is the embeddings or the head"),
        (LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), r"full rank: give the rank to write \(--rank N\)"),
        (LoHaConfig(r=25, target_modules=["gate_proj"]), r"rank 625 is above vLLM's 512: give the rank to write"),
    ],
)  # fmt: skip
def test_what_cannot_be_lora_is_refused_with_the_reason(base: Path, tmp_path: Path, config: Any, reason: str) -> None:
    adapter = trained(base, tmp_path / "a", config)
    with pytest.raises(CompositionError, match=f"{reason}.*veneer serve"):
        export_vllm(adapter, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_ends_are_kept_where_they_are_asked_for(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "embed_tokens"]))
    report = export_vllm(adapter, tmp_path / "b", VllmOptions(ends=True, rank=16))
    assert_same_change(base, adapter, tmp_path / "b", report)
    assert any(key.endswith("embed_tokens.lora_embedding_A") for key in load_file(tmp_path / "b" / FILE))


FILE = "adapter_model.safetensors"


def edited(adapter: Path, **fields: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(config_in(adapter) | fields))
    return adapter


def test_a_start_that_cannot_be_made_again_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", LoraConfig(r=3, target_modules=LAYERS))
    with pytest.raises(
        CompositionError, match=r"the start 'loftq', which changed.*initial_model_for_weight_conversion"
    ):
        export_vllm(edited(adapter, init_lora_weights="loftq"), tmp_path / "b")


def test_a_base_is_needed_only_by_what_depends_on_it(base: Path, tmp_path: Path) -> None:
    plain = trained(base, tmp_path / "a", LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=LAYERS))
    report = export_vllm(edited(plain, base_model_name_or_path="nobody/absent"), tmp_path / "b")
    assert_same_change(base, plain, tmp_path / "b", report)
    dora = trained(base, tmp_path / "d", LoraConfig(r=3, use_dora=True, target_modules=LAYERS))
    edited(dora, base_model_name_or_path="nobody/absent")
    with pytest.raises(CompositionError, match=r"depends on the weights of its base \(nobody/absent\).*--base MODEL"):
        export_vllm(dora, tmp_path / "e", VllmOptions(rank=8))
    assert export_vllm(dora, tmp_path / "e", VllmOptions(rank=8, base=str(base))).error > 0


def test_nothing_is_overwritten_unasked(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", LoraConfig(r=3, target_modules=LAYERS))
    with pytest.raises(ConfigError, match="is the adapter itself"):
        export_vllm(adapter, adapter, VllmOptions(overwrite=True))
    export_vllm(adapter, tmp_path / "b")
    with pytest.raises(ConfigError, match="not empty: choose another folder, or overwrite it"):
        export_vllm(adapter, tmp_path / "b")
    export_vllm(adapter, tmp_path / "b", VllmOptions(overwrite=True))
    with pytest.raises(FormatError, match="no adapter: only the folder of an adapter is overwritten"):
        export_vllm(adapter, base, VllmOptions(overwrite=True))


def test_the_command_tells_what_was_written_and_what_was_not(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "sql" / "adapter", LoraConfig(r=3, lora_alpha=7, target_modules=LAYERS))
    trained(base, tmp_path / "dora", WHOLE["dora"])
    trained(base, tmp_path / "ia3", IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    given = [str(tmp_path / name) for name in ("sql/adapter", "dora", "ia3")]
    done = CliRunner().invoke(
        app, ["export", "vllm", *given, "-o", str(tmp_path / "out"), "--rank", "16"], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 2
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert "as it is" in rows["sql"]
    assert "reduced" in rows["dora"]
    assert "%" in rows["dora"]
    assert rows["dora:"].startswith("dora: worst layer model.layers.")
    assert "not written (1 of 3): the adapter" in done.stderr
    assert "is scaled" in done.stderr
    assert f"--enable-lora --max-lora-rank 16 --lora-modules sql={tmp_path / 'out' / 'sql'} dora=" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dora", "sql"]


def test_the_next_line_names_the_base_as_vllm_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "smollm2-135m-instruct"
    monkeypatch.setattr(named, "is_fetched", lambda name: True)
    assert _for_vllm(name) == str(model_folder(name))
    monkeypatch.setattr(named, "is_fetched", lambda name: False)
    assert [_for_vllm(each) for each in (name, "me/base", None)] == ["BASE", "me/base", "BASE"]


def test_a_rank_that_vllm_has_not_and_two_of_one_name_are_refused(base: Path, tmp_path: Path) -> None:
    for parent in ("x", "y"):
        trained(base, tmp_path / parent / "a", LoraConfig(r=3, target_modules=LAYERS))
    given = [str(tmp_path / parent / "a") for parent in ("x", "y")]
    output = ["-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["export", "vllm", given[0], *output, "--rank", "10"])
    assert (done.exit_code, "--rank 10 is not a rank of vLLM: give one of 8, 16" in done.stderr) == (2, True)
    done = CliRunner().invoke(app, ["export", "vllm", *given, *output])
    assert (done.exit_code, "would both be written to" in done.stderr) == (2, True)
