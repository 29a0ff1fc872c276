"""Normalised scores: 0 is untrained, 1 the best method of a task, replicate by replicate."""

import numpy as np
import pandas as pd
import pytest

from topkbench import scores

STARTS = {"gate": [8.0, 4.0, 6.0, 10.0], "mask": [1.0, 2.0, 1.0, 2.0]}


def records(ends):
    """Curves and summaries from `{(task, method): share of the start that is left}`; None for diverged."""
    curves, summary = [], []
    for (task, method), left in ends.items():
        for r, start in enumerate(STARTS[task]):
            row = {"task": task, "method": method, "seed": 7 + r}
            curves.append({**row, "step": 0, "hard_loss": start})
            status = "diverged" if left is None else "done"
            loss = np.nan if left is None else start * left
            summary.append({**row, "status": status, "hard_loss": loss, "relaxed_loss": loss})
    return pd.DataFrame(curves), pd.DataFrame(summary)


ENDS = {
    ("gate", "hard"): 1.0,
    ("gate", "ste"): 0.2,
    ("gate", "entropic"): 0.6,
    ("mask", "hard"): 0.75,
    ("mask", "ste"): None,
    ("mask", "entropic"): 0.5,
    ("mask", "wild"): 9.0,
}


def test_scores_compare_with_the_best_of_each_task():
    table = scores.scores(*records(ENDS))
    found = {(row["task"], row["method"]): row["score"] for row in table.to_dict("records")}
    expected = {("gate", "hard"): 0, ("gate", "ste"): 1, ("gate", "entropic"): 0.5, ("mask", "hard"): 0.5}
    expected |= {("mask", "entropic"): 1, ("mask", "wild"): -16, ("mask", "ste"): -np.inf}
    assert found == pytest.approx(expected)


def test_replicates_are_compared_with_themselves():
    """Starts differ by a factor; shares do not, so that the interval has no width."""
    table = scores.scores(*records(ENDS)).set_index(["task", "method"])
    row = table.loc[("gate", "entropic")]
    assert row["score_low"] == pytest.approx(0.5)
    assert row["score_high"] == pytest.approx(0.5)


def test_the_matrix_is_ordered_by_bounded_means_and_has_gaps():
    table = scores.scores(*records(ENDS))
    wide = scores.matrix(table)
    assert wide.index.tolist() == ["entropic", "hard", "ste", "wild"]
    assert np.isnan(wide.loc["wild", "gate"])
    strings = scores.readable(table).set_index("method")
    assert strings["mean"].to_dict() == {"entropic": "0.75", "hard": "0.25", "ste": "0.00", "wild": "-1.00"}
    assert strings["tasks"].to_dict() == {"entropic": 2, "hard": 2, "ste": 2, "wild": 1}
    assert scores.matrix(scores.scores(*records({**ENDS, ("gate", "one"): 0.0}))).index[-2] == "one"
    assert strings.loc["wild", "gate"] == ""


def test_one_diverged_replicate_of_the_best_blanks_nothing():
    curves, summary = records(ENDS)
    gone = (summary["task"] == "gate") & (summary["method"] == "ste") & (summary["seed"] == 8)
    summary.loc[gone, ["status", "hard_loss", "relaxed_loss"]] = ["diverged", np.nan, np.nan]
    table = scores.scores(curves, summary).set_index(["task", "method"])["score"]
    assert table["gate", "ste"] == 1
    assert 0.4 < table["gate", "entropic"] < 0.6


def test_the_oracle_is_not_what_others_are_measured_by():
    table = scores.scores(*records({**ENDS, ("gate", "oracle"): 0.0})).set_index(["task", "method"])["score"]
    assert table["gate", "oracle"] == pytest.approx(1.25)
    assert table["gate", "ste"] == 1


def test_a_task_that_nobody_learns_has_no_score():
    table = scores.scores(*records({("gate", "hard"): 1.0, ("gate", "ste"): 1.5}))
    assert table["score"].isna().all()


def test_the_heat_map_shows_every_method_and_task():
    figure = scores.heat_map(scores.scores(*records(ENDS)))
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["entropic", "hard", "ste", "wild"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["gate", "mask"]
    assert len([text for text in ax.texts if text.get_text()]) == 7
