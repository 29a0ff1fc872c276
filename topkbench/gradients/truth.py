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
from tqdm import tqdm

from topkbench.methods import Oracle
from topkbench.randomness import Normals
from topkbench.step import gradient
from topkbench.tasks import KnownExpectation, KnownInputs, Task, Teacher
from topkbench.threads import side_by_side, threads

BLOCKS = 10
NEAR = 0.2  # what the oracle looks at: about the least time for a precision (see the script gradient_cost.py)
ROUND = 2048  # rows of one block in one round
TOGETHER = 16  # replicates whose ties are in memory together, in all threads
ROWS = 1 << 20  # of a replicate: 4 times as many halve the error


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
        """Its standard error relative to the truth's size; infinite where it is all noise.

        About a tenth too small where rows were drawn until it was small enough.
        """
        size = (self.mean.flatten(1).square().sum(1) - self.variance).clamp(min=0)
        return (self.variance / size).sqrt()

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
    rows: int = ROWS,
    learned: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> Truth:
    """The gradient of the mean hard loss at W.

    A replicate draws rows until its own standard error is small enough, whatever the others do.

    Args:
        task: What is learned.
        W: Where.
        teacher: What the task planted.
        normals: What rows are drawn from.
        error: The standard error wanted, relative to the norm of the gradient, > 0.
        rows: How many rows a replicate may draw, >= 1, rounded up to rounds of BLOCKS times at most ROUND;
            where they do not suffice the error is larger.
        learned: What the task learns beside W; held constant.
        progress: Whether to show a bar, where it takes more than two seconds.

    Raises:
        ValueError: the task has no truth; error or rows out of range; rows of W that coincide.

    Cost: a row takes the time of `methods._flux`: n^2, and n for each near tie.
    """
    if not has_truth(task):
        raise ValueError(f"{type(task).__name__} has no true gradient: bias cannot be measured on it")
    if not 0 < error < math.inf:
        raise ValueError(f"error must be > 0 and finite, got {error}")
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")
    others = dict(learned or {})
    if isinstance(task, KnownExpectation):
        return Truth(_exact(task, W, teacher, others)[None])
    _check_apart(W)
    blocks = W.new_zeros(BLOCKS, *W.shape)
    active = torch.arange(len(W), device=W.device)
    at_once = max(1, min(ROUND, rows // BLOCKS))
    rounds = tqdm(
        range(math.ceil(rows / (BLOCKS * at_once))), "truth", leave=False, delay=2, disable=not progress
    )
    for done in rounds:
        for some in active.split(max(1, TOGETHER // threads(W.device, BLOCKS))):
            planted, learned = ({name: part[some] for name, part in own.items()} for own in (teacher, others))
            draws = _draws(normals, some, done)
            for b, fresh in enumerate(_estimates(task, W[some], planted, learned, draws, at_once)):
                blocks[b, some] += (fresh - blocks[b, some]) / (done + 1)
        errors = Truth(blocks).error
        rounds.set_postfix_str(f"{100 * errors.max():.2g} %, wanted {100 * error:g} %")
        active = (errors > error).nonzero().squeeze(-1)
        if not len(active):
            break
    return Truth(blocks)


def _draws(normals: Normals, some: Tensor, done: int) -> Normals:
    """The draws of a round for some of the replicates: theirs, whoever else is there."""
    seeds = [normals.seeds[i] for i in some.tolist()]
    return Normals(seeds, (*normals.purpose, "truth", done), normals.device, normals.dtype)


def _estimates(
    task: Task, W: Tensor, teacher: Teacher, others: Mapping[str, Tensor], draws: Normals, rows: int
) -> Iterator[Tensor]:
    """The gradient of each block, from so many fresh rows."""

    def one(block: int) -> Tensor:
        own = draws.child(block)  # what a block draws does not depend on what others have drawn
        batch = dataclasses.replace(task.sample(teacher, own, rows), learned=others)
        return gradient(Oracle(NEAR), task, W, batch, own)[1]

    with side_by_side(threads(W.device, BLOCKS)) as each_of:
        yield from each_of(one, range(BLOCKS))


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
