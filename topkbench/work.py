"""What a built configuration asks for: training, or gradients at places where W is put."""

import torch

from topkbench.config import Experiment
from topkbench.gradients import Sampling, measure_at
from topkbench.randomness import Normals
from topkbench.train import Result
from topkbench.train import train as learn


def train(experiment: Experiment, progress: str | None = None) -> Result:
    """Learn W for every seed at once."""
    return learn(
        experiment.method,
        experiment.task,
        experiment.optimizer,
        _seeds(experiment),
        experiment.train,
        experiment.log,
        schedule=experiment.schedule,
        device=experiment.device,
        dtype=getattr(torch, experiment.dtype),
        progress=progress,
    )


def stand(experiment: Experiment, progress: str | None = None) -> Result:
    """Put W where `at` says, and look."""
    normals = Normals(_seeds(experiment), (), experiment.device, getattr(torch, experiment.dtype))
    result = Result(list(normals.seeds), torch.empty(0), [], torch.full((experiment.seeds,), -1))
    try:
        measure_at(
            experiment.method,
            experiment.task,
            normals,
            experiment.at or [],
            Sampling(experiment.train.batch, experiment.log.samples),
            result.points,
            error=experiment.log.truth,
            rows=experiment.log.truth_rows,
            test_rows=experiment.log.test_rows,
            progress=progress,
        )
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def _seeds(experiment: Experiment) -> list[int]:
    return list(range(experiment.seed, experiment.seed + experiment.seeds))
