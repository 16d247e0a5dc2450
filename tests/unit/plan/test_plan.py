"""A plan against the run itself: live bytes of a real step, to the byte; depth; parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.models import byte_tokenizer
from tests.unit.plan.conftest import HELD_OUT, Make
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    T5Config,
)

from bench.training.measured import measured_model
from quantized_folders import make_gpt_oss
from veneer import DPOTrainer, LoraConfig, PeftModel, get_peft_model
from veneer.errors import ConfigError, FormatError
from veneer.ops.traced import Traced
from veneer.plan.architecture import config_of
from veneer.plan.live_bytes import LiveBytes, peaks
from veneer.plan.memory_trace import ADAPTERS, FIRST, kind_under, kinds_of, make_optimizer, prepare, run_steps
from veneer.plan.plan import as_json, batch_of, count_trained, held_out_batch, plan_recipe
from veneer.plan.planned_tasks import require_planned
from veneer.plan.serving import serving_of
from veneer.plan.step import Step
from veneer.plan.work import CountWork
from veneer.recipe.recipe import Recipe, parse_recipe

SETTINGS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = {
    "dense": (None, {}, {}),
    "nf4, full checkpointing": (None, {"quantization": "nf4"}, {"gradient_checkpointing": True}),
    "int8, selective, 8 bits": (
        None, {"quantization": "int8"}, {"gradient_checkpointing": "selective", "optim": "adamw_8bit"},
    ),
    "general path": (None, {}, {"fused": "off", "optim": "adamw_torch"}),
    "general path, nf4, selective": (
        None, {"quantization": "nf4"}, {"fused": "off", "gradient_checkpointing": "selective"},
    ),
    "dora, packed": ({"method": "dora", "r": 3}, {}, {"packing": True}),
    "ia3": ({"method": "ia3"}, {}, {}),
    "dropout, disk": ({"method": "lora", "r": 5, "lora_dropout": 0.1}, {}, {"activation_offloading": "disk"}),
    "prefix": ({"method": "prefix_tuning", "num_virtual_tokens": 7}, {}, {}),
    "bottleneck": ({"method": "bottleneck"}, {}, {}),
    "full": ({"method": "full"}, {}, {}),
    "galore": ({"method": "full"}, {}, {"optim": "galore_adamw", "optim_args": "rank=7"}),
    "galore 8 bits in backward": (
        {"method": "full"}, {}, {"optim": "galore_adamw_8bit_layerwise", "optim_args": "rank=7", "max_grad_norm": 0.0},
    ),
    "gradients of several": ({"method": "full"}, {}, {"gradient_accumulation_steps": 3}),
    "evaluation": (None, {}, {HELD_OUT: 17}),
    "evaluation, general path": (None, {}, {HELD_OUT: 17, "fused": "off", "gradient_accumulation_steps": 2}),
    "evaluation, nf4, packed": (None, {"quantization": "nf4"}, {HELD_OUT: 17, "packing": True}),
    "float32": (None, {"dtype": "float32"}, {"max_grad_norm": 0.0}),
}  # fmt: skip


def real_peak(recipe: Recipe) -> int:
    """The most bytes alive in the second step of the model itself."""
    model, args, live = measured_model(recipe), recipe.training_config(), LiveBytes()
    prepare(model, args, with_values=True)
    optimizer, batch = make_optimizer(model, args), batch_of(recipe, model.config)
    with live:
        for tensor, kind in kinds_of(model):
            live.hold(tensor, kind)
        run_steps(model, optimizer, batch, args, live, held_out=held_out_batch(recipe.data, recipe.task, args, batch))
    found = peaks(live.events, live.kinds, kind_under)
    return max(peak.n_bytes for mark, peak in found.items() if FIRST not in mark)


@pytest.mark.parametrize("name", SETTINGS)
def test_live_bytes_of_a_plan_are_those_of_the_step(name: str, recipe: Make, deep: Path) -> None:
    adapter, model, training = SETTINGS[name]
    if name == "galore 8 bits in backward":  # in two blocks the masks are more than a share
        model = {"source": str(deep)}
    wanted = recipe(adapter, model, **training)
    real = real_peak(wanted)  # first, so that tables which are made once in a process count in neither
    planned = plan_recipe(wanted, whole=True)
    assert planned.peak.n_bytes == pytest.approx(real, rel=0.002)  # a mask of booleans more or less


@pytest.mark.parametrize(
    "training",
    [
        {}, {"gradient_checkpointing": True}, {"fused": "off"},
        {HELD_OUT: 40, "fused": "off"}, {HELD_OUT: 90, "gradient_accumulation_steps": 2},
    ],
)  # fmt: skip
def test_depth_from_two_traces_is_that_of_one(training: dict[str, Any], recipe: Make, deep: Path) -> None:
    wanted = recipe(None, {"source": str(deep)}, **training)
    short, whole = plan_recipe(wanted), plan_recipe(wanted, whole=True)
    assert short.peak.n_bytes == pytest.approx(whole.peak.n_bytes, rel=1e-3)
    assert short.held == whole.held
    for phase in whole.phases:
        assert short.phases[phase].n_bytes == pytest.approx(whole.phases[phase].n_bytes, rel=1e-3), phase
    assert (short.n_trained, short.n_parameters) == (whole.n_trained, whole.n_parameters)
    assert short.work.flops == pytest.approx(whole.work.flops)


def test_a_first_step_is_left_out_where_each_parameter_has_a_gradient() -> None:
    model: Any = torch.nn.ParameterDict({"used": torch.ones(3), "idle": torch.ones(5)})
    optimizer = torch.optim.AdamW(model.parameters())
    step = Step(model, optimizer, {}, lambda mark: None, loss=lambda model, inputs: model["used"].sum())
    step.run()
    assert not step.reaches_all
    assert {p.numel() for p in optimizer.state} == {3}
    step.begin()
    assert {p.numel() for p in optimizer.state} == {3, 5}
    model.pop("idle")
    step = Step(model, optimizer, {}, lambda mark: None, loss=lambda model, inputs: model["used"].sum())
    step.run()
    assert step.reaches_all
    assert model["used"].grad is None


def test_gradients_that_are_summed_are_there_in_the_next_pass(recipe: Make) -> None:
    one, three = (plan_recipe(recipe({"method": "full"}, gradient_accumulation_steps=n)) for n in (1, 3))
    gradients = 4 * one.n_trained
    assert "gradients" not in one.phases["loss"].kinds
    assert three.phases["loss"].kinds["gradients"] == pytest.approx(gradients, rel=0.01)
    assert three.phases["loss"].n_bytes == pytest.approx(one.phases["loss"].n_bytes + gradients, rel=0.01)


def test_an_evaluation_is_a_phase_of_its_own(recipe: Make) -> None:
    without, small, large = (plan_recipe(recipe(fused="off", **given)) for given in ({}, {HELD_OUT: 1}, {HELD_OUT: 40}))
    assert "evaluation" not in without.phases
    assert small.peak_phase == without.peak_phase
    assert small.peak.n_bytes == without.peak.n_bytes
    assert large.peak_phase == "evaluation"
    assert "gradients" not in large.peak.kinds
    assert large.work.flops == without.work.flops


@pytest.mark.parametrize(("task", "n_rows"), [("dpo", 10), ("kto", 5)])
def test_an_evaluation_of_preferences_has_the_rows_of_its_task(task: str, n_rows: int, recipe: Make) -> None:
    values = recipe(**{HELD_OUT: 5}, per_device_train_batch_size=5).model_dump(exclude_unset=True) | {"task": task}
    plan = plan_recipe(parse_recipe(values))
    found = held_out_batch(plan.recipe.data, plan.recipe.task, plan.recipe.training_config(), plan.batch)
    assert found is not None
    assert found.n_rows == plan.batch.n_rows == n_rows
    assert 0.2 < plan.phases["evaluation"].n_bytes / plan.phases["forward"].n_bytes < 1


def test_an_evaluation_packs_as_it_is_told(recipe: Make) -> None:
    for given, packed in (({}, False), ({"packing": True}, True), ({"packing": True, "eval_packing": False}, False)):
        wanted = recipe(**{HELD_OUT: 5, "max_length": 61, **given})
        full = batch_of(wanted, config_of(wanted.model.source))
        found = held_out_batch(wanted.data, wanted.task, wanted.training_config(), full)
        assert found is not None
        assert (found.n_rows, found.length, found.packed) == (5, 61, packed)


def test_bytes_by_kind_add_up_and_trained_parameters_are_counted_without_a_step(recipe: Make) -> None:
    wanted = recipe()
    plan = plan_recipe(wanted)
    facts = as_json(plan)
    assert sum(facts["weights"]["kinds"].values()) == facts["weights"]["bytes"]
    assert facts["peak"]["bytes"] == max(phase["bytes"] for phase in facts["phases"].values())
    assert plan.peak.kinds["optimizer state"] == pytest.approx(8 * plan.n_trained, rel=0.02)
    assert count_trained(wanted.model, wanted.adapter, plan.config) == plan.n_trained


def test_unknown_names_and_long_rows_are_told(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean llama-3-8b"):
        config_of("llama-3-8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FormatError, match=r"the config of meta/Llama-3-8B cannot be read.*the preset llama-3-8b needs"):
        config_of("meta/Llama-3-8B")
    with pytest.raises(FormatError, match=r"holds no config\.json") as raised:
        config_of(str(tmp_path))
    assert "the preset" not in str(raised.value)
    with pytest.raises(ConfigError, match="max_length=65 is more than the 64 tokens"):
        plan_recipe(recipe(max_length=65))


def moe_config(**changed: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=131, hidden_size=32, intermediate_size=208, moe_intermediate_size=24, num_hidden_layers=8,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=7, num_experts_per_tok=2,
        max_position_embeddings=64, dtype=torch.bfloat16, **changed,
    )  # fmt: skip


def test_blocks_that_differ_are_all_traced(recipe: Make) -> None:
    config = moe_config(mlp_only_layers=[0, 1, 2])
    plan = plan_recipe(recipe(), config=config)
    base = AutoModelForCausalLM.from_config(config)
    assert plan.n_parameters - plan.n_trained == sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_blocks_that_drop_run_as_the_model_wrote_them_beside_a_fused_head(
    rate: float, recipe: Make, tmp_path: Path
) -> None:
    config = GPT2Config(
        vocab_size=1031, n_embd=48, n_layer=3, n_head=4, n_positions=64, embd_pdrop=rate, attn_pdrop=rate,
        resid_pdrop=rate,
    )  # fmt: skip
    torch.manual_seed(7)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "drops")
    wanted = recipe(None, {"source": str(tmp_path / "drops")})
    planned = plan_recipe(wanted)
    assert planned.peak.n_bytes == pytest.approx(real_peak(wanted), rel=0.01)
    assert not planned.not_fused
    assert (planned.work.n_general > 0) == (rate > 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused", ["auto", "off"])
def test_a_mixture_of_experts_is_planned_in_every_dtype(dtype: str, fused: str, recipe: Make, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=131, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(7)
    MixtralForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "mixture")
    wanted = recipe(None, {"source": str(tmp_path / "mixture"), "dtype": dtype}, fused=fused)
    planned = plan_recipe(wanted)
    assert planned.peak.n_bytes == pytest.approx(real_peak(wanted), rel=0.01)
    experts = 2 * 2 * 3 * 2 * 2 * 40 * 48 * 69  # multiply-adds, both passes, matrices, blocks, experts a token
    assert planned.work.flops > experts


@pytest.mark.parametrize("on_experts", [False, True])
def test_experts_in_codes_are_planned(on_experts: bool, recipe: Make, tmp_path: Path) -> None:
    """A plan sends all experts the same number of tokens; real ones differ."""
    make_gpt_oss(tmp_path)
    adapter = {"method": "lora", "r": 5, "target_modules": ["q_proj"]}
    adapter |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if on_experts else {}
    wanted = recipe(adapter, {"source": str(tmp_path / "coded")})
    planned = plan_recipe(wanted)
    assert planned.peak.n_bytes == pytest.approx(real_peak(wanted), rel=0.05)
    assert planned.work.flops > 2 * 2 * 3 * 2 * 2 * 64 * 96 * 69


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("fused", ["auto", "off"])
def test_a_step_of_preferences_is_that_of_its_trainer(
    fused: str, saved: bool, recipe: Make, tiny: Path, tmp_path: Path
) -> None:
    base, config = AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=41, target_modules="all-linear")
    if saved:
        get_peft_model(base, config).save_pretrained(tmp_path / "saved")
        base = AutoModelForCausalLM.from_pretrained(tiny)
    adapter = (
        {"from": str(tmp_path / "saved")} if saved else {"method": "lora", "r": 41, "target_modules": "all-linear"}
    )
    wanted = parse_recipe(recipe(adapter, fused=fused).model_dump(exclude_unset=True) | {"task": "dpo"})
    planned = plan_recipe(wanted, whole=True)
    assert planned.batch.n_rows == 2 * 3
    rows = Dataset.from_list([{"prompt": "a", "chosen": "bb", "rejected": "c"}] * 5)
    args = wanted.training_config()
    args.use_cpu, args.report_to = True, []
    live = LiveBytes()
    trainer = DPOTrainer(
        PeftModel.from_pretrained(base, tmp_path / "saved", is_trainable=True) if saved else base, args=args,
        train_dataset=rows, processing_class=byte_tokenizer(), peft_config=None if saved else config,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # as its loop sets it
    inputs = planned.batch.inputs(trainer.model.config.vocab_size)
    mask = torch.ones_like(inputs["input_ids"])
    given = {"input_ids": inputs["input_ids"], "attention_mask": mask, "completion_mask": mask}
    with trainer.fusing(), live:
        for tensor, kind in (*kinds_of(trainer.model), *((t, ADAPTERS) for t in copied(trainer))):
            live.hold(tensor, kind)
        trainer.training_step(trainer.model_wrapped.train(), given)
    found = peaks(live.events, live.kinds, kind_under)
    phases = [planned.phases[phase].n_bytes for phase in ("forward", "loss", "backward")]
    state = planned.peak.kinds["optimizer state"]
    assert max(phases) - state == pytest.approx(max(peak.n_bytes for peak in found.values()), rel=0.02)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_an_adapter_that_is_trained_on_is_held_twice_also_where_its_scores_are_known(
    task: str, before: bool, recipe: Make, tiny: Path, tmp_path: Path
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=5))
    model.save_pretrained(tmp_path / "saved")
    values = recipe({"from": str(tmp_path / "saved")}).model_dump(exclude_unset=True) | {"task": task}
    values["training"] |= {
        "precompute_ref_log_probs": before,
        **({"loss_type": "apo_zero_unpaired"} if task == "kto" else {}),
    }
    plan = plan_recipe(parse_recipe(values))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.n_trained == sum(p.numel() for p in trained)
    assert plan.held.kinds[ADAPTERS] == 2 * sum(p.nbytes for p in trained)


def copied(trainer: DPOTrainer) -> Iterator[torch.Tensor]:
    """Return the tensors that the reference of a trainer holds beside the model."""
    own = {id(t) for t in trainer.model.parameters()}
    for _, module in trainer.ref_model._start:
        yield from (t for t in module.parameters() if id(t) not in own)


@pytest.mark.parametrize(
    ("task", "method", "told"),
    [
        ("reward", "lora", "task reward is not planned.*a head of its own.*--set training.max_steps=2"),
        ("grpo", "full", "task grpo of a whole model is not planned.*a copy of the model"),
        ("dpo", "full", "task dpo of a whole model is not planned.*a copy of the model"),
    ],
)
def test_tasks_that_are_not_planned_are_told(task: str, method: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        require_planned(task, method)


def test_the_reference_costs_a_pass_and_a_score_computed_before_does_not(recipe: Make) -> None:
    values = recipe().model_dump(exclude_unset=True) | {"task": "kto"}
    flops = {}
    for loss, before in (("kto", False), ("apo_zero_unpaired", False), ("apo_zero_unpaired", True)):
        values["training"] |= {"loss_type": loss, "precompute_ref_log_probs": before}
        flops[loss, before] = plan_recipe(parse_recipe(values)).work.flops
    assert flops["kto", False] > 1.5 * flops["apo_zero_unpaired", False] > 1.5 * flops["apo_zero_unpaired", True]


def test_adapters_of_some_blocks_are_counted_where_they_are(recipe: Make, deep: Path) -> None:
    wanted = recipe({"method": "lora", "r": 5, "layers_to_transform": [4]}, {"source": str(deep)})
    short, whole = plan_recipe(wanted), plan_recipe(wanted, whole=True)
    assert short.n_trained == whole.n_trained == count_trained(wanted.model, wanted.adapter, short.config) > 0


def test_models_that_are_no_causal_language_models_are_told(recipe: Make) -> None:
    wanted = recipe()
    adapter = wanted.adapter_config()
    assert adapter is not None
    encodes = T5Config(vocab_size=131, d_model=32, d_ff=48, num_layers=5, num_heads=2, d_kv=16)
    config = BertConfig(vocab_size=131, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    for ask, told in (
        (lambda: plan_recipe(wanted, config=encodes), "an encoder with a decoder (t5)"),
        (lambda: plan_recipe(wanted, config=config), "an encoder (bert)"),
        (lambda: count_trained(wanted.model, wanted.adapter, config), "an encoder (bert)"),
        (lambda: serving_of(config, wanted.model, adapter, 10**9, 7), "an encoder (bert)"),
    ):
        with pytest.raises(ConfigError, match=f"is {re.escape(told)}: .* Give one of them"):
            ask()


def test_an_encoder_with_a_decoder_is_planned_for_serving(recipe: Make) -> None:
    wanted = recipe({"method": "lora", "r": 5, "target_modules": ["q", "wo"]})
    sizes = {"vocab_size": 131, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2, "d_kv": 16}
    config = T5Config(**sizes, decoder_start_token_id=0)
    adapter, model = wanted.adapter_config(), AutoModelForSeq2SeqLM.from_config(config)
    assert adapter is not None
    base = sum(weight.nbytes for weight in model.parameters())
    n_trained = count_trained(wanted.model, wanted.adapter, config)
    attached = get_peft_model(model, LoraConfig(r=5, target_modules=["q", "wo"]))
    assert n_trained == sum(weight.numel() for weight in attached.parameters() if weight.requires_grad) > 0
    found = serving_of(config, wanted.model, adapter, 10**9, n_trained)
    assert (found.base, found.adapter) == (base, 4 * n_trained)
    values_of_a_token = 2 * 2 * 2 * 16 + 32  # keys and values of 2 layers, and the encoder's state
    assert found.page == found.block * values_of_a_token * 4


def test_products_with_codes_count_where_checkpointing_watches_them(recipe: Make) -> None:
    dense, coded = (
        plan_recipe(recipe(None, {"quantization": kind}, fused="off", gradient_checkpointing="selective"))
        for kind in ("none", "nf4")
    )
    assert coded.work.flops == pytest.approx(dense.work.flops, rel=0.02)


def test_views_move_nothing_and_ops_whose_names_begin_alike_do() -> None:
    x = torch.ones(7, 11)
    traced = Traced(x.to("meta"), x.device)
    with CountWork() as counted:
        counted.on = True
        x.t(), x.unsqueeze(0), x.select(0, 1), x.split(3)
        assert traced.device == x.device  # it answers by itself
        assert counted.passes[0].moved == 0
        assert counted.passes[0].n_ops == 4
        x.tanh()
        assert counted.passes[0].moved == 2 * x.nbytes
        torch.ops.aten.select_backward(x[0], [7, 11], 0, 1)
        assert counted.passes[0].moved == 3 * x.nbytes + x[0].nbytes
