import pandas as pd
import pytest
import synthetic
from synthetic import FALLING, FLAT, save

from topkbench import records, tables
from topkbench.stats import iqm_interval


@pytest.fixture
def table(tmp_path):
    save(tmp_path, FALLING)
    save(tmp_path, FLAT, "hard")
    save(tmp_path, FALLING, "ste", diverged_at=[-1, -1, 5, -1])
    return tables.comparison(records.together(records.find(tmp_path), "summary"))


def test_the_comparison_holds_intervals_of_the_summaries(table):
    row = table[table["method"] == "softmax"].iloc[0]
    expected = iqm_interval(synthetic.torch.tensor(FALLING[-1]).log10())
    assert row["log10_hard_loss"] == pytest.approx(expected.centre)
    assert row["log10_hard_loss_low"] == pytest.approx(expected.low)
    assert row["hard_loss"] == pytest.approx(0.13)
    assert (row["replicates"], row["diverged"], row["steps"]) == (4, 0, 20)


def test_a_diverged_replicate_counts_as_the_worst(table):
    row = table[table["method"] == "ste"].iloc[0]
    assert row["diverged"] == 1
    assert row["hard_loss"] == float("inf")
    assert -1 < row["log10_hard_loss"] < -0.8  # of 0.12 and 0.16: 0.1 is cut, and so is the diverged one


def test_the_best_and_what_cannot_be_told_from_it_are_bold():
    frame = pd.DataFrame(
        {
            "task": ["a", "a", "a", "b"],
            "log10_hard_loss": [-1.0, -0.9, 0.0, float("nan")],
            "log10_hard_loss_low": [-1.2, -1.1, -0.1, float("nan")],
            "log10_hard_loss_high": [-0.8, -0.7, 0.1, float("nan")],
        }
    )
    assert tables.best(frame[frame["task"] == "a"]).to_list() == [True, True, False]


@pytest.mark.parametrize(
    ("centre", "half", "text"),
    [
        (0.03881, 0.0021, "0.0388 ± 0.0021"),
        (14.43, 0.31, "14.43 ± 0.31"),
        (1234.0, 56.0, "1234 ± 56"),
        (-1.414, 0.05, "-1.414 ± 0.050"),
        (3e-9, 2e-10, "3.00e-09 ± 2.0e-10"),
        (1.0, 0.0, "1"),
        (0.123456, float("nan"), "0.123"),
        (float("nan"), float("nan"), "-"),
        (float("inf"), float("nan"), "inf"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(centre, half, text):
    assert tables.plus_minus(centre, half) == text


def test_the_terminal_is_110_columns_wide(table):
    assert max(map(len, tables.text(table[table["diverged"] == 0]).splitlines())) <= 110
    assert "1 of 4 diverged" in tables.text(table)


def test_one_run_is_written_downwards(table):
    lines = tables.text(table.iloc[:1]).splitlines()
    assert lines[0].split() == ["task", "values"]
    assert len(lines) > 6


def test_all_three_files_say_the_same(table, tmp_path):
    csv, md, tex = tables.write(table, tmp_path / "out", "table", "Made up.")
    read = pd.read_csv(csv)
    assert read["log10_hard_loss"].to_list() == pytest.approx(table["log10_hard_loss"].to_list())
    assert len(md.read_text().splitlines()) == 4 + len(table) + 2
    assert "**softmax**" in md.read_text()
    text = tex.read_text()
    assert r"\textbf{softmax}" in text
    assert r"\toprule" in text
    assert text.count(r"\\") == len(table) + 1
    assert "%" not in text.replace(r"\%", "").replace("% needs", "")


def test_underscores_do_not_break_latex(tmp_path):
    save(tmp_path, FALLING, "ste_softmax")
    table = tables.comparison(records.together(records.find(tmp_path), "summary"))
    text = tables.write(table, tmp_path, "t", "A_b.")[2].read_text()
    assert r"ste\_softmax" in text
    assert "_" not in text.replace(r"\_", "").replace(r"\log_{10}", "")
