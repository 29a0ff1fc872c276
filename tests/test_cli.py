"""The command line as a person types it, in a folder of its own, in a process of its own."""

import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import METHODS, TASKS

SMALL = ["n=6", "d=5", "k=2", "seeds=3", "train.steps=6", "train.batch=4"]
SMALL += ["log.points=3", "log.samples=2", "log.test_rows=8"]
MODULE = [sys.executable, "-m", "topkbench"]


def typed(folder, *arguments, program=MODULE, **options):
    return subprocess.run(
        [*program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def test_one_run_leaves_a_record_a_table_and_figures(tmp_path):
    done = typed(tmp_path, "+method=hard", *SMALL)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results" / "runs").iterdir()
    assert record.name.startswith("values-hard-")
    names = {path.name for path in record.iterdir()}
    assert {"config.yaml", "environment.json", "curves.csv", "summary.csv", "table.tex"} <= names
    assert {"convergence.pdf", "convergence.png", "gradient_variance.pdf", "final_loss.png"} <= names
    assert "log10 hard loss" in done.stdout
    assert str(record.relative_to(tmp_path)) in done.stdout
    assert "values-hard: 100%" in done.stderr
    assert not any(name.startswith(".") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_the_console_script_is_the_same(tmp_path):
    code = "import sys; sys.argv[0] = 'topkbench'; from topkbench.cli import main; main()"
    done = typed(tmp_path, "method=hard", *SMALL, program=[sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("environment.json")
    assert '"command": "topkbench method=hard' in file.read_text()


GRADIENTS = [
    "n=4",
    "d=3",
    "k=2",
    "seeds=2",
    "train.batch=4",
    "log.samples=4",
    "log.truth=1",
    "log.test_rows=8",
]


def test_gradients_at_fixed_w_beside_the_true_one(tmp_path):
    program = [sys.executable, "-m", "topkbench.gradients"]
    done = typed(
        tmp_path, "-m", "+method=hard,oracle,softmax", "task=gate", *GRADIENTS, "at=[0,0.9]", program=program
    )
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "results" / "runs").iterdir()
    assert {"frontier.pdf", "softness.png", "gradients.md", "gradients.tex"} <= {
        f.name for f in sweep.iterdir()
    }
    table = pd.read_csv(sweep / "gradients.csv")
    assert table["method"].tolist() == [name for name in ("hard", "oracle", "softmax") for _ in range(2)]
    assert table["at"].tolist() == [0, 0.9] * 3
    hard = table[(table["method"] == "hard") & (table["at"] == 0)].iloc[0]
    assert hard["bias"] == "1"
    curves = pd.read_csv(next(sweep.glob("gate-softmax-*")) / "curves.csv")
    assert curves["at"].tolist() == [0, 0, 0.9, 0.9]
    assert {"rho", "rho_se", "softness", "hard_loss"} <= set(curves)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+method=sofmax", "task=gate"], "unknown method 'sofmax'; did you mean softmax?"),
        (["+method=hard", "at_=[0]"], "unknown key 'at_'; did you mean at?"),
    ],
)
def test_what_is_mistyped_there_is_named_too(tmp_path, words, said):
    done = typed(tmp_path, *words, program=[sys.executable, "-m", "topkbench.gradients"])
    assert done.returncode == 1
    assert done.stderr.startswith(f"topkbench: {said} allowed: ")
    assert done.stderr.count("\n") == 1


def test_training_may_look_at_the_true_gradient(tmp_path):
    small = [word for word in GRADIENTS if not word.startswith("train")]
    done = typed(tmp_path, "+method=entropic", "task=gate", *small, "train.steps=3", "log.points=2")
    assert done.returncode == 0, done.stderr
    curves = pd.read_csv(next(tmp_path.rglob("curves.csv")))
    assert curves["rel_bias2"].notna().all()


def test_a_sweep_ends_with_one_comparison(tmp_path):
    done = typed(tmp_path, "-m", "+method=hard,ste", "task=values,gate", *SMALL)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "results" / "runs").iterdir()
    table = pd.read_csv(sweep / "table.csv")
    assert table[["task", "method"]].to_numpy().tolist() == [
        ["gate", "hard"],
        ["gate", "ste"],
        ["values", "hard"],
        ["values", "ste"],
    ]
    assert (sweep / "convergence.png").is_file()
    assert done.stdout.count("log10 hard loss  ") == 1


def test_the_founding_experiment_is_nine_methods_on_every_task(tmp_path):
    done = typed(tmp_path, "+experiment=founding", *SMALL, "seeds=2", "log.samples=0")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("table.csv")
    pairs = pd.read_csv(file)[["task", "method"]].apply(tuple, axis=1)
    assert len(pairs) == len(set(pairs)) == 9 * len(TASKS)


def test_a_pair_that_does_not_go_together_is_left_out_of_a_sweep_and_refused_alone(tmp_path):
    done = typed(tmp_path, "-m", "+method=hard,l2x", *SMALL, "seeds=2", "log.samples=0")
    reason = "L2X needs a task whose loss is a function of the mask; that of Values is one of the values"
    assert done.returncode == 0
    assert f"topkbench: values-l2x is left out: {reason}" in done.stderr
    (file,) = tmp_path.rglob("table.csv")
    assert pd.read_csv(file)["method"].tolist() == ["hard"]
    alone = typed(tmp_path, "+method=l2x", *SMALL)
    assert (alone.returncode, alone.stderr) == (1, f"topkbench: {reason}\n")


def test_a_failed_job_does_not_take_the_others_along(tmp_path):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "broken.yaml").write_text("# fails\n_target_: broken.Broken\n")
    lines = ["class Broken:", "    stochastic = False", "    def __call__(self, step):"]
    (tmp_path / "broken.py").write_text("\n".join([*lines, "        raise RuntimeError('no way')", ""]))
    done = typed(tmp_path, "--config-dir", "conf", "-m", "+method=hard,broken,ste", *SMALL)
    assert done.returncode == 1
    (sweep,) = (tmp_path / "results" / "runs").iterdir()
    assert set(pd.read_csv(sweep / "table.csv")["method"]) == {"hard", "ste"}
    (failed,) = sweep.glob("failed-*.txt")
    assert "RuntimeError: no way" in failed.read_text()
    assert "values-broken failed: no way" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("sweep", [False, True])
def test_stopping_leaves_what_was_logged(tmp_path, stop, sweep):
    command = [*MODULE, *(["-m"] if sweep else []), "+method=hard" + (",ste" if sweep else ""), *SMALL]
    command += ["train.steps=1000000", "log.points=10001", "log.samples=0"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in iter(lambda: process.stderr.read(40), ""):
            if "step/s" in line:
                break
        time.sleep(1)
        process.send_signal(stop)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (summary,) = tmp_path.rglob("summary.csv")
    assert pd.read_csv(summary)["status"].unique() == ["interrupted"]
    assert len(pd.read_csv(summary.with_name("curves.csv"))) >= 3
    assert "interrupted at" in printed
    assert "Traceback" not in errors


ALL = ", ".join(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"choose a method: +method=NAME with NAME one of {ALL}"),
        (["+method=hrad"], f"unknown method 'hrad'; did you mean hard? allowed: {ALL}"),
        (
            ["+method=hard", "task=gaet"],
            "unknown task 'gaet'; did you mean gate? allowed: ",
        ),
        (["+method=hard", "nn=3"], "unknown key 'nn'; did you mean n? allowed: at, d, device, "),
        (["+method=hard", "+typo=1"], "unknown key 'typo'; did you mean dtype? allowed: at, d, device, "),
        (
            ["+method=hard", "trian.steps=5"],
            "unknown key 'trian.steps'; did you mean train.steps? allowed: at, ",
        ),
        (
            ["+method=hard", "hydra.run.dir=/proc/here"],
            "hydra.run.dir: cannot write to /proc/here: /proc is not writable",
        ),
        (["+method=hard", "log.truth=0"], "log: truth must be > 0 and finite, or null for none, got 0"),
        (["+method=hard", "at=[0,2]"], "at must hold numbers in [0, 1], got 2"),
        (
            ["+method=hard", "at=[0]", "log.samples=0"],
            "at is for gradient statistics: log.samples must be >= 2, got 0",
        ),
        (
            ["+method=hard", "task=gate", "at=[0,1]", "log.truth=0.1"],
            "at: at 1, W*, the mean loss has a kink: places must be < 1, or log.truth=null",
        ),
        (["+method=hard", "at=[0]", "log.samples=1"], "log: samples must be >= 2, or 0 for none, got 1"),
        (
            ["+method=gapped_ste", "task=gate"],
            "GappedStraightThrough draws one of n: k must be 1, got k=8 of n=64",
        ),
        (["+method=ste", "method.temprature=1"], "unknown key 'method.temprature'; did you mean method.temp"),
        (["+method=ste", "method.temperature=0"], "method: temperature must be > 0 and finite, got 0"),
        (["+method=ste", "method.temperature=x"], "method.temperature must be a number, got 'x'"),
        (["+method=hard", "k=0"], "task: k must be in [1, n] = [1, 64], got 0"),
        (["+method=hard", "k=65"], "task: k must be in [1, n] = [1, 64], got 65"),
        (["+method=hard", "seeds=0"], "seeds must be >= 1, got 0"),
        (["+method=hard", "device=cuda:9"], "unknown device 'cuda:9'; "),
        (
            ["+method=hard", "results=/proc/here"],
            "results: cannot write to /proc/here: /proc is not writable",
        ),
        (["+method=hard,ste"], "+method=hard,ste: several values are a sweep: put -m before the settings"),
        (["+method=[hard,ste]"], "one method a run; several are a sweep: -m +method=hard,softmax"),
        (["+method=hard", "method=ste"], "method is given twice"),
        (["hard"], "cannot read 'hard': a setting is typed as name=value"),
        (["+method=hard", "k=["], "cannot read 'k=['"),
        (["-m", "+method=hard,hrad"], "unknown method 'hrad'; did you mean hard? "),
        (["-m", "+method=hard", "k=3,99"], "k must be in [1, n] = [1, 64], got 99 (in +method=hard k=99)"),
        (
            ["-m", "+method=hard,ste", "method.temperature=1"],
            "unknown key 'method.temperature'; allowed: none",
        ),
        (["-m", "+method=glob(x*)"], "nothing to run: a glob in +method=glob(x*) matches no file"),
        (["-m", "+method=hard", "results=/proc/here"], "results: cannot write to /proc/here/sweep-"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_typed_wrong_gets_one_line_and_leaves_nothing(tmp_path, arguments, message):
    done = typed(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("topkbench: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_fails_on_the_way_gets_its_line_too(tmp_path):
    done = typed(tmp_path, "+method=sinkhorn", "task=gate", "n=3000", "d=2", "log.test_rows=1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("topkbench: ValueError: 41 matrices n x n of scores ")
    assert "Error executing" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_is_there_for_those_who_ask(tmp_path):
    import os

    done = typed(tmp_path, "+method=hrad", env={**os.environ, "HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_help_lists_every_choice_with_a_line(tmp_path):
    lines = typed(tmp_path, "--help").stdout.splitlines()
    for name in (*METHODS, *TASKS):
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name


def test_the_configuration_can_be_printed(tmp_path):
    done = typed(tmp_path, "+method=softmax", "--cfg", "job")
    assert done.returncode == 0
    assert "_target_: topkbench.operators.softmax" in done.stdout
    assert "seeds: 32" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_paper_figure_comes_from_records_alone(tmp_path):
    from pathlib import Path

    script = [
        sys.executable,
        str(Path(__file__).parent.parent / "experiments" / "convergence_and_variance.py"),
    ]
    none = typed(tmp_path, "nowhere", program=script)
    assert none.returncode == 1
    assert "python -m topkbench +experiment=founding hydra.sweep.dir=nowhere" in none.stderr
    assert typed(tmp_path, "-m", "+method=hard,ste", *SMALL, "hydra.sweep.dir=here").returncode == 0
    done = typed(tmp_path, "here", "out", program=script)
    assert done.returncode == 0, done.stderr
    endings = {"csv", "json", "md", "pdf", "png", "tex"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"convergence_and_variance.{ending}" for ending in endings
    }
