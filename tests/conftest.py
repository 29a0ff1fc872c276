import pytest
import torch

from topkbench.choices import available, conf_dir
from topkbench.config import build, misfit


@pytest.fixture(autouse=True)
def _same_arithmetic_everywhere():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors of a test are too small to share out


def built(group: str, name: str, **changes):
    """A file of conf/, built as a run builds it; sizes small enough for a test."""
    from omegaconf import OmegaConf

    sizes = {"n": 6, "d": 5, "k": 2}
    node = OmegaConf.load(f"{conf_dir()}/{group}/{name}.yaml")
    config = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(sizes), {group: node}), resolve=True)
    return build({**config[group], **changes}, group)


METHODS = available("method")
TASKS = ("gate", "mask", "values")  # the founding ones: each regime that a method can meet
PAIRS = [
    (method, task)
    for method in METHODS
    for task in TASKS
    if misfit(built("method", method), built("task", task)) is None
]
OTHER_PAIRS = [
    (method, task)
    for task in sorted(set(available("task")) - set(TASKS))
    for method in METHODS
    if misfit(built("method", method), built("task", task)) is None
]
OPTIMIZERS = available("optimizer")
