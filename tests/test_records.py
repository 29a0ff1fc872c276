import contextlib
import json
import os

import numpy as np
import pytest
import synthetic
from synthetic import FALLING, FLAT, save

from topkbench import records
from topkbench.environment import command_line, commit, environment
from topkbench.gradients import Sampling, measure_at
from topkbench.methods import Relaxed
from topkbench.operators import entropic
from topkbench.randomness import Normals
from topkbench.tasks import Gate
from topkbench.writable import check_writable


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = save(tmp_path, FALLING)
    assert sorted(file.name for file in path.iterdir()) == [
        "config.yaml",
        "curves.csv",
        "environment.json",
        "summary.csv",
    ]
    run = records.load(path)
    assert run.config == synthetic.config()
    assert run.curves.groupby("step")["hard_loss"].apply(list).to_list() == FALLING
    assert run.summary["hard_loss"].to_list() == FALLING[-1]
    assert run.summary["status"].unique() == ["done"]
    assert run.summary[["task", "method", "operator", "estimator"]].iloc[0].to_list() == [
        "values",
        "softmax",
        "softmax",
        "Relaxed",
    ]


def test_every_column_is_documented_and_every_documented_one_is_there(tmp_path):
    run = records.load(save(tmp_path, FALLING))
    documented = {**records.COLUMNS, **records.LOADED}
    points = []
    measure_at(Relaxed(entropic), Gate(4, 3, 2), Normals([0, 1]), [0.5], Sampling(2, 4), points, error=1.0)
    measured = {name.removesuffix("_se") for name in points[0][2]}
    assert set(run.curves) | set(run.summary) | measured == set(documented)


def test_a_record_is_never_written_over(tmp_path):
    first, second, third = (save(tmp_path, losses) for losses in (FALLING, FLAT, FLAT))
    assert second.name == f"{first.name}-2"
    assert third.name == f"{first.name}-3"
    assert records.load(first).summary["hard_loss"].to_list() == FALLING[-1]


def test_of_equal_configurations_the_newest_counts(tmp_path):
    save(tmp_path, FALLING, started="2026-01-02T00:00:00")
    save(tmp_path, FLAT, started="2026-01-01T00:00:00")
    (run,) = records.find(tmp_path)
    assert run.summary["hard_loss"].to_list() == FALLING[-1]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def broken(_):
        raise OSError("disk full")

    monkeypatch.setattr(records, "summary", broken)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, FALLING)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("before")
    with contextlib.suppress(RuntimeError), records.replacing(file) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert file.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["table.csv"]


def test_a_diverged_replicate_is_marked_and_the_others_are_not(tmp_path):
    run = records.load(save(tmp_path, FALLING, diverged_at=[-1, 13, -1, 0]))
    assert run.summary["status"].to_list() == ["done", "diverged", "done", "diverged"]
    assert run.summary["step"].to_list() == [20, 13, 20, 0]
    assert run.curves.pivot(index="step", columns="replicate", values="diverged").to_numpy().tolist() == [
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [0, 1, 0, 1],
    ]


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    run = records.load(save(tmp_path, FALLING[:2], interrupted=True))
    assert run.summary["status"].unique() == ["interrupted"]
    assert run.summary["step"].unique() == [10]


def test_a_finished_record_counts_before_a_later_interrupted_one(tmp_path):
    save(tmp_path, FALLING, started="2026-01-01T00:00:00")
    save(tmp_path, FALLING[:2], started="2026-01-02T00:00:00", interrupted=True)
    (run,) = records.find(tmp_path)
    assert run.summary["step"].max() == 20


def test_methods_with_equal_settings_are_still_two(tmp_path):
    for name in ("softmax", "mine"):
        environment = {"task": "values", "method": name, "status": "done", "started": "1"}
        records.save(tmp_path, name, synthetic.config(), environment, synthetic.result(FALLING))
    assert [run.environment["method"] for run in records.find(tmp_path)] == ["mine", "softmax"]


def test_runs_are_told_apart_by_what_was_set(tmp_path):
    for n in (6, 8):
        config = synthetic.config(n=n)
        config["task"] = {**config["task"], "n": n}
        environment = {"task": "values", "method": "softmax", "status": "done", "started": "1"}
        records.save(tmp_path, "x", config, environment, synthetic.result(FALLING))
    names = records.together(records.find(tmp_path), "summary")["method"].unique().tolist()
    assert sorted(names) == ["softmax n=6", "softmax n=8"]


def test_the_id_is_of_the_settings_and_not_of_the_place():
    assert records.identity(synthetic.config(results="a")) == records.identity(synthetic.config(results="b"))
    assert records.identity(synthetic.config()) != records.identity(synthetic.config(temperature=1.0))


def test_methods_that_stand_there_twice_are_told_apart(tmp_path):
    for temperature in (0.1, 1.0):
        save(tmp_path, FALLING, temperature=temperature)
    save(tmp_path, FLAT, "hard")
    names = records.together(records.find(tmp_path), "summary")["method"].unique().tolist()
    assert names == ["hard", "softmax temperature=0.1", "softmax temperature=1.0"]


def test_numbers_keep_all_their_digits(tmp_path):
    losses = [[np.pi, np.e, 1 / 3, 1e-17]] * 3
    assert records.load(save(tmp_path, losses)).summary["hard_loss"].to_list() == losses[0]


def test_the_environment_is_enough_to_run_it_again_and_names_nobody(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/topkbench/__main__.py", "+method=hard", "n=6"])
    told = environment("cpu")
    assert told["command"] == command_line() == "python -m topkbench +method=hard n=6"
    assert {"commit", "python", "packages", "device", "threads"} <= set(told)
    assert os.getcwd() not in json.dumps(told)
    assert commit() is None or len(commit().rstrip("+")) == 40


def test_a_folder_that_cannot_be_written_to_is_refused_and_not_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"results: cannot write to .*: .*file is a file, not a folder"):
        check_writable(file / "below")
    with pytest.raises(OSError, match=r"results: cannot write to /proc/x: /proc is not writable"):
        check_writable(records.Path("/proc/x"))
    check_writable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
