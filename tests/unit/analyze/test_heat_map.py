"""The picture of norms: a panel for each adapter, a column for each layer, nothing cut off."""

from __future__ import annotations

import numpy as np
import pytest

from pictures import check_picture, ticks_of
from veneer.analyze.heat_map import norms_figure
from veneer.analyze.report import LayerReport


def line(layer: int | None, module: str, norm: float) -> LayerReport:
    return LayerReport(f"{layer}.{module}", layer, module, norm, 1.0, 3, 1.0)


@pytest.mark.parametrize("n_layers", [1, 2, 30, 81])
@pytest.mark.parametrize("n_adapters", [1, 2])
def test_every_layer_has_a_tick_and_nothing_is_cut_off(n_layers: int, n_adapters: int) -> None:
    modules = ["self_attn.q_proj", "mlp.experts.gate_up_proj_of_a_long_name"][: 1 + n_layers % 2]
    lines = [line(i, module, 1.5 + i) for i in range(n_layers) for module in modules]
    figure = norms_figure({f"{'runs/' * 30}{i}/adapter": lines for i in range(n_adapters)})
    check_picture(figure)
    assert len(figure.axes) == n_adapters + 1  # the bar of colours
    for i, axes in enumerate(figure.axes[:-1]):
        assert ticks_of(axes) == list(range(n_layers))
        assert axes.get_title().endswith(f"/{i}/adapter")


def test_two_adapters_share_colours_and_rows() -> None:
    first = [line(0, "q", 1.0), line(1, "q", 2.0), line(None, "lm_head", 3.0)]
    second = [line(1, "v", 7.0)]
    figure = norms_figure({"a": first, "b": second})
    one, two = (axes.images[0] for axes in figure.axes[:2])
    assert one.get_clim() == two.get_clim() == (0, 7.0)
    nan = np.nan
    np.testing.assert_equal(one.get_array().filled(nan), [[nan, 1, 2], [3, nan, nan], [nan, nan, nan]])
    np.testing.assert_equal(two.get_array().filled(nan), [[nan, nan, nan], [nan, nan, nan], [nan, nan, 7]])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["–", "0", "1"]
