"""Which papers are one operator: published top-k relaxations against ours and against each other.

    python experiments/equivalences.py [OUT]

For random rows the largest difference in the mask and in the vector-Jacobian product with a random g, between
each published form (`topkbench.testing.published`, as its paper writes it) and the operator here, and between
any two published forms of it. Printed, and saved to OUT (by default results/equivalences) as CSV,
Markdown and LaTeX. A few seconds.
"""

import sys
from collections.abc import Callable
from itertools import combinations, groupby
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from topkbench import operators, tables
from topkbench.testing import published

OUT = Path(__file__).parent.parent / "results" / "equivalences"
ROWS = 200
CAPTION = (
    f"Published relaxations of top-k that are one operator: the largest absolute difference over {ROWS} "
    "random rows, in double precision, of the mask and of the vector-Jacobian product with a normal g; "
    "n from 3 to 12, k from 1 to n - 1, normal scores, temperature T log-uniform in [0.2, 5]. In brackets "
    "what the source calls its strength. Last line of a group: the two published forms that differ most."
)
Relaxation = Callable[[Tensor, int, float], Tensor]


class Published(NamedTuple):
    """A relaxation as its paper writes it, and the operator here that it is."""

    operator: operators.Operator
    name: str
    source: str
    function: Relaxation


class Row(NamedTuple):
    """A random row and what the mask is multiplied with."""

    scores: Tensor
    k: int
    temperature: float
    g: Tensor


class Outcome(NamedTuple):
    """Masks and vector-Jacobian products, row after row."""

    masks: Tensor
    gradients: Tensor


PUBLISHED = [
    Published(operators.entropic, "LML, bracketing (T = 1 in the source)", "Amos et al. 2019", published.lml),
    Published(
        operators.entropic,
        "SOFT, two anchors, Sinkhorn converged (epsilon = 2 T / largest cost)",
        "Xie et al. 2020",
        published.soft,
    ),
    Published(
        operators.entropic,
        "Spartan, unit costs, converged (beta = 1 / T)",
        "Tai et al. 2022",
        published.spartan,
    ),
    Published(
        operators.sparsemax,
        "projection onto the capped simplex, by sorting (of s / T)",
        "Wang & Lu 2015",
        published.capped_simplex,
    ),
    Published(
        operators.sparsemax,
        "SparseMAP with a budget, active set (of s / T)",
        "Niculae et al. 2018",
        published.sparsemap,
    ),
    Published(
        operators.sparsemax,
        "budget_bisect (of s / T)",
        "entmax 1.3, code",
        published.budget_bisect,
    ),
    Published(
        operators.sparsemax,
        "sparse top-k mask, p = 2, pooling (lambda = T)",
        "Sander et al. 2023",
        published.sander,
    ),
    Published(
        operators.sparsemax,
        "projection onto the permutahedron of k ones (epsilon = T)",
        "Blondel et al. 2020",
        published.permutahedron,
    ),
    Published(
        operators.lapsum, "LapSum, in closed form (alpha = T)", "Struski et al. 2025", published.lapsum
    ),
    Published(
        operators.csoftmax,
        "constrained softmax, bounds 1 / k, times k (of s / T)",
        "Martins & Kreutzer 2017",
        published.constrained_softmax,
    ),
    Published(
        operators.csoftmax,
        "CoLT5 and CoDA, coordinate descent, converged (epsilon = T)",
        "Ainslie et al. 2023; Lei et al. 2023",
        published.coordinate_descent,
    ),
    Published(
        operators.marginals,
        "dynamic program with Shannon's entropy (T)",
        "Vivier-Ardisson et al. 2026",
        published.dp_shannon,
    ),
    Published(
        operators.marginals,
        "stochastic softmax trick, exponential-family entropy (t = T)",
        "Paulus et al. 2020",
        published.sst,
    ),
    Published(
        operators.marginals,
        "conditional Poisson inclusion probabilities (w = exp(s / T))",
        "Chen et al. 1994",
        published.conditional_poisson,
    ),
]


def random_rows(count: int = ROWS, seed: int = 0) -> list[Row]:
    """As many rows, always the same ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    rows = []
    for _ in range(count):
        n = int(torch.randint(3, 13, (), generator=generator))
        k = int(torch.randint(1, n, (), generator=generator))
        temperature = 0.2 * 25 ** float(torch.rand((), generator=generator, dtype=torch.float64))
        rows.append(Row(normal(n), k, temperature, normal(n)))
    return rows


def outcome(relaxation: Relaxation, rows: list[Row]) -> Outcome:
    """Of a relaxation, on all rows."""
    masks, gradients = [], []
    for scores, k, temperature, g in rows:
        leaf = scores.clone().requires_grad_()
        mask = relaxation(leaf, k, temperature)
        masks.append(mask.detach())
        gradients.append(torch.autograd.grad(mask, leaf, g)[0])
    return Outcome(torch.cat(masks), torch.cat(gradients))


def difference(one: Outcome, other: Outcome) -> tuple[float, float]:
    """The largest in the masks, and in the gradients."""
    return tuple((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def differences(rows: list[Row]) -> pd.DataFrame:
    """A line for each published form, and one for each group of them: the pair that differs most."""
    lines = []
    for operator, group in groupby(PUBLISHED, key=lambda form: form.operator):
        forms = list(group)
        ours = outcome(operator, rows)
        theirs = [outcome(form.function, rows) for form in forms]
        for form, their in zip(forms, theirs, strict=True):
            lines.append([operator.__name__, form.name, form.source, *difference(their, ours)])
        if len(forms) > 1:
            pairs = [difference(*pair) for pair in combinations(theirs, 2)]
            worst = [max(part) for part in zip(*pairs, strict=True)]
            lines.append([operator.__name__, f"any two of these {len(forms)}", "", *worst])
    columns = ["operator here", "published as", "source", "forward difference", "gradient difference"]
    return pd.DataFrame(lines, columns=columns)


def main(out: Path) -> None:
    """Measure, print and save."""
    table = differences(random_rows())
    for column in table.columns[-2:]:
        table[column] = table[column].map("{:.0E}".format)
    print(table.to_string(index=False), "", CAPTION, sep="\n")
    print("", *tables.write_plain(table, out, "equivalences", CAPTION), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else OUT)
