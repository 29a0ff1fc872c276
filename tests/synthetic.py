"""Records made up for tests of what reads them: numbers that are known, and no training."""

import torch

from topkbench import records
from topkbench.train import Result

STEPS = (0, 10, 20)


def result(losses, diverged_at=None, interrupted=False, variance=2.0):
    """`losses[j][i]`: the hard loss of replicate i at log point j."""
    count = len(losses[0])
    points = []
    for step, row in zip(STEPS, losses, strict=False):
        loss = torch.tensor(row, dtype=torch.float64)
        same = torch.ones(count, dtype=torch.float64)
        columns = {"hard_loss": loss, "relaxed_loss": loss * 2, "recall": same / 2, "distance": same / 4}
        columns |= {"rows_with_gradient": same, "grad_norm": same, "grad_variance": same * variance}
        columns |= {
            "grad_variance_data": same * variance,
            "grad_variance_method": same * 0,
            "grad_snr": same / 8,
        }
        points.append((step, step / 10, columns))
    gone = torch.full((count,), -1) if diverged_at is None else torch.tensor(diverged_at)
    return Result(list(range(count)), torch.zeros(count, 2, 2), points, gone, interrupted)


def config(method="softmax", task="values", temperature=0.3, **changes):
    operators = {"softmax": "softmax", "ste": "identity", "ste_softmax": "softmax"}
    estimator = "Relaxed" if method == "softmax" else "StraightThrough" if method in operators else method
    node = {"_target_": f"topkbench.methods.{estimator}"}
    if method in operators:
        operator = {"_target_": f"topkbench.operators.{operators[method]}", "_partial_": True}
        node |= {"operator": operator, "temperature": temperature}
    sizes = {"n": 6, "d": 5, "k": 2, "seeds": 4, "seed": 0, "device": "cpu", "dtype": "float64"}
    parts = {"task": {"_target_": f"topkbench.tasks.{task.capitalize()}"}, "train": {"steps": 20, "batch": 8}}
    optimizer = {"_target_": "topkbench.optimizers.Adam", "lr": 0.01}
    return {**sizes, **parts, "method": node, "optimizer": optimizer, "results": "somewhere", **changes}


def save(folder, losses, method="softmax", task="values", started="2026-01-01T00:00:00", **options):
    changes = {key: options.pop(key) for key in ("temperature", "seeds") if key in options}
    environment = {
        "task": task,
        "method": method,
        "status": "interrupted" if options.get("interrupted") else "done",
        "started": started,
        "command": "typed",
    }
    environment |= {"commit": "abc", "packages": {}, "device": "cpu", "threads": 1}
    name = f"{task}-{method}"
    return records.save(folder, name, config(method, task, **changes), environment, result(losses, **options))


FALLING = [[4.0, 4.4, 4.8, 5.2], [1.0, 1.1, 1.2, 1.3], [0.1, 0.12, 0.14, 0.16]]
FLAT = [[4.0, 4.4, 4.8, 5.2]] * 3
