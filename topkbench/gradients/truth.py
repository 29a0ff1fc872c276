"""The true gradient: that of the objective that is evaluated, the mean loss under the hard top-k.

Where a task enumerates its subsets (`tasks.KnownExpectation`) it is exact, by automatic differentiation in
float64. Where it knows how x is distributed (`tasks.KnownInputs`) it is the mean of the `Oracle`'s unbiased
gradients over fresh rows, streamed until it is known as well as was asked for. Other tasks have none, and
bias is then not reported.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.methods import Oracle
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks import KnownExpectation, KnownInputs, Task, Teacher

BLOCKS = 10
ROWS = 512  # of one block in one round
LIMIT = 1 << 17  # rows in all: 4 times as many would halve the error


@dataclass(frozen=True)
class Truth:
    """A true gradient, exact or estimated.

    Attributes:
        blocks: `(G, R, n, d)`, G independent estimates of the same precision; G = 1 means exact.
    """

    blocks: Float[Tensor, "G R n d"]

    @property
    def mean(self) -> Float[Tensor, "R n d"]:
        """The estimate."""
        return self.blocks.mean(0)

    @property
    def variance(self) -> Float[Tensor, " R"]:
        """Its squared standard error, |estimate - truth|^2 in the mean: 0 where it is exact."""
        count = len(self.blocks)
        spread = (self.blocks - self.mean).flatten(2).square().sum((0, 2))
        return spread / max(1, count * (count - 1))

    @property
    def error(self) -> Float[Tensor, " R"]:
        """Its standard error relative to its own size."""
        return self.variance.sqrt() / self.mean.flatten(1).norm(dim=1)

    def jackknife(self) -> Iterator[Float[Tensor, "R n d"]]:
        """The estimate without each block in turn; nothing where it is exact."""
        count = len(self.blocks)
        if count > 1:
            yield from ((self.mean * count - block) / (count - 1) for block in self.blocks)


def has_truth(task: Task) -> bool:
    """Whether a task's true gradient can be had: not where it says that the loss of a row looks at others."""
    return isinstance(task, KnownExpectation | KnownInputs) and not getattr(task, "couples_rows", False)


def true_gradient(
    task: Task,
    W: Float[Tensor, "R n d"],
    teacher: Teacher,
    normals: Normals,
    error: float = 0.01,
    limit: int = LIMIT,
    learned: Mapping[str, Tensor] | None = None,
) -> Truth:
    """The gradient of the mean hard loss at W.

    A replicate draws rows until its own standard error is small enough, whatever the others do.

    Args:
        task: What is learned.
        W: Where.
        teacher: What the task planted.
        normals: What rows are drawn from.
        error: The standard error wanted, relative to the norm of the gradient, > 0.
        limit: How many rows a replicate may draw, >= 1; where they do not suffice the error is larger.
        learned: What the task learns beside W; held constant.

    Raises:
        ValueError: the task has no truth; error or limit out of range; rows of W that coincide.

    Cost: a row takes the time of `methods._flux`: n^2, and n for each near tie.
    """
    if not has_truth(task):
        raise ValueError(f"{type(task).__name__} has no true gradient: bias cannot be measured on it")
    if not 0 < error < math.inf:
        raise ValueError(f"error must be > 0 and finite, got {error}")
    if limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    others = dict(learned or {})
    if isinstance(task, KnownExpectation):
        return Truth(_exact(task, W, teacher, others)[None])
    _check_apart(W)
    blocks = W.new_zeros(BLOCKS, *W.shape)
    active = torch.arange(len(W), device=W.device)
    for done in range(math.ceil(limit / (BLOCKS * ROWS))):
        draws = normals.child("truth", done)
        for b in range(BLOCKS):
            drawn = dataclasses.replace(task.sample(teacher, draws, ROWS), learned=others)
            batch = drawn.replicates(active)
            fresh = gradient(Oracle(), task, W[active], batch, draws)[1]
            blocks[b, active] += (fresh - blocks[b, active]) / (done + 1)
        active = (Truth(blocks).error > error).nonzero().squeeze(-1)
        if not len(active):
            break
    return Truth(blocks)


def _exact(task: KnownExpectation, W: Tensor, teacher: Teacher, others: dict[str, Tensor]) -> Tensor:
    precise, learned = ({name: part.double() for name, part in parts.items()} for parts in (teacher, others))
    with torch.enable_grad():
        leaf = W.detach().double().requires_grad_()
        batch = dataclasses.replace(task.population(precise), learned=learned)
        loss = task.population_loss(leaf, batch)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return grad.to(W.dtype)


def _check_apart(W: Float[Tensor, "R n d"]) -> None:
    """Refuse rows that coincide: their scores tie for every x."""
    distance = torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    same = (distance == 0).nonzero()
    if len(same):
        r, i, j = same[0].tolist()
        raise ValueError(
            f"rows {i} and {j} of W coincide in replicate {r}: the mean loss has no gradient there"
        )
