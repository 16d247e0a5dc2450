"""`veneer info` on adapters and models."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification
from typer.testing import Result

from veneer import BOFTConfig, IA3Config, LoraConfig, OFTConfig, PromptTuningConfig, VeraConfig, get_peft_model
from veneer.contract import MethodConfig
from veneer.model.blueprint.tensor_parts import part_of
from veneer.store.counted import plain_facts

Veneer = Callable[..., Result]


PLACES = [("self_attn", name) for name in "qkvo"] + [("mlp", name) for name in ("gate", "up", "down")]


def section(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    pairs = (line.strip().split("  ", 1) for line in result.stdout.splitlines() if line.strip())
    return {pair[0]: pair[-1].strip() for pair in pairs}


def test_a_damaged_config_and_a_model_without_values(veneer: Veneer, model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    save_file({"model.norm.weight": torch.empty(0)}, tmp_path / "model.safetensors")
    for change in ({"model_type": ["llama"]}, {"rope_parameters": {"rope_theta": 10**400}}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert plain_facts(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [1]}))
    assert plain_facts(tmp_path) is not None
    facts = section(veneer("info", tmp_path))
    assert (facts["architecture"], facts["parameters"]) == ("1", "0")


def test_every_damaged_config_is_one_message(veneer: Veneer, model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    changed: list[dict[str, object]] = [
        *({name: value} for name in ("hidden_size", "head_dim", "num_hidden_layers") for value in ("8", -1, 10**30)),
        {"num_attention_heads": 0}, {"vocab_size": 1.5}, {"model_type": "none"}, {"model_type": ["llama"]},
        {"torch_dtype": "float7"}, {"rope_parameters": 3}, {"text_config": {"hidden_size": -3}}, {"architectures": 5},
        {"partial_rotary_factor": float("inf")}, {"sliding_window": [[]]},
        {"layer_types": "full"}, {"quantization_config": 3}, {"num_key_value_heads": "2"}, {"pad_token_id": [1]},
        {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "none"}, {"id2label": [1]}, {"num_labels": "x"},
        {"model_type": "falcon", "head_dim": 8},
    ]  # fmt: skip
    texts = [
        "[]",
        "3",
        "null",
        "{",
        "",
        "[" * 100_000,
        '{"a":' * 100_000,
        *(json.dumps(config | each) for each in changed),
    ]
    for text in texts:
        (tmp_path / "config.json").write_text(text)
        for options in ((), ("--json",)):
            result = veneer("info", tmp_path, *options)
            assert result.exception is None or isinstance(result.exception, SystemExit), (text[:200], result.exception)
            assert result.exit_code == 0 or result.stderr.startswith("error: "), (text[:200], result.output)
            assert result.stderr.count("\n") <= 1, text[:200]
    for text, said in (("[]", "must hold a JSON object"), (json.dumps(config | {"head_dim": "8"}), "head_dim is '8'")):
        (tmp_path / "config.json").write_text(text)
        result = veneer("info", tmp_path)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_an_adapter(veneer: Veneer, adapter_folder: Path, model_folder: Path) -> None:
    facts = section(veneer("info", adapter_folder))
    n_parameters = 2 * (3 * (48 + 48) + 3 * (48 + 61))
    size = (adapter_folder / "adapter_model.safetensors").stat().st_size
    assert facts["method"] == "lora"
    assert (facts["r"], facts["lora_alpha"]) == ("3", "7")
    assert facts["modules"] == "4 (q_proj, up_proj)"
    assert facts["parameters"] == f"{n_parameters:,}"
    assert facts["size"] == f"{size / 1e3:.1f} kB (float32)"
    assert facts["base"] == str(model_folder)


@pytest.mark.parametrize(("switches", "name"), [(["use_dora"], "dora"), (["use_dora", "use_rslora"], "dora + rslora")])
def test_a_variant_goes_by_the_name_that_recipes_give_it(
    veneer: Veneer, model_folder: Path, tmp_path: Path, switches: list[str], name: str
) -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"], **dict.fromkeys(switches, True))
    get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config).save_pretrained(tmp_path)
    assert section(veneer("info", tmp_path))["method"] == name
    assert json.loads(veneer("info", tmp_path, "--json").stdout)["method"] == name


def test_a_long_list_is_cut(veneer: Veneer, model_folder: Path, tmp_path: Path) -> None:
    names = [f"layers.{i}.{half}.{name}_proj" for i in (0, 1) for half, name in PLACES]
    base = LlamaForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, LoraConfig(r=1, target_modules=names)).save_pretrained(tmp_path / "long")
    told = veneer("info", tmp_path / "long").stdout
    assert "and 2 more" in " ".join(told.split())


def test_what_modules_share_is_no_module(veneer: Veneer, model_folder: Path, tmp_path: Path) -> None:
    config = VeraConfig(r=3, target_modules=["q_proj", "k_proj"], save_projection=True)
    get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config).save_pretrained(tmp_path / "vera")
    facts = section(veneer("info", tmp_path / "vera"))
    assert facts["modules"] == "4 (k_proj, q_proj)"
    assert facts["parameters"] == f"{2 * (48 + 16 + 2 * 3) + 2 * 3 * 48:,}"


def test_biases_that_peft_writes_by_its_wrappers_names_are_no_more_modules(veneer: Veneer, tmp_path: Path) -> None:
    sizes = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}
    base = RobertaForSequenceClassification(RobertaConfig(vocab_size=67, max_position_embeddings=29, **sizes))
    config = peft.LoraConfig(r=3, bias="all", task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    facts = json.loads(veneer("info", tmp_path, "--json").stdout)
    theirs = [path for path in facts["modules"] if path.startswith("classifier")]
    assert theirs == ["classifier.dense", "classifier.out_proj"]
    assert not any(wrapper in path for path in facts["modules"] for wrapper in ("modules_to_save", "original_module"))


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (
            LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, lora_dropout=0.1),
            "r lora_alpha use_dora lora_dropout",
        ),
        (VeraConfig(r=5, target_modules=["q_proj", "k_proj"], d_initial=0.3), "r d_initial"),
        (IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]), "feedforward_modules"),
        (PromptTuningConfig(num_virtual_tokens=3), "num_virtual_tokens"),
        (OFTConfig(oft_block_size=4, target_modules=["q_proj"]), "oft_block_size"),
        (OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"]), "r"),
        (BOFTConfig(boft_block_size=4, target_modules=["q_proj"]), "boft_block_size boft_n_butterfly_factor"),
    ],
)
def test_the_model_card_shows_the_same_settings(
    veneer: Veneer, model_folder: Path, tmp_path: Path, config: MethodConfig, shown: str
) -> None:
    get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config).save_pretrained(tmp_path)
    card = dict(re.findall(r"^\| (\w+) \| `(.*)` \|$", (tmp_path / "README.md").read_text(), flags=re.M))
    facts = section(veneer("info", tmp_path))
    assert set(shown.split()) <= set(card)
    assert {name: facts[name] for name in card} == card
    assert "0" not in card.values()  # of two settings of which one tells the other
    assert not {"bias", "use_rslora", "inference_mode", "base_model_name_or_path"} & set(card)


def test_a_model(veneer: Veneer, model_folder: Path) -> None:
    facts = section(veneer("info", model_folder))
    attention = 2 * (48 * 48 + 2 * 48 * 16 + 48 * 48)
    feed_forward = 2 * 3 * 48 * 61
    embeddings = 260 * 48
    norms = 5 * 48
    total = attention + feed_forward + 2 * embeddings + norms
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["attention heads"], facts["key/value heads"], facts["head width"]) == ("3", "1", "16")
    assert facts["rotary"] == "theta 10,000"
    assert "window" not in facts
    assert facts["parameters"] == f"{total:,}"
    assert facts["attention"] == f"{attention:,} ({attention / total:.1%})"
    assert facts["feed-forward"] == f"{feed_forward:,} ({feed_forward / total:.1%})"
    assert facts["output head"] == f"{embeddings:,} ({embeddings / total:.1%})"
    assert facts["size"] == f"{4 * total / 1e6:.1f} MB (float32)"
    four_bit = (attention + feed_forward) * 4.127 / 8 + 2 * (2 * embeddings + norms)
    assert facts["size in 4 bits"].startswith(f"{four_bit / 1e6:.1f} MB")


def test_json_holds_numbers(veneer: Veneer, model_folder: Path, adapter_folder: Path) -> None:
    model = json.loads(veneer("info", model_folder, "--json").stdout)
    assert (model["parameters"]["norms"], model["config"]["hidden_size"]) == (240, 48)
    adapter = json.loads(veneer("info", adapter_folder, "--json").stdout)
    assert (adapter["config"]["r"], len(adapter["modules"])) == (3, 4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("model.layers.3.mlp.gate_proj.weight", "feed-forward"),
        ("transformer.h.0.ln_1.bias", "norms"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.wte.weight", "embeddings"),
        ("model.embed_tokens.weight", "embeddings"),
        ("model.decoder.layers.1.fc1.weight", "feed-forward"),
        ("gpt_neox.layers.0.attention.query_key_value.bias", "attention"),
        ("gpt_neox.layers.0.post_attention_layernorm.weight", "norms"),
        ("embed_out.weight", "output head"),
        ("lm_head.weight", "output head"),
        ("vision.patch.projection", "other"),
    ],
)
def test_kinds_by_name(name: str, kind: str) -> None:
    assert part_of(name) == kind


def test_what_is_wrong_is_one_message(veneer: Veneer, tmp_path: Path, adapter_folder: Path, model_folder: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_bytes((adapter_folder / "adapter_config.json").read_bytes())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    cases = {
        tmp_path / "nowhere": "no such folder or file",
        tmp_path / "half" / "nowhere": "it holds adapter_config.json",
        tmp_path / "hlf": f"no such folder or file in {tmp_path}; did you mean '{tmp_path / 'half'}'?",
        tmp_path / "half": "adapter_model.safetensors",
        tmp_path / "bare": "model.safetensors",
    }
    for what, message in cases.items():
        result = veneer("info", what)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_hub_id_is_not_downloaded(veneer: Veneer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.store.hub._asked", lambda address: Message())
    result = veneer("info", "org/model")
    assert (result.exit_code, "download it first" in result.stderr) == (2, True)


def test_a_run(veneer: Veneer, tmp_path: Path) -> None:
    change = {"step": 30, "key": "seed", "before": 0, "now": 5}
    record = {
        "status": "interrupted",
        "reason": "SIGTERM",
        "step": 1234,
        "max_steps": 5000,
        "log": [{"step": 1000, "loss": 2.5}, {"step": 1200, "loss": 1.98768}, {"step": 1200, "eval_loss": 3.0}],
        "recipe": {"model": {"source": "base"}, "data": {"train": "rows.jsonl"}, "adapter": {"method": "dora"}},
        "changes": [change],
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    facts = section(veneer("info", tmp_path))
    assert (facts["status"], facts["reason"], facts["steps"]) == ("interrupted", "SIGTERM", "1,234 of 5,000")
    assert facts["last loss"] == "1.9877"
    assert facts["going on"] == "no checkpoint is kept: `veneer train RECIPE --resume auto` begins again"
    (tmp_path / "checkpoint-1200").mkdir()
    (tmp_path / "checkpoint-1200" / "trainer_state.json").write_text("{}")
    facts = section(veneer("info", tmp_path))
    assert facts["going on"] == "`veneer train RECIPE --resume` goes on from checkpoint-1200"
    assert (facts["method"], facts["model"], facts["data"]) == ("dora", "base", "rows.jsonl")
    assert facts["changed"] == "after step 30 seed from 0 to 5"
    results = {"steps": 7, "train_loss": 1.23456, "eval_loss": 2.0}
    (tmp_path / "run.json").write_text(json.dumps({**record, "status": "finished", "results": results}))
    facts = section(veneer("info", tmp_path))
    assert (facts["steps"], facts["training loss"], facts["held-out loss"]) == ("7", "1.2346", "2.0000")
    assert not {"going on", "last loss"} & facts.keys()
    process = {"host": socket.gethostname(), "pid": 2**22 - 1, "started": 5.0}
    (tmp_path / "run.json").write_text(json.dumps({**record, "status": "running", "process": process}))
    assert "ended unexpectedly" in section(veneer("info", tmp_path))["status"]
    told = json.loads(veneer("info", tmp_path, "--json").stdout)
    assert (told["life"], told["changes"]) == ("gone", [change])


def test_what_is_no_model_is_told_without_torch(tmp_path: Path) -> None:
    adapter = tmp_path / "runs" / "first" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}")
    code = (
        "import sys; from veneer.cli.app import app\n"
        "try: app(['info', sys.argv[1]])\n"
        "finally: print('torch' in sys.modules)"
    )
    for what, said in (("runs", f"it is not a model: {adapter} is an adapter"), ("rows.jsonl", "rows.jsonl is a file")):
        run = subprocess.run([sys.executable, "-c", code, tmp_path / what], capture_output=True, text=True, check=False)
        assert said in run.stderr.replace("\n", " ")
        assert run.stdout == "False\n"
