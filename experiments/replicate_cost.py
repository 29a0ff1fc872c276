"""What a replicate costs among others: time a step beside one run alone, and peak memory against R and batch.

    python experiments/replicate_cost.py

Interleaved rounds in one process, medians. Memory: the most bytes of tensors alive at once.
"""

import statistics

import pandas as pd
import torch
from _measured import peak
from tqdm import tqdm

from topkbench.methods import Hard
from topkbench.optimizers import Adam
from topkbench.tasks import Values
from topkbench.train import Logging, Training, train

QUIET = Logging(points=2, samples=0, test_rows=1)
SIZES = {
    # n, d, k, batch, replicates: the most a replicate-step may cost, as a share of a step of one run alone.
    (6, 6, 3, 16, 128): 1 / 25,
    (64, 32, 8, 32, 32): 1 / 2.5,
    (64, 32, 8, 32, 128): 1 / 2.5,
}
ROUNDS, STEPS = 9, 200


def seconds(n: int, d: int, k: int, batch: int, replicates: int) -> float:
    """Wall time of one step."""
    task = Values(n, d, k)
    result = train(Hard(), task, Adam(0.01), range(replicates), Training(STEPS, batch), QUIET)
    return result.points[-1][1] / STEPS


def speed() -> pd.DataFrame:
    """A replicate-step among others against a step alone."""
    rows = []
    for (n, d, k, batch, replicates), target in tqdm(SIZES.items(), desc="speed"):
        alone, together = [], []
        for _ in range(ROUNDS):
            alone.append(seconds(n, d, k, batch, 1))
            together.append(seconds(n, d, k, batch, replicates) / replicates)
        one, each = statistics.median(alone) * 1e6, statistics.median(together) * 1e6
        rows.append((n, d, k, batch, replicates, one, each, f"1/{one / each:.1f}", f"1/{1 / target:g}"))
    columns = ["n", "d", "k", "batch", "R", "us a step alone", "us a replicate-step", "ratio", "at most"]
    return pd.DataFrame(rows, columns=columns)


def peak_of_training(replicates: int, batch: int, samples: int) -> float:
    """The most MB of tensors alive at once in three steps with their statistics and evaluation."""
    training, logging = Training(3, batch), Logging(points=2, samples=samples, test_rows=1024)
    return (
        peak(lambda: train(Hard(), Values(64, 32, 8), Adam(0.01), range(replicates), training, logging)) / 1e6
    )


def memory() -> pd.DataFrame:
    """Peak memory against the number of replicates, the batch and the number of gradient samples."""
    sizes = [(1, 32, 16), (256, 32, 16), (512, 32, 16), (1024, 32, 16)]
    sizes += [(256, 128, 16), (256, 256, 16), (256, 512, 16), (32, 32, 16), (32, 32, 1000)]
    rows = [(*size, peak_of_training(*size)) for size in tqdm(sizes, desc="memory")]
    return pd.DataFrame(rows, columns=["R", "batch", "M", "peak MB"])


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(speed().to_string(index=False, float_format="{:.1f}".format), "\n")
    print(memory().to_string(index=False, float_format="{:.1f}".format))
