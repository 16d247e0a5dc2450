"""`veneer eval` of several adapters beside one another, its labels and tables, and what it refuses before loading."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import Result

from models import byte_tokenizer
from veneer import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from veneer.cli.measured import _show_classes, _show_named
from veneer.evaluate.confusion import Confusion

from .conftest import fill

Veneer = Callable[..., Result]


@pytest.fixture(scope="module")
def second_adapter(model_folder: Path) -> Path:
    folder = model_folder.parent / "second"
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(model_folder),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    fill(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt_adapter(model_folder: Path) -> Path:
    folder = model_folder.parent / "prompt"
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(LlamaForCausalLM.from_pretrained(model_folder), config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"text {i}:", "completion": (" good", " bad", " ugly")[i % 3]} for i in range(11)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def facts(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


METRICS = [
    ("labels",),
    ("perplexity", "--batch-size", 5),
    ("regex", "--pattern", "^.", "--max-new-tokens", 3),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric[0])
def test_side_by_side_is_each_alone(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, second_adapter: Path, prompt_adapter: Path, data: Path,
    metric: tuple[Any, ...],
) -> None:  # fmt: skip
    command = ("eval", model_folder, "-d", data, "--json", "-m", *metric)
    adapters = [adapter_folder, second_adapter, prompt_adapter]
    options = [option for each in adapters for option in ("-a", each)]
    together = facts(veneer(*command, *options, "--with-base"))
    assert [each["adapter"] for each in together["results"]] == [None, *map(str, adapters)]
    alone = [facts(veneer(*command, *(() if each is None else ("-a", each)))) for each in (None, *adapters)]
    for found, wanted in zip(together["results"], alone, strict=True):
        assert found["value"] == pytest.approx(wanted["value"], rel=1e-4)
        assert found["n_rows"] == wanted["n_rows"] == 11
        assert found.get("confusion") == wanted.get("confusion")
    assert [each["second"] for each in together["differences"]] == [str(each) for each in adapters]
    assert all(each["first"] == "(base)" for each in together["differences"])
    test = "bootstrap" if metric[0] == "perplexity" else "McNemar"
    assert test in together["differences"][0]["test"]


def test_labels_share_one_pass_over_the_base(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, second_adapter: Path, data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    named: list[list[str]] = []
    from veneer.evaluate import scoring

    own = scoring._forward
    monkeypatch.setattr(scoring, "_forward", lambda *args: named.append(args[2]) or own(*args))
    result = veneer("eval", model_folder, "-d", data, "-m", "labels", "-a", adapter_folder, "-a", second_adapter)
    assert result.exit_code == 0, result.output
    assert any(len(set(names)) == 2 for names in named)


def test_experts_take_adapters_one_after_another(veneer: Veneer, tmp_path: Path, data: Path) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    torch.manual_seed(5)
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, num_local_experts=3)
    config.bos_token_id, config.eos_token_id = None, 0
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for name in "ab":
        model = MixtralForCausalLM.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"]))
        fill(adapted)
        adapted.save_pretrained(tmp_path / name)
    command = ("eval", tmp_path / "base", "-d", data, "-m", "labels", "--json")
    both = facts(veneer(*command, "-a", tmp_path / "a", "-a", tmp_path / "b", "--with-base"))
    assert both["results"][1]["value"] == facts(veneer(*command, "-a", tmp_path / "a"))["value"]


def test_labels_are_those_of_the_whole_set_and_shown(
    veneer: Veneer, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    command = ("eval", model_folder, "-d", data, "-m", "labels", "--limit", 2)
    found = facts(veneer(*command, "--json"))
    assert (found["n_rows"], found["labels"]) == (2, ["bad", "good", "ugly"])
    assert {label: each["rows"] for label, each in found["classes"].items()} == {"bad": 1, "good": 1, "ugly": 0}
    assert sum(map(sum, found["confusion"])) == 2
    shown = veneer(*command).stdout
    assert "bad, good, ugly" in shown
    assert ["class", "bad", "good", "ugly"] in [line.split() for line in shown.splitlines()]
    (tmp_path / "labels.txt").write_text("ugly\ngood\nbad\nfair\n")
    asked = facts(veneer(*command, "--json", "--labels", tmp_path / "labels.txt"))
    assert asked["labels"] == ["ugly", "good", "bad", "fair"]


@pytest.mark.parametrize(
    ("labels", "head", "row"),
    [
        (["RIG-P", "SAI-S", "MOT-E", "OAR-X", "HUL-L", "KEE-L", "DEC-K", "ANC-H"], "class RIG-P SAI-S", "RIG-P 1003 0"),
        ([f"label-number-{n}" for n in range(8)], "class 1 2 3 4 5 6 7 8", "1 label-number-0 1003 0"),
        ([f"a {'very ' * 11}long label {n}" for n in range(3)], "class 1 2 3", None),
        ([f"label-{n}" for n in range(17)], None, "1003 of 'label-0' taken for 'label-16'"),
    ],
)
def test_a_confusion_table_is_readable_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], labels: list[str], head: str | None,
    row: str | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    given = [labels[0] if len(labels) < 17 else labels[-1]] * 1003
    _show_classes(Confusion.of(labels, [labels[0]] * 1003, given), "")
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "class rows right recall predicted precision" in lines
    assert all(any(line.startswith(each) for line in lines) for each in (head, row) if each is not None)
    assert (head is None) == ("what each class was taken for" not in shown)


def test_many_classes_are_cut_to_those_with_most_wrong_rows(capsys: pytest.CaptureFixture[str]) -> None:
    labels = [f"label-{n:02}" for n in range(67)]
    right = [label for n, label in enumerate(labels) for _ in range(n + 1)]  # the last class is the largest
    confusion = Confusion.of(labels, right, [labels[0]] * len(right))
    _show_classes(confusion, "")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 45
    assert "the 20 of 67 classes with most wrong rows" in shown
    assert ("label-66" in shown, "label-45" in shown) == (True, False)
    assert "67 of 'label-66' taken for 'label-00'\n" in shown
    assert shown.endswith("and 54 rarer ones\n")
    _show_classes(Confusion.of(labels, labels, [labels[1], *labels[1:]]), "")
    shown = capsys.readouterr().out
    assert ("the 1 of 67 classes" in shown, "label-00 " in shown, "label-02" in shown) == (True, True, False)
    _show_classes(confusion, "runs/a")
    assert capsys.readouterr().out.splitlines()[0] == "most confused: runs/a"
    _show_classes(Confusion.of(labels, right, right), "runs/a")
    assert capsys.readouterr().out == ""


def test_paths_are_broken_at_slashes_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = ("-12.3", "-14.5 to -10.1", "<0.001", "131", "7")
    heads = ("adapter", "points", "95%", "p", "only\nfirst\nright", "only\nthis\nright")
    paths = ("runs/lora/adapter", "runs/a/" + "folders/" * 5 + "adapter", "x" * 90)
    _show_named("difference from the base", heads, [(path, *row) for path in paths])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line.split()[0] for line in lines if line.strip()]
    assert paths[0] in cells
    assert "".join(cells).count(paths[1]) == 1
    assert [cell for cell in cells if "folders" in cell and not cell.endswith(("/", "adapter"))] == []


def test_where_the_rest_of_the_classes_is_is_told(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, data: Path, tmp_path: Path
) -> None:
    rest = "all classes and what each was taken for: --json"
    command = ("eval", model_folder, "-m", "labels", "-d")
    both = veneer(*command, data, "-a", adapter_folder, "--with-base").stdout
    assert both.count("most confused: ") == 2
    assert "by class" not in both
    assert rest in both
    assert rest not in veneer(*command, data).stdout
    rows = [{"prompt": f"text {i}:", "completion": f" {i}"} for i in range(23)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    many = veneer(*command, tmp_path / "many.jsonl").stdout
    assert rest in many
    assert "and 3 more" in many


def test_intervals_stand_on_one_line(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path, data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    folder = shutil.copytree(adapter_folder, tmp_path / "an-adapter-with-a-name-that-fills-more-than-a-line-of-a-table")
    command = ("eval", model_folder, "-d", data, "-m", "labels", "--with-base", "-a", folder)
    shown = veneer(*command).stdout
    assert len(re.findall(r"[\d.]+% +[\d.]+% to [\d.]+%", shown)) == 2
    assert re.search(r"[+-][\d.]+ +[+-][\d.]+ to [+-][\d.]+ +[<\d.]+ +\d+ +\d+", shown)
    assert "…" not in shown


def test_predictions_hold_the_prompt(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.jsonl"
    command = ("eval", model_folder, "-d", data, "-m", "labels", "--predictions", out, "-a", adapter_folder)
    facts(veneer(*command, "--with-base", "--json"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["row"], row["adapter"]) for row in rows] == [
        (n, adapter) for adapter in (None, str(adapter_folder)) for n in range(1, 12)
    ]
    assert rows[4]["prompt"] == "text 4:"
    facts(veneer(*command, "--json", "--chat"))
    assert json.loads(out.read_text().splitlines()[0])["prompt"] == "<|user|>text 0:<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "labels", "--labels", "nowhere.txt"), "--labels nowhere.txt: the file cannot be read"),
        (("-m", "labels", "--labels", "good,bad"), "none of the labels ['good', 'bad']: ['ugly']"),
        (("-m", "labels", "--labels", "good"), "none of the labels ['good']"),
        (("-m", "labels", "-a", "nowhere"), "no adapter 'nowhere'"),
        (("-m", "labels", "-a", "OTHER"), "it was trained on x/y: give x/y as the model"),
        (("-m", "labels", "-a", "SAME", "-a", "SAME"), "given twice"),
        (("-m", "labels", "--with-base"), "none is given"),
        (("-m", "labels", "--dtype", "int3"), "allowed: auto"),
        (("-m", "labels", "--answer-field", "label"), "no field 'label'"),
        (("-m", "regex", "--pattern", "("), "not a regular expression"),
        (("-m", "perplexity", "--context", 8, "--stride", 8), "less than the context"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, data: Path, other_adapter: Path,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[Any, ...], message: str,
) -> None:  # fmt: skip
    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    other = shutil.copytree(other_adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text()) | {"base_model_name_or_path": "x/y"}
    (other / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("veneer.adapters.chosen.load_model", loads)
    given = [{"OTHER": other, "SAME": adapter_folder}.get(each, each) for each in options]
    result = veneer("eval", model_folder, "-d", data, *given)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_answers_of_too_many_kinds_are_no_labels(veneer: Veneer, model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x:", "completion": f" {i}"} for i in range(211)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = veneer("eval", model_folder, "-d", tmp_path / "many.jsonl", "-m", "labels")
    assert (result.exit_code, "211 different answers" in result.stderr) == (2, True), result.output
