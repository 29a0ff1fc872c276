"""What the three tasks of the founding question share: Gaussian x and a planted W* to learn."""

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from topkbench.operators._contract import Part
from topkbench.operators.hard import hard_mask_of_data
from topkbench.randomness import Noise
from topkbench.tasks._contract import Batch, Teacher, check_counts, scores_of

START = 0.5  # a first score has standard deviation 1/2: small, but its ranking is not rounding
AT_ONCE = 128  # rows of a held-out batch


class NormalInputs:
    """x ~ N(0, I): its components along and across any direction are independent."""

    def line_density(
        self, x: Float[Tensor, "R T d"], direction: Float[Tensor, "R T d"]
    ) -> Float[Tensor, "R T"]:
        """The density of a standard normal at x along a unit direction; what lies across is all one."""
        return (x * direction).sum(-1).square().mul(-0.5).exp() / math.sqrt(2 * math.pi)

    def line_mass(
        self, x: Float[Tensor, "R T d"], direction: Float[Tensor, "R T d"], near: float
    ) -> Float[Tensor, "R T"]:
        """The chance of a standard normal to be nearer than `near` to x along a unit direction."""
        along = (x * direction).sum(-1)
        return torch.special.ndtr(along + near) - torch.special.ndtr(along - near)


@dataclass(frozen=True)
class Planted(NormalInputs, ABC):
    """x ~ N(0, I_d); the rows of W* are uniform on the unit sphere, so that a score W* x has variance 1.

    Attributes:
        n: How many scores there are.
        d: The dimension of x.
        k: How many are kept, in [1, n].
        noise: The standard deviation of the noise on the training targets, >= 0.
    """

    n: int
    d: int
    k: int
    noise: float = 0.0
    wants: ClassVar[Part]

    def __post_init__(self) -> None:
        check_counts(self.n, self.k, d=self.d)
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be >= 0 and finite, got {self.noise}")

    @abstractmethod
    def target(self, scores: Float[Tensor, "R B n"], teacher: Teacher) -> Tensor:
        """What the teacher makes of its scores, without noise."""

    @abstractmethod
    def loss(self, part: Tensor, scores: Float[Tensor, "R B n"], batch: Batch) -> Float[Tensor, "*losses"]:
        """The loss per row of the mask or the values."""

    def teacher(self, noise: Noise) -> Teacher:
        """W*."""
        return {"W": torch.nn.functional.normalize(noise("W", self.n, self.d), dim=-1)}

    def start(self, noise: Noise) -> Float[Tensor, "R n d"]:
        """Independent normal entries with standard deviation START / sqrt(d)."""
        return noise("W", self.n, self.d) * (START / self.d**0.5)

    def sample(self, teacher: Teacher, noise: Noise, rows: int, clean: bool = False) -> Batch:
        """`rows` fresh rows; `clean` ones carry no target noise."""
        x = noise("x", rows, self.d)
        target = self.target(scores_of(teacher["W"], x), teacher)
        if self.noise and not clean:
            target = target + self.noise * noise("target", *target.shape[1:])
        return Batch(x, target, teacher)

    def scores(self, W: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B n"]:
        """W x."""
        return scores_of(W, batch.x)

    def moved(self, batch: Batch, rows: Tensor, x: Float[Tensor, "R T d"]) -> Batch:
        """Rows of a batch at other x, each with the noise that its own target carries."""
        target = self.target(scores_of(batch.teacher["W"], x), batch.teacher)
        if self.noise:
            clean = self.target(scores_of(batch.teacher["W"], batch.x), batch.teacher)
            noise = batch.target - clean
            target = target + noise.gather(1, rows.unsqueeze(-1).expand(*rows.shape, noise.shape[-1]))
        return dataclasses.replace(batch, x=x, target=target)

    def metrics(self, W: Float[Tensor, "R n d"], test: Batch) -> dict[str, Float[Tensor, " R"]]:
        """`recall`: the share of the teacher's top k that is found; `distance` of W to W*."""
        matched = self.match(W, test.teacher)
        found = torch.cat([recall(self.k, matched, piece) for piece in test.pieces(AT_ONCE)], dim=-1)
        return {"recall": found.mean(-1), "distance": self.distance(matched, test.teacher)}

    def match(self, W: Float[Tensor, "R n d"], teacher: Teacher) -> Float[Tensor, "R n d"]:  # noqa: ARG002
        """W itself: the target names the rows."""
        return W

    def distance(self, matched: Float[Tensor, "R n d"], teacher: Teacher) -> Float[Tensor, " R"]:
        """`|W - W*| / |W*|` in the Frobenius norm, 0 at the teacher."""
        return relative_distance(matched, teacher["W"])


def recall(k: int, matched: Float[Tensor, "R n d"], batch: Batch) -> Float[Tensor, "R B"]:
    """The share of the teacher's top k that is in the learner's, per row; W matched to the teacher."""
    ours = hard_mask_of_data(scores_of(matched, batch.x), k)
    theirs = hard_mask_of_data(scores_of(batch.teacher["W"], batch.x), k)
    return (ours * theirs).sum(-1) / k


def half_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """`|prediction - target|^2 / 2` per row."""
    return (prediction - target).square().sum(-1) / 2


def relative_distance(W: Float[Tensor, "R n d"], target: Float[Tensor, "R n d"]) -> Float[Tensor, " R"]:
    """`|W - W*| / |W*|` in the Frobenius norm."""
    return (W - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
