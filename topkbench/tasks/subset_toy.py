"""`subset_toy`: a random k-subset and a loss of its mask alone, with the exact mean by enumeration."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher, check_counts, scores_of

LIMIT = 200_000  # subsets that are enumerated
Law = Literal["conditional_poisson", "plackett_luce"]


@dataclass(frozen=True)
class SubsetToy:
    """f(z) = sum_i |z_i - b_i|^power of a random mask z with k ones; b_i = |N(0, 1)| is planted.

    There is one x, the number 1, so that d is 1 and the scores are W itself, `(R, n, 1)`: the log-odds
    of the law of z. What is evaluated is the mean of f over that law, exact and smooth in W. The law is
    the task's and does not depend on the method: a method that draws otherwise is biased for that alone.
    W starts as standard normals. No W is planted: f depends on W through the law alone, and the mean is least
    in the limit where all weight is on the best subset.

    Attributes:
        n: How many scores there are.
        k: How many are taken, in [1, n].
        d: 1.
        law: Of the subset, with log-odds or logits W. "conditional_poisson": `p(z) ~ exp(<z, W>)`.
            "plackett_luce": the set of k draws without replacement from softmax(W), in any order.
        power: >= 1; at 2 f is |z - b|^2.

    Raises:
        ValueError: n, k, d or power out of range, an unknown law, or more than LIMIT subsets.

    Cost: the exact mean takes C(n, k) numbers a replicate, C(n, 1) + ... + C(n, k) for plackett_luce, and
    n times as many operations.

    Source: Ahmed, Zeng, Niepert & Van den Broeck 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling",
    with its published code (n = 10, k = 5, power 2); before it Niepert, Minervini & Franceschi
    2021, "Implicit MLE". Differs: other powers, the second law.
    """

    n: int
    k: int
    d: int = 1
    law: Law = "conditional_poisson"
    power: float = 2.0
    wants: ClassVar[Part] = "mask"

    def __post_init__(self) -> None:
        check_counts(self.n, self.k)
        if self.d != 1:
            raise ValueError(f"d must be 1 (x is the number 1), got {self.d}")
        if self.law not in get_args(Law):
            raise ValueError(f"law must be one of {', '.join(get_args(Law))}, got {self.law!r}")
        if not 1 <= self.power < math.inf:
            raise ValueError(f"power must be >= 1 and finite, got {self.power}")
        self._check_count()

    def _check_count(self) -> None:
        if self.law == "conditional_poisson":
            count, what = math.comb(self.n, self.k), f"C({self.n}, {self.k})"
        else:  # the subsets of the first draws as well
            count = sum(math.comb(self.n, j) for j in range(1, self.k + 1))
            what = f"C({self.n}, 1) + ... + C({self.n}, {self.k})"
        if count > LIMIT:
            raise ValueError(f"{what} = {count} subsets; the limit is {LIMIT}")

    def teacher(self, noise: Noise) -> Teacher:
        """B."""
        return {"b": noise("b", self.n).abs()}

    def start(self, noise: Noise) -> Float[Tensor, "R n 1"]:
        """Standard normals."""
        return noise("W", self.n, 1)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:  # noqa: ARG002
        """`rows` times the same row: x = 1, target b."""
        b = teacher["b"].unsqueeze(1).expand(-1, rows, -1)
        return Batch(torch.ones_like(b[..., :1]), b, teacher)

    def scores(self, W: Float[Tensor, "R n 1"], batch: Batch) -> Float[Tensor, "R B n"]:
        """W."""
        return scores_of(W, batch.x)

    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:  # noqa: ARG002
        """`sum_i |z_i - b_i|^power`, z hard or relaxed."""
        return (part - batch.target).abs().pow(self.power).sum(-1)

    def population(self, teacher: Teacher) -> Batch:
        """The one row."""
        b = teacher["b"].unsqueeze(1)
        return Batch(torch.ones_like(b[..., :1]), b, teacher)

    def population_loss(self, W: Float[Tensor, "R n 1"], batch: Batch) -> Float[Tensor, " R"]:
        """The mean of f over all subsets, differentiable in W."""
        without, gain = self._without_and_gain(batch.teacher)
        masks = _masks(self.n, self.k, W.device).to(W.dtype)
        return without + (self.probabilities(W) * (gain @ masks.mT)).sum(-1)

    def probabilities(self, W: Float[Tensor, "R n 1"]) -> Float[Tensor, "R S"]:
        """Of every k-subset, in the order of `itertools.combinations`."""
        theta = W.squeeze(-1)
        if self.law == "plackett_luce":
            return _plackett_luce(theta, self.k).exp()
        return (theta @ _masks(self.n, self.k, W.device).to(W.dtype).mT).softmax(-1)

    def metrics(self, W: Float[Tensor, "R n 1"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`gap`: the mean of f less the smallest f of any subset."""
        without, gain = self._without_and_gain(test.teacher)
        least = without + gain.topk(self.k, largest=False).values.sum(-1)
        return {"gap": self.population_loss(W, test) - least}

    def _without_and_gain(self, teacher: Teacher) -> tuple[Float[Tensor, " R"], Float[Tensor, "R n"]]:
        """F of the empty mask, and what each one in the mask adds to it."""
        b = teacher["b"]
        zero, one = b.abs().pow(self.power), (1 - b).abs().pow(self.power)
        return zero.sum(-1), one - zero


@functools.lru_cache(maxsize=32)
def _subsets(n: int, k: int, device: torch.device) -> Tensor:
    """`(C(n, k), k)`, each ascending, in lexicographic order."""
    flat = itertools.chain.from_iterable(itertools.combinations(range(n), k))
    return torch.tensor(list(flat), dtype=torch.int64, device=device).reshape(math.comb(n, k), k)


@functools.lru_cache(maxsize=8)
def _masks(n: int, k: int, device: torch.device) -> Tensor:
    """The k-hot masks of all subsets: `(C(n, k), n)`, whole numbers."""
    chosen = _subsets(n, k, device)
    return torch.zeros(len(chosen), n, dtype=torch.int8, device=device).scatter(1, chosen, 1)


@functools.lru_cache(maxsize=32)
def _one_less(n: int, k: int, device: torch.device) -> Tensor:
    """Which (k - 1)-subset is left of each k-subset without its i-th element: `(C(n, k), k)`."""
    place = {subset: i for i, subset in enumerate(itertools.combinations(range(n), k - 1))}
    left = [
        [place[subset[:i] + subset[i + 1 :]] for i in range(k)]
        for subset in itertools.combinations(range(n), k)
    ]
    return torch.tensor(left, device=device)


def _plackett_luce(theta: Float[Tensor, "R n"], k: int) -> Float[Tensor, "R S"]:
    """The log-probability that the first k draws are each k-subset, in any order.

    The last of them was some i in S: `P(S) = sum_(i in S) P(S without i) w_i / w(what is left without S, and
    i)`. From the empty set up that sums over all k! orders.
    """
    n, log_p = theta.shape[-1], theta.new_zeros(len(theta), 1)
    for j in range(1, k + 1):
        before = _masks(n, j - 1, theta.device).bool()
        left = theta.unsqueeze(1).masked_fill(before, -torch.inf).logsumexp(-1)
        last = theta[:, _subsets(n, j, theta.device)]
        log_p = ((log_p - left)[:, _one_less(n, j, theta.device)] + last).logsumexp(-1)
    return log_p
