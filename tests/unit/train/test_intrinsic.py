"""The curve of scores over dimensions, on a task that a tiny model learns."""

import pytest
import torch

from pictures import check_picture, ticks_of
from veneer.errors import ConfigError, TrainingError
from veneer.plain.ticks import short
from veneer.train.intrinsic import Curve, PointTraining, curve_figure, dimension_curve, draw_curve

PROMPTS = torch.tensor([[7, 9], [11, 13], [17, 19], [23, 29]])
ANSWERS = torch.tensor([31, 37, 31, 37])


def batches():
    ids = torch.cat([PROMPTS, ANSWERS[:, None]], dim=1)
    labels = torch.where(torch.arange(3) < 2, -100, ids)
    return [{"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}]


@torch.no_grad()
def right(model):
    return float((model(PROMPTS).logits[:, -1].argmax(-1) == ANSWERS).float().mean())


def test_more_dimensions_learn_what_one_cannot_and_the_model_stays(make_model):
    model = make_model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = []
    training = PointTraining(steps=25, learning_rate=0.02, seed=1)
    curve = dimension_curve(model, batches(), right, [200, 1], training, on_point=lambda d, s: told.append((d, s)))
    assert curve.full == 1.0
    assert curve.scores[200] == 1.0
    assert curve.scores[1] < 0.9
    assert curve.d90 == 200
    assert curve.before < 0.9
    assert told == [(1, curve.scores[1]), (200, 1.0), (None, 1.0)]
    assert curve.n_weights == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training


def test_structure_aware_subspaces_train(make_model):
    training = PointTraining(steps=25, learning_rate=0.02, structure_aware=True)
    assert dimension_curve(make_model(), batches(), right, [200], training).scores[200] == 1.0


def test_d90_is_the_smallest_that_reaches_nine_tenths_of_full(tmp_path):
    assert Curve({10: 0.7, 30: 0.73, 100: 0.71}, 0.5, 0.8, 999).d90 == 30
    curve = Curve({10: 0.5, 30: 0.6}, 0.5, 0.8, 999)
    assert curve.d90 is None
    draw_curve(curve, tmp_path / "curve.png")
    assert "no d reaches it" in curve_figure(curve).axes[0].get_title()
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("dims", [[7], [10, 30, 100, 103, 1000, 50_000], list(range(100, 1000, 37))])
def test_the_picture_has_a_tick_for_every_dimension_and_keeps_its_frame(dims):
    figure = curve_figure(Curve({d: 0.5 + 0.4 * i / len(dims) for i, d in enumerate(dims)}, 0.5, 0.97, 134_515_008))
    check_picture(figure)
    axes = figure.axes[0]
    assert ticks_of(axes) == dims
    assert axes.get_xticklabels()[-1].get_text() == short(dims[-1])


def test_what_cannot_be_trained_is_told(make_model):
    with pytest.raises(ConfigError, match="must be above zero"):
        PointTraining(steps=0)
    model = make_model().train()
    model.base_model.eval()
    with pytest.raises(TrainingError, match="choose a lower learning rate"):
        dimension_curve(model, batches(), right, [50], PointTraining(steps=30, learning_rate=1e30))
    assert (model.training, model.base_model.training) == (True, False)
