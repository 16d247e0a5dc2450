import json
import math
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from veneer import LoraConfig, get_peft_model
from veneer.errors import ConfigError, DataError, TrainingError
from veneer.model.memory.checkpointing import is_selective
from veneer.model.memory.offload import ActivationOffload, PageFile
from veneer.train import loss
from veneer.train import run_trainer as trainer_module
from veneer.train.config import SFTConfig
from veneer.train.trainer import SFTTrainer

LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TEXTS = [
    "the cat sat on the mat",
    "a dog ran",
    "the bird flew over the big red house and then it sat on the green tree",
    "yes",
    "hello what did the dog say please",
    "one two three four five six seven eight nine ten",
    "no it was blue",
    "a small cat and a big dog ran under the tree",
]


def text_data(n=8):
    return Dataset.from_list([{"text": TEXTS[i % len(TEXTS)]} for i in range(n)])


def config(tmp_path, **changes):
    base = {
        "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 0.01, "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False,
        "disable_tqdm": True, "max_length": 32, "per_device_train_batch_size": 2,
    }  # fmt: skip
    return SFTConfig(**{**base, **changes})


def trainer_of(model, tokenizer, args, data=None, **options):
    options.setdefault("peft_config", LoraConfig(**LORA))
    return SFTTrainer(model, args, train_dataset=data or text_data(), processing_class=tokenizer, **options)


def logged(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.kept = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.kept.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("packing", [False, True])
def test_accumulating_four_batches_equals_one_four_times_as_large(tmp_path, tokenizer, make_model, packing):
    runs = {}
    for accumulate, batch in ((4, 1), (1, 4)):
        keep = KeepGradients()
        args = config(
            tmp_path, gradient_accumulation_steps=accumulate, per_device_train_batch_size=batch, max_steps=2,
            packing=packing, max_length=19 if packing else 32, train_sampling_strategy="sequential", max_grad_norm=0.0,
        )  # fmt: skip
        trainer = trainer_of(make_model(), tokenizer, args, callbacks=[keep])
        trainer.train()
        runs[accumulate] = logged(trainer), keep.kept
    assert runs[4][0] == pytest.approx(runs[1][0], rel=1e-5)
    for ours, expected in zip(runs[4][1], runs[1][1], strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_step(tmp_path, tokenizer, make_model):
    model = make_model()
    args = config(
        tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trainer_of(model, tokenizer, args)
    total, n_tokens = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            log_p = model(ids).logits.log_softmax(-1)[0, :-1]
            total -= log_p.gather(1, ids[0, 1:, None]).sum().item()
            n_tokens += ids.shape[1] - 1
    trainer.train()
    assert logged(trainer) == [pytest.approx(total / n_tokens, rel=1e-5)]


def test_packed_training_equals_unpacked_training(tmp_path, tokenizer, make_model):
    losses = []
    for packing in (False, True):
        args = config(
            tmp_path,
            packing=packing,
            max_length=60,
            per_device_train_batch_size=8,
            train_sampling_strategy="sequential",
        )
        trainer = trainer_of(make_model("llama", "sdpa"), tokenizer, args)
        trainer.train()
        losses.append(logged(trainer))
        assert (trainer.train_dataset.num_rows < 8) is packing
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]


def test_evaluation_is_over_tokens_and_leaves_the_random_numbers_alone(tmp_path, tokenizer, make_model):
    args = config(tmp_path, per_device_eval_batch_size=3)
    trainer = trainer_of(make_model(), tokenizer, args, eval_dataset=text_data(7))
    torch.manual_seed(8)
    first = trainer.evaluate()
    following = torch.rand(1)
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    torch.manual_seed(8)
    assert torch.equal(torch.rand(1), following)


def test_evaluation_after_training_computes_as_within_it(tmp_path, tokenizer, make_model):
    args = config(tmp_path, bf16=True, eval_strategy="steps", eval_steps=3)
    trainer = trainer_of(make_model(), tokenizer, args, eval_dataset=text_data(5))
    trainer.train()
    within = logged(trainer, "eval_loss")[-1]
    assert trainer.evaluate()["eval_loss"] == within


def test_assistant_only_loss_works_on_a_template_without_markers(tmp_path, tokenizer, make_model):
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes please"}] for text in TEXTS]
    args = config(tmp_path, assistant_only_loss=True)
    data = Dataset.from_list([{"messages": row} for row in rows])
    trainer = trainer_of(make_model(), tokenizer, args, data)
    assert trainer.args.assistant_only_loss
    for labels in trainer.train_dataset["labels"]:
        assert tokenizer.decode([label for label in labels if label != -100]) == "yes please <end>"


def test_assistant_only_loss_on_plain_text_is_refused(tmp_path, tokenizer, make_model):
    with pytest.raises(ConfigError, match="needs conversations"):
        trainer_of(make_model(), tokenizer, config(tmp_path, assistant_only_loss=True))


@pytest.mark.parametrize(
    ("option", "row"),
    [
        ("assistant_only_loss", {"prompt": "what", "completion": " yes"}),
        ("completion_only_loss", {"text": "yes"}),
        (
            "completion_only_loss",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_a_loss_of_answers_on_rows_without_them_is_refused(tmp_path, tokenizer, make_model, option, row):
    with pytest.raises(ConfigError, match=f"{option}=True needs"):
        trainer_of(make_model(), tokenizer, config(tmp_path, **{option: True}), Dataset.from_list([row]))


def test_a_formatting_function_gives_the_text(tmp_path, tokenizer, make_model):
    data = Dataset.from_list([{"q": "what", "a": "yes"}])
    trainer = trainer_of(
        make_model(), tokenizer, config(tmp_path), data, formatting_func=lambda r: r["q"] + " " + r["a"]
    )
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "what yes <end>"


def test_plain_training_arguments_are_accepted(tmp_path, tokenizer, make_model):
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = trainer_of(make_model(), tokenizer, args)
    trainer.train()
    assert isinstance(trainer.args, SFTConfig)
    assert trainer.args.max_steps == 1


def test_a_process_that_sees_several_devices_trains_on_one(tmp_path, tokenizer, make_model):
    args = config(tmp_path, per_device_train_batch_size=3)
    args._n_gpu = 2
    trainer = trainer_of(make_model(), tokenizer, args)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 3)
    assert args.n_gpu == 2


@pytest.mark.parametrize("eos_token", [None, "<end>"])
def test_settings_of_trl_are_accepted_with_the_tokens_that_they_name(tmp_path, tokenizer, make_model, eos_token):
    args = trl.SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", max_length=29,
        eos_token=eos_token, hub_token="secret",
    )  # fmt: skip
    trainer = trainer_of(make_model(), tokenizer, args)
    trainer.train()
    assert (trainer.args.eos_token, trainer.args.hub_token, trainer.args.max_length) == (eos_token, "secret", 29)


def test_gradients_are_clipped(tmp_path, tokenizer, make_model):
    keep = KeepGradients()
    trainer = trainer_of(make_model(), tokenizer, config(tmp_path, max_grad_norm=0.3, max_steps=1), callbacks=[keep])
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0.3
    norm = torch.stack([g.norm() for g in keep.kept[0].values()]).norm().item()
    assert norm == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_and_trains(tmp_path, tokenizer, make_model, reentrant):
    losses = []
    for on in (False, True):
        args = config(
            tmp_path, gradient_checkpointing=on, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        trainer = trainer_of(make_model(), tokenizer, args)
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
        {"activation_offloading": "disk"},
        {"gradient_checkpointing": "selective", "activation_offloading": "disk"},
        {"gradient_checkpointing": True, "activation_offloading": "disk"},
    ],
)
def test_activations_kept_otherwise_change_nothing(tmp_path, tokenizer, make_model, changes, fused, monkeypatch):
    pages, write = [], PageFile.write
    monkeypatch.setattr(PageFile, "write", lambda file, tensor: (pages.append(tensor.shape), write(file, tensor))[1])
    monkeypatch.setattr(trainer_module, "ActivationOffload", partial(ActivationOffload, at_least=1))
    ends = []
    for settings in ({}, changes):
        options = {"peft_config": LoraConfig(**{**LORA, "lora_dropout": 0.0 if fused == "auto" else 0.3})}
        trainer = trainer_of(make_model(), tokenizer, config(tmp_path, fused=fused, **settings), **options)
        trainer.train()
        ends.append((logged(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))
    block = trainer.model.base_model.layers[0].train()
    assert is_selective(block) is (trainer.args.gradient_checkpointing_kwargs or {}).get("selective", False)
    assert bool(pages) is ("activation_offloading" in changes)
    assert trainer.args.activation_offloading == changes.get("activation_offloading", False)
    json.dumps(trainer.args.to_dict())


def test_bf16_compute_trains_float32_weights(tmp_path, tokenizer, make_model):
    model = make_model().to(torch.bfloat16)
    trainer = trainer_of(model, tokenizer, config(tmp_path, bf16=True, max_steps=2))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert dtypes == {torch.float32}
    moved = [p for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    assert any((p != p.bfloat16().float()).any() for p in moved)
    assert "forward" not in vars(model)


def test_quantized_bases_keep_float32_adapters_too(tmp_path, tokenizer, make_model):
    model = make_model()
    model.is_loaded_in_4bit = True  # what makes TRL round trained weights to bfloat16
    adapted = get_peft_model(model, LoraConfig(**LORA))
    before = {n: p.clone() for n, p in adapted.named_parameters() if p.requires_grad}
    trainer_of(adapted, tokenizer, config(tmp_path), peft_config=None)
    assert all(torch.equal(dict(adapted.named_parameters())[n], p) for n, p in before.items())


def test_a_trainer_that_is_refused_leaves_the_model_as_it_was(tmp_path, tokenizer, make_model):
    model = make_model()
    model.is_loaded_in_4bit = True
    adapted = get_peft_model(model, LoraConfig(**LORA))
    adapted.config.use_cache = True
    before = {n: p.clone() for n, p in adapted.named_parameters()}
    with pytest.raises(KeyError, match="no such column"):
        trainer_of(
            adapted, tokenizer, config(tmp_path), peft_config=None, formatting_func=lambda row: row["no such column"]
        )
    assert all(torch.equal(p, before[n]) for n, p in adapted.named_parameters())
    assert "forward" not in vars(adapted)
    assert adapted.config.use_cache


def test_full_fine_tuning(tmp_path, tokenizer, make_model):
    trainer = trainer_of(make_model().to(torch.bfloat16), tokenizer, config(tmp_path), peft_config=None)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_a_model_that_would_train_nothing(tmp_path, tokenizer, make_model):
    trainer = trainer_of(make_model().requires_grad_(False), tokenizer, config(tmp_path), peft_config=None)
    with pytest.raises(TrainingError, match="nothing would be trained"):
        trainer.train()


def test_an_adapter_that_the_loss_does_not_reach(tmp_path, tokenizer, make_model):
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    trainer = trainer_of(model, tokenizer, config(tmp_path), peft_config=None)
    with model.disable_adapter(), pytest.raises(TrainingError, match="depends on no trainable parameter"):
        trainer.train()


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoints(tmp_path, tokenizer, make_model, poison):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 3:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                if poison == "loss":
                    parameter.data.fill_(math.nan)
                else:
                    parameter.register_hook(lambda grad: grad * math.inf)

    args = config(tmp_path, max_steps=9, save_strategy="steps", save_steps=1)
    trainer = trainer_of(make_model(), tokenizer, args, callbacks=[Poison()])
    with pytest.raises(TrainingError, match=r"in step 4.*earlier checkpoints stay"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3)]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert all(math.isfinite(line["loss"]) for line in state["log_history"])


def test_an_adapter_on_the_output_head_is_trained(tmp_path, tokenizer, make_model):
    trainer = trainer_of(
        make_model(), tokenizer, config(tmp_path), peft_config=LoraConfig(r=3, target_modules=["lm_head"])
    )
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_lora_plus_cannot_group_an_optimizer_that_is_given(tmp_path, tokenizer, make_model):
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match=r"lora_plus=7 groups .* optimizers brings one"):
        trainer_of(model, tokenizer, config(tmp_path, lora_plus=7), optimizers=(given, None), peft_config=None)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dynamic_fine_tuning_weighs_by_probability(tmp_path, tokenizer, make_model, smoothing):
    model = make_model()
    args = config(
        tmp_path, loss_type="dft", max_steps=1, train_sampling_strategy="sequential", label_smoothing_factor=smoothing
    )
    trainer = trainer_of(model, tokenizer, args, text_data(2))
    logp, spread = [], []
    with torch.no_grad():
        for text in TEXTS[:2]:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            every = model(ids).logits.log_softmax(-1)[0, :-1]
            logp.append(every.gather(1, ids[0, 1:, None]).flatten())
            spread.append(every.mean(dim=-1))
    trainer.train()
    smoothed = (1 - smoothing) * torch.cat(logp) + smoothing * torch.cat(spread)
    expected = -(smoothed * torch.cat(logp).exp()).mean().item()
    assert logged(trainer) == [pytest.approx(expected, rel=1e-5)]


def test_the_description_names_modules_counts_and_precision(tmp_path, tokenizer, make_model):
    line = trainer_of(make_model(), tokenizer, config(tmp_path)).describe()
    n = 2 * (3 * (24 + 24) + 3 * (24 + 8) + 3 * (44 + 24))
    assert f"trains {n:,} of" in line
    assert line.endswith("float32) in down_proj ×2, q_proj ×2, v_proj ×2")


def test_wrong_peft_configs_are_refused(tmp_path, tokenizer, make_model):
    with pytest.raises(ConfigError, match=r"veneer\.LoraConfig, not builtins\.dict"):
        trainer_of(make_model(), tokenizer, config(tmp_path), peft_config={"r": 8})
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    with pytest.raises(ConfigError, match="has an adapter already"):
        trainer_of(model, tokenizer, config(tmp_path))


def test_loading_options_for_a_loaded_model_are_refused(tmp_path, tokenizer, make_model):
    with pytest.raises(ConfigError, match="the model is loaded already"):
        trainer_of(make_model(), tokenizer, config(tmp_path, model_init_kwargs={"dtype": "float32"}))


def test_streamed_data_cannot_be_packed(tmp_path, tokenizer, make_model):
    with pytest.raises(ConfigError, match="not streamed"):
        trainer_of(make_model(), tokenizer, config(tmp_path, packing=True), text_data().to_iterable_dataset())


def test_unknown_columns(tmp_path, tokenizer, make_model):
    with pytest.raises(DataError, match=r"\['answer'\]"):
        trainer_of(make_model(), tokenizer, config(tmp_path), Dataset.from_list([{"answer": "a"}]))


@pytest.mark.parametrize("packing", [True, False])
def test_the_fused_path_trains_as_the_general_one(tmp_path, tokenizer, make_model, packing, monkeypatch):
    chunked = []
    own = loss.linear_cross_entropy_and_hits
    monkeypatch.setattr(loss, "linear_cross_entropy_and_hits", lambda *a: chunked.append(a) or own(*a))
    runs = {}
    for choice in ("auto", "off"):
        keep = KeepGradients()
        args = config(
            tmp_path, fused=choice, packing=packing, max_length=60, per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = trainer_of(make_model("llama", "sdpa"), tokenizer, args, callbacks=[keep])
        classes = [type(m) for m in trainer.model.modules()]
        with monkeypatch.context() as patch:
            if choice == "off":  # logits of all tokens too
                patch.setattr("veneer.model.fused.head.head_of", lambda model: None)
            trainer.train()
        assert [type(m) for m in trainer.model.modules()] == classes
        runs[choice] = logged(trainer), logged(trainer, "mean_token_accuracy"), keep.kept
        assert len(chunked) == 3  # each step of the fused run, none of the other
    assert runs["auto"][0] == pytest.approx(runs["off"][0], rel=1e-5)
    assert runs["auto"][1] == pytest.approx(runs["off"][1])
    for ours, expected in zip(runs["auto"][2], runs["off"][2], strict=True):
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


def test_special_tokens_that_are_not_in_the_vocabulary_are_refused(tmp_path, tokenizer, make_model):
    args = config(tmp_path, eos_token="<eot>")
    with pytest.raises(ConfigError, match=r"eos_token='<eot>': not in the vocabulary"):
        trainer_of(make_model(), tokenizer, args)


def test_a_tokenizer_without_special_tokens_needs_one_named(tmp_path, tokenizer, make_model):
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="neither an end nor a padding token"):
        trainer_of(make_model(), tokenizer, config(tmp_path))
    trainer = trainer_of(make_model(), tokenizer, config(tmp_path, eos_token="<end>"))
    trainer.train()
    assert trainer.data_collator.pad_token_id == tokenizer.convert_tokens_to_ids("<end>")


def test_trls_own_trainer_trains_an_adapted_model_and_takes_configs_of_peft_alone(tmp_path, tokenizer, make_model):
    settings = {key: value for key, value in vars(config(tmp_path)).items() if key in ("output_dir", "max_steps")}
    args = trl.SFTConfig(**settings, use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_length=32)
    common = {"args": args, "train_dataset": text_data(), "processing_class": tokenizer}
    with pytest.raises((TypeError, ValueError), match=r"must be a `peft.PeftConfig` instance"):
        trl.SFTTrainer(make_model(), peft_config=LoraConfig(**LORA), **common)
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trl.SFTTrainer(model, **common).train()
    assert before
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
