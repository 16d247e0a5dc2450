"""Several processes on one run: who decides, what is summed, and which loss is computed."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from veneer.errors import ConfigError, Interrupted, TrainingError
from veneer.model.fused.decoder import fused
from veneer.train import guards, loss, processes, run_trainer
from veneer.train.loss import token_loss
from veneer.train.processes import by_main, gathered, is_main, largest, n_processes, summed, together


@pytest.fixture
def group(tmp_path):
    """A group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_alone_nothing_is_asked_of_others(monkeypatch):
    device = torch.device("cpu")
    assert (n_processes(), is_main(), by_main(lambda: 7), gathered("a")) == (1, True, 7, ["a"])
    assert (summed([0.1, 3], device), largest(5, device)) == ([0.1, 3], 5)
    monkeypatch.setenv("RANK", "1")
    assert not is_main()


def test_what_the_main_process_raises_is_raised_in_the_others(monkeypatch):
    sent = []
    monkeypatch.setattr(processes, "n_processes", lambda: 2)
    monkeypatch.setattr(processes, "_told", lambda outcome: sent.append(outcome) or outcome)
    for error, told in (
        (ConfigError("no"), ConfigError("no")),
        (OSError("gone"), TrainingError("the main process ended: OSError: gone")),
    ):

        def fail(error=error):
            raise error

        monkeypatch.setattr(processes, "is_main", lambda: True)
        with pytest.raises(type(error), match=str(error)):
            by_main(fail)
        value, passed = sent.pop()
        assert (value, type(passed), str(passed)) == (None, type(told), str(told))
        monkeypatch.setattr(processes, "is_main", lambda: False)
        monkeypatch.setattr(processes, "_told", lambda _, passed=passed: (None, passed))
        with pytest.raises(type(told), match=str(told)):
            by_main(lambda: pytest.fail("not here"))
        monkeypatch.setattr(processes, "_told", lambda outcome: sent.append(outcome) or outcome)


def test_processes_that_would_train_different_runs_are_refused(monkeypatch):
    processes.require_alike({"recipe": {"seed": 3}, "data": None})
    other = [{"recipe": {"seed": 3}, "data": "a"}, {"recipe": {"seed": 5}, "data": "a"}]
    monkeypatch.setattr(processes, "gathered", lambda mine: other)
    with pytest.raises(ConfigError, match="process 1 is about to train another run than process 0: recipe differ"):
        processes.require_alike(other[0])


@pytest.mark.usefixtures("group")
def test_joined_gradients_keep_the_fused_loss(make_model, monkeypatch):
    model = make_model().train()
    model.lm_head.requires_grad_(False)
    ids = torch.randint(0, model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(5))
    inputs, calls = {"input_ids": ids, "labels": ids}, []
    chunked = loss._loss_in_chunks
    monkeypatch.setattr(loss, "_loss_in_chunks", lambda *args: calls.append(args) or chunked(*args))
    with fused(model) as took:
        assert took
        expected = token_loss(model, inputs)
        expected.total.backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found = token_loss(DistributedDataParallel(model), inputs)
        found.total.backward()
    assert len(calls) == 2
    assert torch.equal(found.total, expected.total)
    assert before
    for name, gradient in before.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_split_models_are_refused(monkeypatch):
    split = SimpleNamespace(is_fsdp_enabled=True, is_deepspeed_enabled=False)
    guards.require_whole_models(split)
    monkeypatch.setattr(guards, "n_processes", lambda: 2)
    with pytest.raises(ConfigError, match="fsdp and deepspeed are not supported"):
        guards.require_whole_models(split)


def test_accelerate_is_never_asked_to_wrap_a_cut_base(monkeypatch):
    """It refuses one, though only on GPUs."""
    model, asked = object(), []
    accelerator = SimpleNamespace(prepare_model=lambda model, **how: asked.append(how) or model)
    monkeypatch.setattr(run_trainer, "is_cut", lambda model: True)
    monkeypatch.setattr(run_trainer, "DistributedDataParallel", lambda model, **how: (model, how))
    found = run_trainer.RunTrainer._wrap_model(SimpleNamespace(model=model, accelerator=accelerator), model)
    assert (asked, found) == ([{"evaluation_mode": True}], (model, {"broadcast_buffers": False}))


@pytest.mark.parametrize(
    ("reentrant", "offloads", "ddp"), [(True, False, True), (False, True, True), (True, True, False)]
)
def test_settings_that_a_cut_base_does_not_go_with_are_refused(reentrant, offloads, ddp):
    def require(reentrant, offloads, ddp):
        given = {"ddp_broadcast_buffers": ddp, "ddp_find_unused_parameters": ddp}
        guards.require_settings_of_cut_base(reentrant, SimpleNamespace(activation_offloading=offloads, **given))

    require(False, False, False)
    with pytest.raises(ConfigError, match="sharded over processes cannot be trained with") as refused:
        require(reentrant, offloads, ddp)
    told = [name in str(refused.value) for name in ("use_reentrant", "offloading", "broadcast", "find_unused")]
    assert told == [reentrant, offloads, ddp, ddp]


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2780. This is "
    "typically caused by a remote worker hanging. GLHF!"
)


@pytest.mark.usefixtures("group")
def test_the_main_process_tells_why_another_has_ended(monkeypatch):
    def lose(error):
        with together():
            raise error

    with pytest.raises(RuntimeError, match="gloo"):
        lose(RuntimeError(GLOO))  # one process loses no other
    monkeypatch.setattr(processes, "n_processes", lambda: 2)
    with pytest.raises(
        TrainingError, match=r"ended without a word.* Its last messages: .*Connection closed by peer"
    ) as lost:
        lose(RuntimeError(GLOO))
    assert not any(part in str(lost.value) for part in ("pair.cc", "typically", "GLHF"))
    with pytest.raises(TrainingError, match="ended without a word"):
        lose(distributed.DistBackendError("NCCL: unhandled system error"))
    for error in (RuntimeError("shapes differ"), ConfigError("no"), TrainingError(f"as it says: {GLOO}")):
        with pytest.raises(type(error)) as caught:
            lose(error)
        assert caught.value is error
    with monkeypatch.context() as other:
        other.setattr(processes, "is_main", lambda: False)
        with pytest.raises(ConfigError, match="reward 2 is not finite"):
            lose(ConfigError("reward 2 is not finite"))
        with pytest.raises(TrainingError, match="a later word"):
            lose(TrainingError("a later word, of one that has lost the first"))
    with pytest.raises(TrainingError, match="process 0 has ended: reward 2 is not finite"):
        lose(RuntimeError(GLOO))
    processes._store().delete_key(processes._WORD)
    with monkeypatch.context() as other:
        other.setattr(processes, "is_main", lambda: False)
        with pytest.raises(Interrupted):
            lose(Interrupted(15))
    with pytest.raises(Interrupted) as caught:
        lose(RuntimeError(GLOO))
    assert caught.value.exit_code == 143
