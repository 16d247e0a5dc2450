import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from veneer import LoraConfig
from veneer.data.sampler import EpochSampler
from veneer.errors import ConfigError, TrainingError
from veneer.optim import AdamW8bit, PagedAdamW8bit
from veneer.train.checkpoint import PROGRESS_FILE, checkpoints, drop_old, latest_checkpoint, read_progress
from veneer.train.config import SFTConfig
from veneer.train.optimizer import FACTORIES
from veneer.train.trainer import SFTTrainer

STEPS = 8


def rows(n=11, seed=4):
    torch.manual_seed(seed)
    words = ["the", "cat", "dog", "sat", "ran", "red", "blue", "tree", "house", "yes"]
    return Dataset.from_list([{"text": " ".join(words[(i * j + 3) % 10] for j in range(2 + i % 7))} for i in range(n)])


@pytest.fixture
def start(tmp_path, tokenizer, make_model):
    def make(folder="run", data=None, r=3, whole=False, **changes):
        base = {
            "output_dir": str(tmp_path / folder),
            "max_steps": STEPS,
            "save_steps": 1,
            "logging_steps": 3,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.02,
            "max_length": 16,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "train_sampling_strategy": "group_by_length",
            "gradient_checkpointing": False,
        }
        return SFTTrainer(
            make_model(),
            SFTConfig(**{**base, **changes}),
            train_dataset=data or rows(),
            eval_dataset=rows(3, 9),
            processing_class=tokenizer,
            peft_config=None if whole else LoraConfig(r=r, lora_alpha=5, lora_dropout=0.3, target_modules="all-linear"),
        )

    return make


def logged(trainer):
    return {
        line["step"]: [line["loss"], line["mean_token_accuracy"], line["num_tokens"], line["learning_rate"]]
        for line in trainer.state.log_history
        if "loss" in line
    }


@pytest.mark.parametrize("whole", [False, True])
def test_a_resumed_run_logs_and_ends_as_the_whole_one(tmp_path, start, whole):
    first = start(whole=whole)
    result = first.train()
    for step in (2, 6, 7):  # in the first epoch, at its end (six steps), in the second
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", tmp_path / f"from{step}" / f"checkpoint-{step}")
        again = start(f"from{step}", whole=whole, save_strategy="no")
        resumed = again.train(resume_from_checkpoint=True)
        assert logged(again) == logged(first)
        assert resumed.training_loss == result.training_loss
        for (name, ours), (_, expected) in zip(
            again.model.named_parameters(), first.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, expected), (step, name)


def test_the_time_of_a_resumed_run_is_that_of_the_whole(tmp_path, start):
    start(save_steps=4).train()
    folder = tmp_path / "run" / "checkpoint-4"
    counted = json.loads((folder / PROGRESS_FILE).read_text())
    assert 0 < counted["seconds"] < 600
    (folder / PROGRESS_FILE).write_text(json.dumps({**counted, "seconds": 5000.0}))
    again = start(save_strategy="no")
    again.train(resume_from_checkpoint=str(folder))
    assert 5000 < again.seconds_trained() < 5600


@pytest.mark.parametrize("kept", [{"gradient_checkpointing": "selective"}, {"activation_offloading": "disk"}])
@pytest.mark.parametrize("from_kept", [False, True])
def test_how_activations_are_kept_does_not_touch_a_resume(tmp_path, start, kept, from_kept):
    first = start(**(kept if from_kept else {}), save_steps=3)
    first.train()
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "from3" / "checkpoint-3")
    again = start("from3", **kept, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(first)
    for key, expected in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], expected)


OPTIMIZERS = {
    "adamw_8bit": {},
    "adamw_bnb_8bit": {"whole": True},
    "paged_adamw_8bit": {"lora_plus": 5.0},
    "adamw_torch_fused": {"lora_plus": 3.0},
    "galore_adamw": {"whole": True, "optim_args": "rank=3, gap=2, side=longer"},
    "galore_adamw_8bit": {"whole": True, "optim_args": "rank=3, gap=2"},
    "galore_adamw_layerwise": {"whole": True, "optim_args": "rank=3, update_proj_gap=2", "max_grad_norm": 0.0},
    "galore_adamw_8bit_layerwise": {"whole": True, "optim_args": "rank=5, gap=3", "max_grad_norm": 0.0},
}


def test_every_optimizer_by_name_is_resumed_below():
    assert FACTORIES.keys() <= OPTIMIZERS.keys()


@pytest.fixture
def small_is_large(monkeypatch):
    """The 8-bit state and its pages, which only larger tensors have, for the tensors of a small model too."""
    for optimizer in (AdamW8bit, PagedAdamW8bit):
        sizes = {"min_8bit_size": 32, "paged_from": 64}
        defaults = optimizer.__init__.__kwdefaults__
        monkeypatch.setattr(optimizer.__init__, "__kwdefaults__", {k: sizes.get(k, v) for k, v in defaults.items()})


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_any_optimizer_resumes_bit_for_bit(tmp_path, start, name):
    options = {"optim": name, "max_steps": 5, "learning_rate": 2e-3, **OPTIMIZERS[name]}
    first = start(**options, save_steps=3)
    first.train()
    kept = first.optimizer.state_dict()["state"].values()
    assert any("state1" in state for state in kept) == ("8bit" in name)
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "from3" / "checkpoint-3")
    again = start("from3", **options, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(first)
    before = start("before", **options).model.state_dict()
    for key, expected in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], expected)
    assert any(not torch.equal(before[key], value) for key, value in first.model.state_dict().items())


def test_galore_projects_linear_layers_and_frees_gradients_as_it_goes(start):
    trainer = start(optim="galore_adamw_layerwise", whole=True, max_steps=1, optim_args="rank=3", max_grad_norm=0.0)
    projected = {id(p) for g in trainer.create_optimizer().param_groups if g["projected"] for p in g["params"]}
    named = {name: id(p) in projected for name, p in trainer.model.named_parameters()}
    assert {name for name, on in named.items() if on} == {n for n in named if "_proj.weight" in n}
    trainer.train()
    assert all(p.grad is None for p in trainer.model.parameters())
    some = next(trainer.model.parameters())
    before = some.clone()
    (some.sum() * 3).backward()  # after training, a backward pass is a backward pass
    assert torch.equal(some, before)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        start(optim="galore_adamw", whole=True, optim_target_modules=["qproj"]).create_optimizer()


def test_lora_plus_lets_b_learn_faster_and_refuses_groups_of_others(start):
    groups = start(lora_plus=7.0).create_optimizer().param_groups
    assert {g["lr"] for g in groups} == {0.02, 0.02 * 7}
    with pytest.raises(ConfigError, match="has groups of its own"):
        start(lora_plus=7.0, optim="galore_adamw").create_optimizer()


def test_an_evaluation_after_the_last_save_of_an_epoch_changes_nothing(tmp_path, start):
    first = start(eval_strategy="epoch", save_steps=6)
    first.train()
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "from6" / "checkpoint-6")
    again = start("from6", eval_strategy="epoch", save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert logged(again) == logged(first)


def test_a_checkpoint_holds_the_adapter_and_no_weight_of_the_base(tmp_path, start):
    trainer = start(max_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    } <= names
    assert not {"model.safetensors", "training_args.bin"} & names
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in load_file(folder / "trained.safetensors").values()) == trained
    assert read_progress(folder)["data_digest"] == trainer.data_digest


def test_the_best_model_is_kept_and_loaded(tmp_path, start):
    trainer = start(
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_total_limit=2, learning_rate=0.5
    )
    trainer.train()
    evals = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(evals, key=evals.__getitem__)
    assert best < STEPS
    assert trainer.state.best_global_step == best
    assert {path.name for path in checkpoints(tmp_path / "run")} >= {f"checkpoint-{best}", f"checkpoint-{STEPS}"}
    kept = load_file(tmp_path / "run" / f"checkpoint-{best}" / "trained.safetensors")
    assert all(torch.equal(p, kept[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[best], rel=1e-6)


def test_other_data_cannot_be_resumed_on(start):
    start(max_steps=2).train()
    with pytest.raises(TrainingError, match="trained on other data"):
        start(data=rows(12)).train(resume_from_checkpoint=True)


def test_another_adapter_cannot_be_resumed_into(start):
    start(max_steps=2).train()
    with pytest.raises(TrainingError, match=r"another adapter.*shape \(2, 24\), in the checkpoint \(3, 24\)"):
        start(r=2).train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_told(tmp_path, start):
    start(max_steps=2).train()
    path = tmp_path / "run" / "checkpoint-2" / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TrainingError, match="missing or damaged"):
        start().train(resume_from_checkpoint=str(path.parent))


def test_nothing_to_resume(tmp_path, start):
    with pytest.raises(TrainingError, match="holds no complete checkpoint-N"):
        start().train(resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match=r"holds no trainer_state\.json"):
        start().train(resume_from_checkpoint=str(tmp_path))


def test_only_whole_checkpoints_count(tmp_path):
    for name, state in (
        ("checkpoint-3", "{}"),
        ("checkpoint-12", "{}"),
        ("checkpoint-20", "{"),
        ("checkpoint-x", "{}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-30").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-12"


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [4, 5]), (2, 1, [1, 5]), (1, 2, [2, 5]), (None, None, [1, 2, 3, 4, 5]), (1, 5, [5])],
)
def test_old_checkpoints_go_but_never_the_last_or_the_best(tmp_path, keep, best, left):
    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    drop_old(tmp_path, keep, best and tmp_path / f"checkpoint-{best}")
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_the_order_is_a_function_of_seed_and_epoch():
    lengths = [3, 11, 5, 2, 7, 13, 1, 9, 4]
    for group in (None, 3):
        sampler = EpochSampler(lengths, 5, group)
        first = list(sampler)
        assert sorted(first) == list(range(9))
        sampler.set_epoch(1)
        assert list(sampler) != first
        sampler.set_epoch(0)
        assert list(sampler) == first == list(EpochSampler(lengths, 5, group))
        assert list(EpochSampler(lengths, 6, group)) != first
    assert first[0] == 5  # the longest comes first


def test_groups_hold_examples_of_like_length():
    torch.manual_seed(2)
    lengths = torch.randint(1, 100, (300,)).tolist()
    order = list(EpochSampler(lengths, 5, 4))[4:]
    spread = [max(g) - min(g) for g in ([lengths[i] for i in order[k : k + 4]] for k in range(0, 280, 4))]
    assert sum(spread) / len(spread) < 10
