import functools
import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import built
from hydra import compose, initialize_config_dir

from topkbench.callbacks import plain
from topkbench.choices import GROUPS, ConfigError, available, conf_dir, unknown
from topkbench.config import Experiment, build, read
from topkbench.methods import Hard, Relaxed
from topkbench.operators import Operator, sparsemax


def composed(*overrides):
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return plain(compose("config", list(overrides)))


FILES = [(group, name) for group in GROUPS for name in available(group)]


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_in_conf_can_be_chosen_and_built(group, name):
    if group == "experiment":
        return  # a sweep: test_cli.py runs it
    others = ["task=gate", "k=1"] if group == "method" else ["+method=softmax"]
    experiment = read(composed(*others, f"{'+' * (group == 'method')}{group}={name}"))
    assert getattr(experiment, group) is not None


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_in_conf_says_what_it_is(group, name):
    comments = [
        line
        for line in (Path(conf_dir()) / group / f"{name}.yaml").read_text().splitlines()
        if line.startswith("# ") and not line.startswith("# @")
    ]
    assert comments, f"conf/{group}/{name}.yaml needs a comment in its first lines: --help shows it"


def test_the_defaults_of_the_library_are_those_of_the_command_line():
    experiment = read(composed("+method=hard"))
    assert experiment.train == type(experiment.train)()
    assert experiment.log == type(experiment.log)()


def test_both_ways_of_choosing_a_method_are_the_same():
    assert composed("+method=softmax") == composed("method=softmax")


def test_a_partial_is_an_operator_with_its_options():
    method = built("method", "sparsemax")
    assert isinstance(method, Relaxed)
    assert isinstance(method.operator, functools.partial)
    assert method.operator.func is sparsemax
    assert isinstance(sparsemax, Operator)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+typo=1",
            "unknown key 'typo'; did you mean dtype? allowed: at, d, device, dtype, k, log, method, n, ",
        ),
        ("+method.temprature=1", "unknown key 'method.temprature'; did you mean method.temperature?"),
        ("+method.operator.alhpa=1", "unknown key 'method.operator.alhpa'; allowed: none"),
        ("+method.operator.k=1", "unknown key 'method.operator.k'; allowed: none"),
        ("+train.stpes=1", "unknown key 'train.stpes'; did you mean train.steps?"),
        ("method.temperature=abc", "method.temperature must be a number, got 'abc'"),
        ("method.temperature=true", "method.temperature must be a number, got True"),
        ("method.temperature=null", "method.temperature must be a number, got None"),
        ("method.temperature=0", "method: temperature must be > 0 and finite, got 0"),
        ("method.temperature=inf", "method: temperature must be > 0 and finite, got inf"),
        ("method.temperature=[1,2]", "method.temperature must be a number, got [1, 2]"),
        ("~method.operator", "method.operator is missing"),
        ("method._target_=topkbench.methods.Relaxd", "did you mean topkbench.methods.Relaxed?"),
        ("method._target_=nowhere.Thing", "method._target_: nothing is called nowhere.Thing"),
        ("method._target_=3", "method: _target_ must name a class, got 3"),
        ("method.operator._target_=torch.softmax", "torch.softmax does not tell its arguments"),
        ("method.operator._target_=torch.nn.functional.softmax", "operator must be one of topkbench.operat"),
        ("method={_target_: topkbench.schedules.Constant}", "method: Constant lacks stochastic"),
        ("method.operator=3", "method.operator must be a group of settings, got 3"),
        ("seeds=1.5", "seeds must be a whole number, got 1.5"),
        ("seeds=0", "seeds must be >= 1, got 0"),
        ("seeds=true", "seeds must be a whole number, got True"),
        ("seed=-1", "seed must be >= 0, got -1"),
        ("n=abc", "n must be a whole number, got 'abc'"),
        ("task.k=65", "task: k must be in [1, n] = [1, 64], got 65"),
        ("task.k=0", "task: k must be in [1, n] = [1, 64], got 0"),
        ("device=cuda:7", "unknown device 'cuda:7'; "),
        ("device=gpu", "unknown device 'gpu'; "),
        ("dtype=float16", "dtype must be one of float32, float64, got 'float16'"),
        ("train.batch=0", "train: batch must be >= 1, got 0"),
        ("train.clip=-1", "train: clip must be > 0 and finite, or null for none, got -1"),
        ("train.clip=false", "train.clip must be a number or null, got False"),
        ("train=3", "train must be a group of settings, got 3"),
        ("log.points=1", "log: points must be >= 2, got 1"),
        ("optimizer.lr=0", "optimizer: lr must be > 0 and finite, got 0"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
        ("optimizer=3", "optimizer must be a group of settings, got 3"),
        ("optimizer._target_=topkbench.schedules.Constant", "unknown key 'optimizer.lr'; allowed: none"),
        ("schedule=3", "schedule must be a group of settings, got 3"),
        ("task.noise=-1", "task: noise must be >= 0 and finite, got -1"),
        ("results=3", "results must be text, got 3"),
    ],
)
def test_bad_input_gets_one_clear_line(override, message):
    key, _, value = override.lstrip("+~").partition("=")
    config = composed("+method=softmax")
    node, (*path, last) = config, key.split(".")
    for part in path:
        node = node[part]
    if override.startswith("~"):
        del node[last]
    else:
        node[last] = _value(value)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read(config)
    assert "\n" not in str(caught.value)


def _value(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(f"x={text}").value()


def test_every_key_of_the_root_is_a_field_and_every_field_a_key():
    assert set(composed("+method=hard")) == {field.name for field in fields(Experiment)}


def test_whole_numbers_may_stand_for_numbers():
    assert isinstance(built("task", "mask", noise=1).noise, float)
    assert isinstance(build({"_target_": "topkbench.methods.Hard"}, "method"), Hard)


def test_the_nearest_is_found_below_another_branch_too():
    assert "did you mean train.steps?" in unknown("steps", ["train.steps", "n"])
    assert unknown("x", []) == "unknown key 'x'; allowed: none"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+method=difftopk", "k=20"), "method.operator: keep must be at least k = 20, got 16"),
        (("+method=entmax15", "method.operator.alpha=3"), "alpha must be in (1, 2], got 3"),
        (("+method=softsort", "method.operator.power=3"), "method.operator.power must be one of 1, 2, got 3"),
        (
            ("+method=reinmax_k",),
            "ReinMaxK needs a task whose loss is a function of the mask",
        ),
        (("+method=perturbed", "method.samples=0"), "method: samples must be >= 1, got 0"),
        (("+method=imle", "method.strength=-1"), "method: strength must be > 0 and finite, got -1"),
    ],
)
def test_what_an_operator_or_estimator_cannot_do_is_refused_beforehand(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(composed(*overrides))
