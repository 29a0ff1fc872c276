import json
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image
from synthetic import FALLING, FLAT, save

from topkbench import plots, records
from topkbench.report import report


@pytest.fixture
def runs(tmp_path):
    for task in ("values", "gate"):
        save(tmp_path, FALLING, task=task)
        save(tmp_path, FALLING, "ste_softmax", task=task)
        save(tmp_path, FLAT, "hard", task=task, variance=0.0)
        save(tmp_path, FLAT, "hard_selection", task=task, variance=0.0)
    return records.find(tmp_path)


@pytest.fixture
def curves(runs):
    return records.together(runs, "curves")


def labels(ax):
    return [text.get_text() for text in ax.texts]


def test_curves_are_the_interquartile_means(curves):
    figure = plots.convergence(curves)
    ax = figure.axes[0]
    lines = {tuple(np.round(line.get_ydata(), 6)) for line in ax.lines}
    # Of four the outer two are cut.
    expected = [10 ** np.log10(row[1:3]).mean() for row in np.array(FALLING)]
    assert tuple(np.round(expected, 6)) in lines
    assert ax.get_yscale() == "log"
    assert [axis.get_title() for axis in figure.axes[:2]] == ["gate", "values"]


def test_names_stand_beside_the_curves_and_twins_share_one(curves):
    ax = plots.convergence(curves).axes[0]
    assert sorted(labels(ax)) == ["hard = hard_selection", "softmax = ste_softmax"]
    assert ax.get_legend() is None


def test_names_do_not_overlap(tmp_path):
    for i in range(8):
        save(tmp_path, [[4.0, 4.1, 4.2, 4.3]] * 2 + [[1 + 0.03 * i] * 4], temperature=0.1 + i)
    figure = plots.convergence(records.together(records.find(tmp_path), "curves"))
    figure.draw_without_rendering()
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_variance_of_zero_is_written_out(curves):
    ax = plots.gradient_variance(curves).axes[0]
    assert ax.get_xlabel() == "step\nexactly 0: hard, hard_selection"
    assert labels(ax) == ["softmax = ste_softmax"]


def test_a_variance_that_was_not_measured_is_said_to_be(curves):
    ax = plots.gradient_variance(curves.drop(columns="grad_variance")).axes[0]
    assert labels(ax) == ["not measured (log.samples=0)"]


def test_colour_tells_the_relaxation_and_dashes_its_use(curves):
    looks = plots.looks_of(curves)
    assert looks["softmax"]["color"] == looks["ste_softmax"]["color"]
    assert looks["softmax"]["linestyle"] != looks["ste_softmax"]["linestyle"]
    assert looks["hard"]["color"] == (0, 0, 0)


def test_final_losses_are_sorted_with_the_best_on_top(runs):
    ax = plots.final_loss(records.together(runs, "summary")).axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert set(names[:2]) == {"hard", "hard_selection"}


def test_files_are_vector_and_pixels_and_know_where_they_come_from(curves, tmp_path):
    told = {"commands": ["python -m topkbench +method=hard"]}
    pdf, png = plots.save(plots.convergence(curves), tmp_path / "out", "figure", told)
    assert json.loads(Image.open(png).text["topkbench"]) == told
    content = pdf.read_bytes()
    assert b"/Subject" in content
    assert b"/Type3" not in content
    again = plots.save(plots.convergence(curves), tmp_path / "again", "figure", told)[0]
    assert again.read_bytes() == content


@pytest.mark.parametrize(("tasks", "width"), [(["gate"], plots.COLUMN), (["gate", "values"], plots.PAGE)])
def test_widths_are_those_of_a_paper(curves, tasks, width):
    figure = plots.convergence(curves[curves["task"].isin(tasks)])
    assert figure.get_figwidth() == width
    sizes = [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert min(sizes) >= 6


def test_drawing_changes_no_setting_of_the_callers(curves):
    before = dict(matplotlib.rcParams)
    plots.convergence(curves)
    assert dict(matplotlib.rcParams) == before


def test_a_diverged_majority_is_drawn_as_far_as_it_goes(tmp_path):
    save(tmp_path, FALLING, diverged_at=[5, 5, 5, 5])
    curves = records.together(records.find(tmp_path), "curves")
    (line,) = plots.convergence(curves).axes[0].lines
    assert list(line.get_xdata()) == [0]


def test_the_report_writes_all_of_it_and_says_where(runs, tmp_path):
    text = report(tmp_path / "out", runs)
    stems = ("convergence", "gradient_variance", "final_loss", "scores", "table")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{stem}.{end}" for stem in stems[:4] for end in ("pdf", "png")} | {
        f"{stem}.{end}" for stem in stems[3:] for end in ("csv", "md", "tex")
    }
    assert all(stem in text for stem in stems)


SPY = """
import sys
import topkbench.train
trained = topkbench.train.train
def spy(*arguments, **options):
    result = trained(*arguments, **options)
    print([name for name in ("seaborn", "matplotlib", "pandas") if name in sys.modules], file=sys.stderr)
    return result
topkbench.train.train = spy
from topkbench.cli import main
sys.argv = ["topkbench", "+method=hard", "n=6", "d=5", "k=2", "seeds=2", "train.steps=2", "log.test_rows=8"]
main()
"""


def test_seaborn_is_not_there_before_training_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SPY], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "[]" in done.stderr.splitlines()
