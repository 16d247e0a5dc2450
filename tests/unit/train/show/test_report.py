import pytest
import torch
from matplotlib.image import imread
from rich.text import Text
from transformers import TrainingArguments

from pictures import check_picture
from veneer.errors import ConfigError
from veneer.optim import AdamW8bit, PagedAdamW8bit
from veneer.train import optimizer
from veneer.train.optimizer import choose_optimizer
from veneer.train.show.report import draw_loss, environment, loss_figure
from veneer.train.show.sample import TRAINED, shown_sample


def test_the_picture_shows_both_curves(tmp_path):
    history = [{"step": i, "loss": 3.0 / i} for i in range(1, 9)]
    draw_loss(history, tmp_path / "a.png")
    draw_loss([*history, {"step": 4, "eval_loss": 2.5}, {"step": 8, "eval_loss": 2.0}], tmp_path / "b.png")
    a, b = imread(tmp_path / "a.png"), imread(tmp_path / "b.png")
    assert a.shape == b.shape == (480, 840, 4)
    assert (a != b).any()


@pytest.mark.parametrize("steps", [[1], [1, 2, 3], [0, 100_000, 2_000_000]])
def test_the_picture_of_a_run_keeps_its_frame(steps):
    figure = loss_figure([{"step": i, "loss": 1.0 + i} for i in steps], f"Loss of {'very/' * 40}first")
    check_picture(figure)
    assert figure.axes[0].get_title().endswith("very/first")
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
    assert figure.axes[0].lines[0].get_marker() == ("o" if len(steps) == 1 else "None")


def test_rewards_are_drawn_above_the_loss():
    history = [{"step": i, "loss": 0.1 / i, "reward": 0.1 * i} for i in range(1, 5)] + [{"step": 4, "eval_reward": 0.3}]
    figure = loss_figure(history, "Reward and loss of runs/first")
    check_picture(figure)
    above, below = figure.axes
    assert [line.get_ydata()[-1] for line in above.lines] == [0.4, 0.3]
    assert (above.get_ylabel(), below.get_ylabel()) == ("reward of an answer", "loss (nats for each trained token)")


def test_the_environment_names_versions():
    assert environment()["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__


def test_trained_tokens_are_told_apart(tokenizer):
    ids = tokenizer("the cat sat on the mat")["input_ids"]
    row = {"input_ids": ids, "labels": [-100, -100, *ids[2:4], -100, ids[5]]}
    shown = shown_sample(row, tokenizer, marks=True)
    assert shown.plain == "the cat【sat on】the【mat】\n\n3 of 6 tokens are trained"
    green = [shown.plain[span.start : span.end] for span in shown.spans if span.style == TRAINED]
    assert green == ["【sat on】", "【mat】"]
    assert isinstance(shown, Text)
    assert "【" not in shown_sample(row, tokenizer).plain


@pytest.mark.parametrize(
    ("name", "cls"),
    [("paged_adamw_8bit", PagedAdamW8bit), ("adamw_8bit", AdamW8bit), ("adamw_torch", torch.optim.AdamW)],
)
def test_optimizers_by_name(tmp_path, name, cls):
    args = TrainingArguments(str(tmp_path), optim=name, learning_rate=3e-4, adam_beta2=0.97, adam_epsilon=1e-7)
    chosen, options = choose_optimizer(args, None)
    assert chosen is cls
    assert (options["lr"], options["betas"], options["eps"]) == (3e-4, (0.9, 0.97), 1e-7)


def test_an_optimizer_whose_package_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer.importlib.util, "find_spec", lambda name: None)
    args = TrainingArguments(str(tmp_path), optim="paged_lion_8bit")
    with pytest.raises(ConfigError, match=r"paged_lion_8bit.*not installed.*paged_adamw_8bit"):
        choose_optimizer(args, None)
