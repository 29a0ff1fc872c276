"""The table and the figures of gradient runs, from numbers that are known."""

import math

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from topkbench import frontier
from topkbench.choices import available, conf_dir


def curves(**changes):
    """Two methods at three temperatures and `hard`, two replicates each."""
    rows = []
    for method, temperatures in (("a", (0.1, 1.0, 10.0)), ("b", (0.1, 1.0, 10.0)), ("hard", (math.nan,))):
        for t in temperatures:
            for replicate in (0, 1):
                size = 1.0 if math.isnan(t) else t / 10
                row = {"task": "gate", "at": 0.5, "method": method, "temperature": t, "replicate": replicate}
                row |= {"operator": "none" if method == "hard" else method, "estimator": "Relaxed"}
                row |= {"rel_bias2": size + 0.01 * replicate, "rel_variance": 0.1 / size, "rel_mse": 1.0}
                row |= {"softness": math.nan if method == "hard" else t / 20, "rho": 0.5 - 0.04 * size}
                row |= {"cos_mean": 0.9, "cos_sample": 0.5, "grad_zero_rows": 0.0, "true_error": 0.01}
                row |= {"grad_variance": 2.0, "grad_variance_method": 0.5, **changes}
                rows.append(row)
    return pd.DataFrame(rows)


def test_a_row_for_each_method_and_temperature():
    table = frontier.summarised(curves())
    assert len(table) == 7
    first = table.iloc[0]
    assert first["rel_bias2"] == pytest.approx(0.015)
    # half of a 95 % t interval of two values 0.01 apart: t_1 0.01 / sqrt(2) / sqrt(2)
    assert first["rel_bias2_half"] == pytest.approx(12.7062 * 0.005, rel=1e-4)
    assert first["method_share"] == 0.25


def test_one_replicate_has_the_interval_of_its_own_standard_error():
    one = curves(rel_bias2_se=0.1)
    table = frontier.summarised(one[one["replicate"] == 0])
    assert table["rel_bias2_half"].tolist() == pytest.approx([0.196] * 7, rel=1e-3)


@pytest.mark.parametrize(
    ("square", "half", "words"),
    [
        (0.25, 0.01, "0.500 ± 0.010"),
        (0.0004, 0.0012, "< 0.04"),
        (-0.01, 0.001, "< 0.032"),
        (1.0, 0.0, "1"),
        (math.nan, math.nan, "-"),
    ],
)
def test_a_bias_below_the_noise_is_shown_as_such(square, half, words):
    assert frontier.bias(square, half) == words


def test_methods_at_one_softness():
    table = frontier.matched(frontier.summarised(curves()), softness=0.05)
    assert table["method"].tolist() == ["a", "b"]
    assert table["temperature"].tolist() == ["1", "1"]
    assert frontier.matched(frontier.summarised(curves()), softness=0.9).empty
    assert frontier.matched(frontier.summarised(curves().drop(columns="softness")), softness=0.5).empty


@pytest.mark.parametrize("x", ["bias", "softness"])
def test_every_method_is_named_in_the_figure(x):
    figure = frontier.figure(frontier.summarised(curves()), x)
    names = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {"a", "b", "hard"} <= names
    (ax,) = figure.axes
    lines = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert len(lines) == 2
    if x == "bias":
        assert np.allclose(lines[0].get_xdata(), np.sqrt([0.015, 0.105, 1.005]), atol=0.2)


def test_softness_that_falls_again_is_met_where_it_rises():
    bent = curves()
    fall = {0.1: 0.1, 1.0: 0.5, 10.0: 0.2}
    bent["softness"] = bent["temperature"].map(fall)
    row = frontier.matched(frontier.summarised(bent), softness=0.3).iloc[0]
    assert 0.1 < float(row["temperature"]) < 1


def test_an_interval_is_of_the_replicates_that_have_a_value():
    assert frontier._half(pd.Series([1.0, 2.0, math.nan, math.nan]), None) == pytest.approx(6.353, rel=1e-3)


def test_where_there_is_no_gradient_nothing_is_drawn_and_nothing_fails():
    """k = n: the loss does not depend on W, and everything over the norm of the true gradient is 0 / 0."""
    nothing = {"rel_bias2": math.nan, "rel_variance": math.nan, "rho": math.nan}
    table = frontier.summarised(curves(**nothing))
    for x in ("bias", "softness"):
        figure = frontier.figure(table, x)
        figure.draw_without_rendering()
    assert set(frontier.readable(table)["bias"]) == {"-"}


def test_the_sweeps_of_the_frontier_are_of_every_method():
    """One of those with a temperature, one of those without."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        along, fixed = (
            compose("gradients", [f"+experiment={name}"], return_hydra_config=True).hydra.sweeper.params[
                "+method"
            ]
            for name in ("frontier", "frontier_fixed")
        )
    left_out = along[along.index("[") + 1 : along.index("]")].split(",")
    assert left_out == fixed.split(",")
    from conftest import built

    without = {name for name in available("method") if not hasattr(built("method", name), "temperature")}
    assert set(left_out) == without
