"""Published results on toys whose true gradient is known by enumeration, next to what comes out here.

    python experiments/published_toys.py [OUT] [--only simple,imle,categorical,reinmax] [--seeds 1]

    simple       bias, variance and error of k-subset estimators (Ahmed et al. 2023, "SIMPLE")
    imle         convergence of I-MLE and others on that toy (Niepert et al. 2021, "Implicit MLE")
    categorical  bias and variance for one of eight and a quadratic loss
    reinmax      polynomial programming with 128 binary latents (Liu et al. 2023, "ReinMax")

Each is printed, and saved to OUT (by default results/toys) as CSV, Markdown and LaTeX: the published numbers
(read off figures), those of an earlier run with other code, ours, and whether ours agree. --seeds is how many
learners reinmax has. All use the methods, gradients and the training loop of topkbench. Eleven minutes
of one core, of which reinmax takes ten.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import _published_numbers as numbers
import numpy as np
import pandas as pd
import torch
from _published_toys import Given, Quadratic, Times, by_cosine, by_size, drawn, planted
from tqdm import tqdm

from topkbench import methods, tables
from topkbench.gradients import true_gradient
from topkbench.methods import Method
from topkbench.optimizers import SGD, Adam
from topkbench.randomness import Normals
from topkbench.tasks import Polynomial, SubsetToy
from topkbench.train import Logging, Training, train

OUT = Path(__file__).parent.parent / "results" / "toys"
Saved = tuple[str, pd.DataFrame, str]  # the name of its files, the table, its caption


def simple() -> Iterator[Saved]:
    """Bias, variance and error of k-subset estimators; then for one of ten."""
    theta, b = (torch.from_numpy(np.array(each)) for each in zip(*map(planted, numbers.SEEDS), strict=True))
    task, W, teacher = SubsetToy(10, 5), theta.unsqueeze(-1), {"b": b}
    normals = Normals(numbers.SEEDS, dtype=torch.float64)
    truth = true_gradient(task, W, teacher, normals).mean.squeeze(-1)
    rows = []
    for name, toy in tqdm(numbers.SIMPLE.items(), desc="simple", unit="estimator"):
        grads = drawn(toy.method, task, W, teacher, normals.child("one"), numbers.DRAWS)
        cosines = by_cosine(grads, truth)
        sizes = by_size(toy.method, task, W, teacher, normals.child("other"), numbers.DRAWS)
        rows.append([name, *_toy_cells(name, toy, cosines, sizes)])
    columns = ["bias", "variance", "error", "size of bias", "total variance", "MSE", "rho", "reproduced"]
    yield "simple", pd.DataFrame(rows, columns=["estimator", *columns]), numbers.SIMPLE_CAPTION
    yield "simple_one_of_ten", one_of_ten(), numbers.ONE_CAPTION


def _toy_cells(name: str, toy: numbers.Toy, cosines: dict[str, float], sizes: dict[str, float]) -> list[str]:
    ours = list(cosines.values())
    unbiased = name.startswith(numbers.UNBIASED)
    first = 1 if unbiased else 0  # a bias of 0 has no relative error
    agrees = all(near(a, b, 0.05) for a, b in zip(ours[first:], toy.again[first:3], strict=True))
    if unbiased:
        agrees &= cosines["bias"] < 0.01 and abs(sizes["bias_z"]) < 5
    cells = [cell(*three) for three in zip(toy.published, toy.again, ours, strict=False)]
    cells += [cell(toy.again[3], sizes["rel_bias"]), cell(toy.again[4], sizes["rel_variance"])]
    return [*cells, cell(sizes["rel_mse"]), f"{sizes['rho']:.3f}", yes(agrees)]


def one_of_ten() -> pd.DataFrame:
    """The companion of the notebook."""
    theta, b = (torch.from_numpy(each)[None] for each in planted(numbers.SEEDS[0]))
    task, W, teacher = SubsetToy(10, 1), theta.unsqueeze(-1), {"b": b}
    normals = Normals(numbers.SEEDS[:1], dtype=torch.float64)
    truth = true_gradient(task, W, teacher, normals).mean.squeeze(-1)
    rows = []
    for name, (method, *theirs) in numbers.ONE.items():
        cosines = by_cosine(drawn(method, task, W, teacher, normals, numbers.DRAWS), truth)
        pairs = list(zip(theirs, (cosines["bias"], cosines["variance"]), strict=True))
        agrees = all(near(ours, their, 0.1) for their, ours in pairs)
        rows.append([name, *(cell(*pair) for pair in pairs), yes(agrees)])
    return pd.DataFrame(rows, columns=["estimator", "bias", "variance", "reproduced"])


def imle() -> Iterator[Saved]:
    """Convergence, with what of the published claims holds; then a grid of strengths and learning rates."""
    rows, last = [], {}
    for name, (method, lr, steps, again) in tqdm(numbers.IMLE.items(), desc="imle", unit="estimator"):
        ours = gaps(method, lr, steps, numbers.REPLICATES)
        last[name], end = ours[50].mean().item(), ours[steps]
        cells = [cell(a, ours[step].mean().item()) for step, a in zip(numbers.LOOKED_AT, again, strict=False)]
        cells += ["-"] * (len(numbers.LOOKED_AT) - len(cells))
        error = 4 * (2 / numbers.REPLICATES) ** 0.5 * end.std().item()
        agrees = abs(end.mean().item() - again[-1]) < max(error, 0.002)
        rows.append([name, f"{lr:g}", *cells, f"{end.std():.2f}", yes(agrees)])
    both = last["SIMPLE"], last["I-MLE"]
    orders = last["exact gradient"] < min(both) and 2 * max(both) < last["STE"] < last["SFE"] / 2
    claims = (
        f"at 50 steps exact < SIMPLE and I-MLE < half of STE < a quarter of SFE, {yes(orders)}; SIMPLE and "
        f"I-MLE within 0.1 of each other, {yes(abs(both[0] - both[1]) < 0.1)}; STE stays above 0.6, "
        f"{yes(last['STE'] > 0.6)}."
    )
    columns = ["estimator", "lr", *(f"gap at {step}" for step in numbers.LOOKED_AT), "sd", "reproduced"]
    yield "imle", pd.DataFrame(rows, columns=columns), numbers.IMLE_CAPTION + claims
    yield "imle_grid", imle_grid(), numbers.GRID_CAPTION


def gaps(method: Method, lr: float | torch.Tensor, steps: int, replicates: int) -> dict[int, torch.Tensor]:
    """The gap of every replicate at every fifth step."""
    result = train(
        method,
        Given(10, 5),
        SGD(lr, momentum=0.9),
        range(replicates),
        Training(steps, batch=1),
        Logging(points=steps // 5 + 1, samples=0, test_rows=1),
        dtype=torch.float64,
    )
    return {step: columns["gap"] for step, _, columns in result.points}


def imle_grid() -> pd.DataFrame:
    """The last gap of I-MLE for every lambda and learning rate."""
    lr = torch.tensor(numbers.RATES).repeat_interleave(numbers.REPLICATES)
    rows = []
    for strength in tqdm(numbers.GRID, desc="imle grid", unit="lambda"):
        end = gaps(Times(methods.ImplicitMLE(strength), strength), lr, 50, len(lr))[50]
        means = end.reshape(len(numbers.RATES), -1).mean(-1).tolist()
        rows.append([strength, *(f"{each:.3f}" for each in means)])
    return pd.DataFrame(rows, columns=["lambda", *(f"lr {rate}" for rate in numbers.RATES)])


def categorical() -> Iterator[Saved]:
    """One of eight, a quadratic loss."""
    task = Quadratic()
    W, teacher = task.fixture()
    normals = Normals([0], dtype=torch.float64)
    power = true_gradient(task, W, teacher, normals).mean.square().sum().item()
    rows, biases, variances = [], [], []
    for name, (method, *again) in tqdm(numbers.CATEGORICAL.items(), desc="categorical", unit="estimator"):
        sizes = by_size(method, task, W, teacher, normals, numbers.MANY)
        ours = [sizes["cos_mean"], sizes["rel_bias"], power * sizes["rel_variance"]]
        error = (2 * sizes["rel_variance"] / numbers.MANY) ** 0.5
        biased = abs(ours[1] - again[1]) < max(0.05 * again[1], 3 * error)
        right = abs(sizes["bias_z"]) < 5 if name.startswith(numbers.UNBIASED) else biased
        agrees = right and abs(ours[0] - again[0]) < 0.01 and near(ours[2], again[2], 0.05)
        cells = [cell(*pair) for pair in zip(again, ours, strict=True)]
        rows.append([name, *cells, f"{sizes['rho']:.3f}", yes(agrees)])
        if name.startswith("ST-Gumbel"):
            biases.append(ours[1])
            variances.append(ours[2])
    trade = biases == sorted(biases, reverse=True) and variances == sorted(variances)
    claim = f"as its temperature falls, the bias of ST-Gumbel falls and its variance rises, {yes(trade)}."
    columns = ["estimator", "cosine", "size of bias", "total variance", "rho", "reproduced"]
    yield "categorical", pd.DataFrame(rows, columns=columns), numbers.CATEGORICAL_CAPTION + claim


def reinmax(seeds: int) -> Iterator[Saved]:
    """Polynomial programming."""
    rows = []
    for power, again in numbers.POLYNOMIAL.items():
        best = numbers.C**power
        start = (best + (1 - numbers.C) ** power) / 2
        for (name, (method, batch)), theirs in zip(numbers.REINMAX.items(), again, strict=True):
            loss = polynomial_loss(method, power, batch, seeds, f"reinmax, p = {power}, {name}")
            mean, sd = loss.mean().item(), loss.std().item() if seeds > 1 else numbers.NOTHING
            agrees = abs(mean - theirs) < 0.001
            if name in ("exact gradient", "ReinMax", "RLOO"):
                agrees &= mean - best < 0.004
            elif name.startswith("ST"):
                agrees &= start - mean < 0.01
            figures = [f"{each:.5f}".replace("nan", "-") for each in (start, best, theirs, mean, sd)]
            rows.append([power, name, *figures, "-" if math.isnan(theirs) else yes(agrees)])
    columns = ["p", "estimator", "start", "optimum", "again", "here", "sd", "reproduced"]
    caption = f"{numbers.REINMAX_CAPTION}, {seeds} seed{'s' * (seeds > 1)}{numbers.REINMAX_RULE}"
    yield "reinmax", pd.DataFrame(rows, columns=columns), caption


def polynomial_loss(method: Method, power: float, batch: int, seeds: int, progress: str) -> torch.Tensor:
    """The exact mean loss at the end, for every seed."""
    result = train(
        method,
        Polynomial(power=power, c=numbers.C),
        Adam(0.001),
        range(seeds),
        Training(numbers.STEPS, batch),
        Logging(points=2, samples=0, test_rows=1),
        progress=progress,
    )
    return result.points[-1][2]["hard_loss"].double()


def near(ours: float, theirs: float, share: float) -> bool:
    """Whether two numbers differ by less than a share of the second."""
    return abs(ours - theirs) < share * abs(theirs)


def cell(*figures: float) -> str:
    """Numbers side by side; - for one that is not known."""
    words = [f"{each:.3g}" if not abs(each) < 1e-3 else f"{each:.4f}" for each in figures]
    return " / ".join(words).replace("nan", "-")


def yes(holds: bool) -> str:
    """The last column."""
    return "yes" if holds else "no"


def main(out: Path, only: list[str], seeds: int) -> None:
    """Run, print and save."""
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Iterator[Saved]]] = {
        "simple": simple,
        "imle": imle,
        "categorical": categorical,
        "reinmax": lambda: reinmax(seeds),
    }
    if not set(only) <= set(parts):
        raise SystemExit(f"--only must name some of {', '.join(parts)}, got {','.join(only)}")
    for name in only or parts:
        began = time.perf_counter()
        for stem, table, caption in parts[name]():
            print(table.to_string(index=False), "", caption, "", sep="\n")
            print(*tables.write_plain(table, out, stem, caption), "", sep="\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s\n", flush=True)


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("out", nargs="?", type=Path, default=OUT)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    main(given.out, given.only, given.seeds)
